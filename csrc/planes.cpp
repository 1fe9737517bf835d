#include "planes.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pysnap {

namespace {

// The loops below are written for the compiler's vectoriser and compiled once per instruction set:
// the bodies are inlined into functions that carry the target.
#define PYSNAP_INLINE inline __attribute__((always_inline))

// Elements that are split at a time, so that all their planes are taken while they are in a cache.
constexpr std::size_t kTile = 4096;
// So far ahead memory is asked for the next elements, in bytes: a CPU by itself asks too late.
constexpr std::size_t kAhead = 8192;

template <typename Word>
PYSNAP_INLINE Word load(const std::uint8_t* from) {
  Word word;
  std::memcpy(&word, from, sizeof(Word));
  return word;
}

// Byte of plane P of one element; of floats the sign goes to the top of plane 1, so that plane 0 is
// the eight bits below it.
template <typename Word, bool kFloat, std::size_t P>
PYSNAP_INLINE std::uint8_t plane_byte(Word word) {
  constexpr std::size_t kBits = 8 * sizeof(Word);
  if constexpr (kFloat && P == 0) return static_cast<std::uint8_t>(word >> (kBits - 9));
  if constexpr (kFloat && P == 1) {
    return static_cast<std::uint8_t>(((word >> (kBits - 8)) & 0x80) |
                                     ((word >> (kBits - 16)) & 0x7F));
  }
  return static_cast<std::uint8_t>(word >> (kBits - 8 * (P + 1)));
}

template <typename Word, bool kFloat, std::size_t P>
PYSNAP_INLINE Word place_byte(std::uint8_t byte) {
  constexpr std::size_t kBits = 8 * sizeof(Word);
  const Word word = byte;
  if constexpr (kFloat && P == 0) return static_cast<Word>(word << (kBits - 9));
  if constexpr (kFloat && P == 1) {
    return static_cast<Word>(static_cast<Word>((word & 0x80) << (kBits - 8)) |
                             static_cast<Word>((word & 0x7F) << (kBits - 16)));
  }
  return static_cast<Word>(word << (kBits - 8 * (P + 1)));
}

template <typename Word, bool kFloat, std::size_t P>
PYSNAP_INLINE void split_one(const std::uint8_t* __restrict raw, std::size_t count,
                             std::uint8_t* __restrict plane) {
  for (std::size_t i = 0; i < count; ++i)
    plane[i] = plane_byte<Word, kFloat, P>(load<Word>(raw + i * sizeof(Word)));
}

template <typename Word, bool kFloat, std::size_t... P>
PYSNAP_INLINE void merge_all(const std::uint8_t* const* planes, std::size_t count,
                             std::uint8_t* __restrict raw, std::index_sequence<P...>) {
  for (std::size_t i = 0; i < count; ++i) {
    const Word word = static_cast<Word>((place_byte<Word, kFloat, P>(planes[P][i]) | ...));
    std::memcpy(raw + i * sizeof(Word), &word, sizeof(Word));
  }
}

// Calls body(word type, is float) for the element.
template <typename Body>
PYSNAP_INLINE void for_element(Element element, Body body) {
  switch (element) {
    case Element::kU8:
      return body(std::uint8_t{}, std::false_type{});
    case Element::kI16:
      return body(std::uint16_t{}, std::false_type{});
    case Element::kI32:
      return body(std::uint32_t{}, std::false_type{});
    case Element::kI64:
      return body(std::uint64_t{}, std::false_type{});
    case Element::kF16:
      return body(std::uint16_t{}, std::true_type{});
    case Element::kF32:
      return body(std::uint32_t{}, std::true_type{});
    case Element::kF64:
      return body(std::uint64_t{}, std::true_type{});
  }
}

struct Split {
  const std::uint8_t* raw;
  std::size_t count;
  PlaneRange range;
  std::uint8_t* planes;
  std::size_t stride;

  template <typename Word, typename IsFloat>
  PYSNAP_INLINE void operator()(Word, IsFloat) const {
    for (std::size_t i = 0; i < count; i += kTile) {
      const Split tile{raw + i * sizeof(Word), std::min(kTile, count - i), range, planes + i,
                       stride};
      tile.all<Word, IsFloat::value>(std::make_index_sequence<sizeof(Word)>());
    }
  }

 private:
  template <typename Word, bool kFloat, std::size_t... P>
  PYSNAP_INLINE void all(std::index_sequence<P...>) const {
    (one<Word, kFloat, P>(), ...);
  }
  template <typename Word, bool kFloat, std::size_t P>
  PYSNAP_INLINE void one() const {
    if (P < range.first || P >= range.last) return;
    split_one<Word, kFloat, P>(raw, count, planes + (P - range.first) * stride);
  }
};

struct Merge {
  const std::uint8_t* const* planes;
  std::size_t count;
  std::uint8_t* raw;

