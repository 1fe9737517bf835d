// seven_bits.h: bytes below 128, seven bits each, as the method `seven bits` of docs/format.md
// section 4. Pure functions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pysnap {

constexpr std::size_t seven_bits_size(std::size_t size) { return (7 * size + 7) / 8; }

// Writes seven_bits_size(size) bytes to `out`. False where a byte is 128 or more; `out` then holds
// rubbish.
bool pack_seven_bits(const std::uint8_t* bytes, std::size_t size, std::uint8_t* out);

// The inverse. False unless the bits behind the last byte are zero.
bool unpack_seven_bits(const std::uint8_t* packed, std::size_t size, std::uint8_t* bytes);

}  // namespace pysnap
