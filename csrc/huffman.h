// huffman.h: a canonical Huffman code over the bytes of one plane, as the method `huffman` of
// docs/format.md section 4. Pure functions; SIMD chosen at run time, with the same bytes as a
// result on every path.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu.h"

namespace pysnap {

constexpr unsigned kLongestCode = 11;  // bits
constexpr std::size_t kHuffmanStreams = 8;

// Memory that is read when a call has returned: some paths fetch its beginning meanwhile, as the
// memory has nothing else to do.
struct Upcoming {
  const std::uint8_t* data = nullptr;
  std::size_t size = 0;
};

// One thread's encoder: owns its scratch memory.
class HuffmanEncoder {
 public:
  // Encodes `size` bytes into at most `capacity` bytes. Returns the length, or 0 where it does not
  // fit. `path` is one that this CPU runs.
  std::size_t encode(const std::uint8_t* plane, std::size_t size, std::uint8_t* out,
                     std::size_t capacity, SimdPath path = best_simd_path(),
                     Upcoming upcoming = {});

 private:
  std::vector<std::uint8_t> streams_;
  std::vector<std::uint8_t> escaped_;  // of each piece of the plane: whether it has an escape
};

// One thread's decoder: owns its table. Trusts nothing.
class HuffmanDecoder {
 public:
  // False unless `payload` is a valid encoding of exactly `size` bytes; then `plane` holds rubbish.
  // Never writes past plane + size.
  bool decode(const std::uint8_t* payload, std::size_t payload_size, std::uint8_t* plane,
              std::size_t size);

 private:
  // What the next bits of a stream hold: the low byte is the length of the codes that are whole in
  // them, the high byte their number, and the bytes between are their symbols.
  using Entry = std::uint64_t;

  bool build(const std::array<std::uint8_t, 256>& lengths);

  // For every number of bits up to kLongestCode, one entry for each value of them.
  std::array<Entry, std::size_t{2} << kLongestCode> table_;
};

}  // namespace pysnap