  template <typename Word, typename IsFloat>
  PYSNAP_INLINE void operator()(Word, IsFloat) const {
    merge_all<Word, IsFloat::value>(planes, count, raw, std::make_index_sequence<sizeof(Word)>());
  }
};

template <typename Body>
void run_portable(Element element, Body body) {
  for_element(element, body);
}

#if defined(__x86_64__)
template <typename Body>
__attribute__((target("avx2"))) void run_avx2(Element element, Body body) {
  for_element(element, body);
}

#define PYSNAP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

template <typename Body>
PYSNAP_AVX512 void run_avx512(Element element, Body body) {
  for_element(element, body);
}

// GCC 12 takes the undefined operands inside its own intrinsics for mistakes of their callers.
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The bits of `yes` where those of `mask` are set, else those of `no`.
PYSNAP_AVX512 inline __m512i select(__m512i mask, __m512i yes, __m512i no) {
  return _mm512_ternarylogic_epi32(mask, yes, no, 0xCA);
}

// The bytes of 64 elements by their place, the most significant first.
PYSNAP_AVX512 inline void take_bytes(const std::uint8_t* raw, __m512i (&bytes)[2]) {
  // In each lane of 128 bits, 8 bytes of each place.
  const __m512i in_lane =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14));
  const __m512i a = _mm512_shuffle_epi8(_mm512_loadu_si512(raw), in_lane);
  const __m512i b = _mm512_shuffle_epi8(_mm512_loadu_si512(raw + 64), in_lane);
  bytes[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
  bytes[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
}

PYSNAP_AVX512 inline void take_bytes(const std::uint8_t* raw, __m512i (&bytes)[4]) {
  // First 4 bytes of each place in each lane, then a lane for each place.
  const __m512i in_lane =
      _mm512_broadcast_i32x4(_mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12));
  const __m512i to_lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i part[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i lanes = _mm512_shuffle_epi8(_mm512_loadu_si512(raw + 64 * i), in_lane);
    part[i] = _mm512_permutexvar_epi32(to_lane, lanes);
  }
  // The halves of two parts: their first two places, and their last.
  const __m512i a = _mm512_shuffle_i64x2(part[0], part[1], 0x44);
  const __m512i b = _mm512_shuffle_i64x2(part[0], part[1], 0xEE);
  const __m512i c = _mm512_shuffle_i64x2(part[2], part[3], 0x44);
  const __m512i d = _mm512_shuffle_i64x2(part[2], part[3], 0xEE);
  bytes[0] = _mm512_shuffle_i64x2(a, c, 0x88);
  bytes[1] = _mm512_shuffle_i64x2(a, c, 0xDD);
  bytes[2] = _mm512_shuffle_i64x2(b, d, 0x88);
  bytes[3] = _mm512_shuffle_i64x2(b, d, 0xDD);
}

// Splits all whole 64 elements, of W bytes; returns how many those are.
template <std::size_t W, bool kFloat>
PYSNAP_AVX512 std::size_t split_avx512(const Split& split) {
  // Copies, for the compiler must assume that a store into a plane changes `split`.
  const std::uint8_t* const raw = split.raw;
  const std::size_t count = split.count;
  std::uint8_t* planes[W];  // null for those that are not wanted
  for (std::size_t p = 0; p < W; ++p) {
    const bool is_wanted = p >= split.range.first && p < split.range.last;
    planes[p] = is_wanted ? split.planes + (p - split.range.first) * split.stride : nullptr;
  }
  std::size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const std::size_t ahead = std::min(i + kAhead / W, count - 64) * W;
    for (std::size_t line = 0; line < W; ++line) __builtin_prefetch(raw + ahead + 64 * line);
    __m512i bytes[W];
    take_bytes(raw + i * W, bytes);
    if constexpr (kFloat) {  // the sign goes to plane 1, which gives its top bit to plane 0
      const __m512i top = bytes[0];
      bytes[0] =
          select(_mm512_set1_epi8(1), _mm512_srli_epi16(bytes[1], 7), _mm512_add_epi8(top, top));
      bytes[1] = select(_mm512_set1_epi8(-128), top, bytes[1]);
    }
    for (std::size_t p = 0; p < W; ++p)
      if (planes[p] != nullptr) _mm512_storeu_si512(planes[p] + i, bytes[p]);
  }
  return i;
}

// The same for any element: none of 1 or 8 bytes.
std::size_t split_avx512(Element element, const Split& split) {
  switch (element) {
    case Element::kI16:
      return split_avx512<2, false>(split);
    case Element::kI32:
      return split_avx512<4, false>(split);
    case Element::kF16:
      return split_avx512<2, true>(split);
    case Element::kF32:
      return split_avx512<4, true>(split);
    default:
      return 0;
  }
}

#pragma GCC diagnostic pop
#endif

template <typename Body>
void run(Element element, Body body, SimdPath path) {
#if defined(__x86_64__)
  if (path == SimdPath::kAvx512) return run_avx512(element, body);
  if (path == SimdPath::kAvx2) return run_avx2(element, body);
#endif
  static_cast<void>(path);
  run_portable(element, body);
}

}  // namespace

void split_planes(Element element, const std::uint8_t* raw, std::size_t count, PlaneRange range,
                  std::uint8_t* planes, std::size_t stride, SimdPath path) {
  std::size_t done = 0;
#if defined(__x86_64__)
  if (path == SimdPath::kAvx512) done = split_avx512(element, {raw, count, range, planes, stride});
#endif
  run(element,
      Split{raw + done * element_width(element), count - done, range, planes + done, stride}, path);
}

void merge_planes(Element element, const std::uint8_t* const* planes, std::size_t count,
                  std::uint8_t* raw, SimdPath path) {
  run(element, Merge{planes, count, raw}, path);
}

}  // namespace pysnap
