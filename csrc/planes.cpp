#include "planes.h"

#include <cstring>
#include <type_traits>
#include <utility>

namespace pysnap {

namespace {

// The loops below are written for the compiler's vectoriser and compiled once per instruction set:
// the bodies are inlined into functions that carry the target.
#define PYSNAP_INLINE inline __attribute__((always_inline))

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
PYSNAP_INLINE void split_all(const std::uint8_t* raw, std::size_t count, std::uint8_t* planes,
                             std::size_t stride, std::index_sequence<P...>) {
  (split_one<Word, kFloat, P>(raw, count, planes + P * stride), ...);
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
  std::uint8_t* planes;
  std::size_t stride;

  template <typename Word, typename IsFloat>
  PYSNAP_INLINE void operator()(Word, IsFloat) const {
    split_all<Word, IsFloat::value>(raw, count, planes, stride,
                                    std::make_index_sequence<sizeof(Word)>());
  }
};

struct SplitOne {
  const std::uint8_t* raw;
  std::size_t count;
  std::size_t p;
  std::uint8_t* plane;

  template <typename Word, typename IsFloat>
  PYSNAP_INLINE void operator()(Word, IsFloat) const {
    split_if<Word, IsFloat::value>(std::make_index_sequence<sizeof(Word)>());
  }

 private:
  template <typename Word, bool kFloat, std::size_t... P>
  PYSNAP_INLINE void split_if(std::index_sequence<P...>) const {
    ((p == P ? split_one<Word, kFloat, P>(raw, count, plane) : void()), ...);
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

template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512vl"))) void run_avx512(Element element, Body body) {
  for_element(element, body);
}
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

void split_planes(Element element, const std::uint8_t* raw, std::size_t count, std::uint8_t* planes,
                  std::size_t stride, SimdPath path) {
  run(element, Split{raw, count, planes, stride}, path);
}

void split_plane(Element element, const std::uint8_t* raw, std::size_t count, std::size_t p,
                 std::uint8_t* plane, SimdPath path) {
  run(element, SplitOne{raw, count, p, plane}, path);
}

void merge_planes(Element element, const std::uint8_t* const* planes, std::size_t count,
                  std::uint8_t* raw, SimdPath path) {
  run(element, Merge{planes, count, raw}, path);
}

}  // namespace pysnap
