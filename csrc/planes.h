// planes.h: the byte-plane filter: elements <-> one plane per byte of the element. Pure functions,
// SIMD chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "cpu.h"

namespace pysnap {

// The planes from `first` to before `last`.
struct PlaneRange {
  std::size_t first;
  std::size_t last;
};

// The i-th byte of plane p goes to planes[(p - range.first) * stride + i]; `count` elements. `path`
// is one that this CPU runs.
void split_planes(Element element, const std::uint8_t* raw, std::size_t count, PlaneRange range,
                  std::uint8_t* planes, std::size_t stride, SimdPath path = best_simd_path());

// The inverse. planes[p] points to `count` bytes.
void merge_planes(Element element, const std::uint8_t* const* planes, std::size_t count,
                  std::uint8_t* raw, SimdPath path = best_simd_path());

}  // namespace pysnap
