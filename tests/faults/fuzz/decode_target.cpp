// The decoder of chunks, given any bytes at all, with no digest before or behind it.
//
// An input is the element (1 byte), the raw length (4 bytes, little endian; both are taken modulo
// what is allowed), and the encoded bytes. Whatever the encodings are that the decoder knows, they
// are tried. By libFuzzer's convention, so that either it or driver.cpp calls it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "codec.h"

namespace {

constexpr std::size_t kHeader = 5;
constexpr std::size_t kLargest = std::size_t{3} << 20;  // three blocks

#ifdef PYSNAP_FUZZ_PLANTED_BUG
// What a decoder must not do: believe how many bytes a block keeps. The harness has to find it.
void planted(const std::uint8_t* encoded, std::size_t stored, std::uint8_t* raw, std::size_t size) {
  if (stored < 8 || encoded[0] != 1) return;
  std::uint32_t kept;
  std::memcpy(&kept, encoded + 4, sizeof(kept));
  if (kept > size && kept < size + 4096) raw[kept - 1] = encoded[stored - 1];
}
#endif

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t length) {
  static const std::shared_ptr<const pysnap::Zstd> zstd = pysnap::Zstd::open({"libzstd.so.1"});
  static pysnap::PlanesDecoder decoder(zstd);
  if (zstd == nullptr) std::abort();
  if (length < kHeader) return 0;
  const auto element = static_cast<pysnap::Element>(data[0] % pysnap::kElementCount);
  std::uint32_t asked;
  std::memcpy(&asked, data + 1, sizeof(asked));
  const std::size_t width = pysnap::element_width(element);
  const std::size_t size = asked % kLargest / width * width;
  // Memory of exactly these lengths, so that a byte too far is seen.
  const std::size_t stored = length - kHeader;
  const std::unique_ptr<std::uint8_t[]> encoded(new std::uint8_t[stored]);
  const std::unique_ptr<std::uint8_t[]> raw(new std::uint8_t[size]);
  std::copy_n(data + kHeader, stored, encoded.get());
#ifdef PYSNAP_FUZZ_PLANTED_BUG
  planted(encoded.get(), stored, raw.get(), size);
#endif
  if (!decoder.decode(element, encoded.get(), stored, raw.get(), size)) return 0;
  // What was accepted is every byte, and the same bytes whatever the memory held before.
  const std::unique_ptr<std::uint8_t[]> again(new std::uint8_t[size]);
  std::fill_n(again.get(), size, std::uint8_t{0xa5});
  if (!decoder.decode(element, encoded.get(), stored, again.get(), size)) std::abort();
  if (!std::equal(raw.get(), raw.get() + size, again.get())) std::abort();
  return 0;
}
