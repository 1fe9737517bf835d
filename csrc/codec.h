// codec.h: how the bytes of one chunk are encoded; docs/format.md section 4 is the specification.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "huffman.h"
#include "zstd.h"

namespace pysnap {

// Persisted by name in manifests; the numbers cross the Python boundary only.
enum class Element : std::uint8_t {
  kU8 = 0,
  kI16 = 1,
  kI32 = 2,
  kI64 = 3,
  kF16 = 4,
  kF32 = 5,
  kF64 = 6
};
constexpr std::uint8_t kElementCount = 7;
enum class Encoding : std::uint8_t { kRaw = 0, kPlanes = 1 };

std::size_t element_width(Element element);

// What an encoder spends: `kFast` chooses the method of each plane by a sample, `kSmall` tries all
// of them and takes twenty times as long.
enum class Effort { kFast, kSmall };

// One thread's encoder: owns its scratch memory (3 MiB) and compressors.
class PlanesEncoder {
 public:
  // Without zstd, only the methods that need none are used.
  explicit PlanesEncoder(std::shared_ptr<const Zstd> zstd, Effort effort = Effort::kFast);

  // Encodes `size` bytes, a multiple of the element's width, into `out`, which holds `size` bytes.
  // Returns the encoded length, or 0 where it would not be smaller than `size`: such a chunk is
  // stored raw.
  std::size_t encode(Element element, const std::uint8_t* raw, std::size_t size, std::uint8_t* out);

 private:
  class Output;
  struct Block {
    Element element;
    const std::uint8_t* raw;
    std::size_t count;  // elements
    Upcoming next;      // the block behind it
  };
  using Methods = std::array<std::uint8_t, 8>;  // of the planes
  // What a sample of a block says: whether lines of zeros are left out, else the methods.
  struct Outlook {
    bool with_map;
    Methods methods;
    bool is_good() const;  // whether the block promises to become smaller
  };
  Outlook look_at(const Block& block) const;
  Methods choose(const Block& block) const;
  std::uint8_t choose(Element element, const std::uint8_t* sample, std::size_t size) const;
  bool encode_block(Block block, const Outlook& outlook, Output& out);
  bool encode_plane(const Block& block, std::size_t p, std::uint8_t method, Output& out,
                    std::size_t entry);
  std::uint8_t encode_plane(std::uint8_t method, const std::uint8_t* plane, std::size_t size,
                            Upcoming upcoming, Output& out);
  std::uint8_t encode_smallest(const std::uint8_t* plane, std::size_t size, Output& out);

  const Effort effort_;
  HuffmanEncoder huffman_;
  std::optional<ZstdCompressor> entropy_, matches_, thorough_;
  std::vector<std::uint8_t> kept_;
  std::vector<std::uint8_t> plane_;
  std::vector<std::uint8_t> trial_;
};

// One thread's decoder. Trusts nothing: every length is checked against what is left.
class PlanesDecoder {
 public:
  // Without zstd, chunks that need it are refused with Error(kInvalid).
  explicit PlanesDecoder(std::shared_ptr<const Zstd> zstd);

  // False unless the `stored` bytes are a valid encoding of exactly `size` raw bytes; then `raw`
  // holds rubbish.
  bool decode(Element element, const std::uint8_t* encoded, std::size_t stored, std::uint8_t* raw,
              std::size_t size);

 private:
  class Input;
  bool decode_block(Element element, Input& in, std::uint8_t* raw, std::size_t size);
  const std::uint8_t* decode_plane(std::uint8_t method, const std::uint8_t* payload,
                                   std::size_t payload_size, std::uint8_t* scratch,
                                   std::size_t size);

  std::optional<ZstdDecompressor> zstd_;
  HuffmanDecoder huffman_;
  std::vector<std::uint8_t> kept_;
  std::vector<std::uint8_t> planes_;
};

}  // namespace pysnap
