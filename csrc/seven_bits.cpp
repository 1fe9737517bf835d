#include "seven_bits.h"

#include <algorithm>
#include <cstring>

namespace pysnap {

namespace {

constexpr std::uint64_t kTopBits = 0x8080808080808080;

// Eight bytes below 128 <-> the low 56 bits: pairs, fours and eights move together.
std::uint64_t close_gaps(std::uint64_t x) {
  x = (x & 0x007F007F007F007F) | (x & 0x7F007F007F007F00) >> 1;
  x = (x & 0x00003FFF00003FFF) | (x & 0x3FFF00003FFF0000) >> 2;
  return (x & 0x000000000FFFFFFF) | (x & 0x0FFFFFFF00000000) >> 4;
}

std::uint64_t open_gaps(std::uint64_t x) {
  x = (x & 0x000000000FFFFFFF) | (x & 0x00FFFFFFF0000000) << 4;
  x = (x & 0x00003FFF00003FFF) | (x & 0x0FFFC0000FFFC000) << 2;
  return (x & 0x007F007F007F007F) | (x & 0x3F803F803F803F80) << 1;
}

}  // namespace

bool pack_seven_bits(const std::uint8_t* bytes, std::size_t size, std::uint8_t* out) {
  std::uint64_t all = 0;
  std::size_t i = 0;
  // A whole word is written for 7 bytes; what follows overwrites the eighth.
  for (; i + 16 <= size; i += 8, out += 7) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, sizeof(word));
    all |= word;
    word = close_gaps(word);
    std::memcpy(out, &word, sizeof(word));
  }
  for (; i < size; i += 8, out += 7) {
    const std::size_t count = std::min<std::size_t>(8, size - i);
    std::uint64_t word = 0;
    std::memcpy(&word, bytes + i, count);
    all |= word;
    word = close_gaps(word);
    std::memcpy(out, &word, seven_bits_size(count));
  }
  return (all & kTopBits) == 0;
}

bool unpack_seven_bits(const std::uint8_t* packed, std::size_t size, std::uint8_t* bytes) {
  std::size_t i = 0;
  for (; i + 16 <= size; i += 8, packed += 7) {
    std::uint64_t word;
    std::memcpy(&word, packed, sizeof(word));
    word = open_gaps(word);
    std::memcpy(bytes + i, &word, sizeof(word));
  }
  for (; i < size; i += 8, packed += 7) {
    const std::size_t count = std::min<std::size_t>(8, size - i);
    std::uint64_t word = 0;
    std::memcpy(&word, packed, seven_bits_size(count));
    if (word >> 7 * count != 0) return false;
    word = open_gaps(word);
    std::memcpy(bytes + i, &word, count);
  }
  return true;
}

}  // namespace pysnap
