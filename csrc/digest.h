// The digest of a chunk: XXH3-128 of its raw bytes, with seed 0 and the default secret, as the
// xxHash specification defines it (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). It finds damage
// and tells equal chunks; it does not resist someone who forges data on purpose.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu.h"

namespace pysnap {

struct Digest {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};

inline bool operator==(const Digest& a, const Digest& b) noexcept {
  return a.low == b.low && a.high == b.high;
}
inline bool operator!=(const Digest& a, const Digest& b) noexcept { return !(a == b); }

// The digest of `size` bytes at `data`, which needs no alignment and may be null if `size` is 0.
// Reads memory and nothing else; any number of threads may call it at once.
Digest xxh3_128(const void* data, std::size_t size) noexcept;

// The same value, computed on one path: for tests and benchmarks. A path that this CPU cannot run
// is replaced by the portable one.
Digest xxh3_128(const void* data, std::size_t size, SimdPath path) noexcept;

// The same of bytes that come little by little, in order, and lie side by side: what has just come
// is still in the processor's caches when it is digested.
class GrowingDigest {
 public:
  // Of `size` bytes at `data`, of which none need be there.
  GrowingDigest(const void* data, std::size_t size) noexcept;
  GrowingDigest(const void* data, std::size_t size, SimdPath path) noexcept;

  // The first `size` bytes are there, or all if it is more, and stay as they are until finish().
  void advance(std::size_t size) noexcept;
  // All are there.
  Digest finish() noexcept;

 private:
  using Rounds = void (*)(std::uint64_t* lanes, const std::uint8_t* input, std::size_t blocks);

  GrowingDigest(const void* data, std::size_t size, Rounds rounds) noexcept;

  const std::uint8_t* const data_;
  const std::size_t size_;
  const Rounds rounds_;
  std::array<std::uint64_t, 8> lanes_;
  std::size_t blocks_ = 0;  // that have been digested
};

// The canonical form of the specification: 32 lowercase hex digits, high half first.
std::string to_hex(const Digest& digest);

}  // namespace pysnap
