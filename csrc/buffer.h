// buffer.h: page-aligned heap memory, as direct I/O needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "file.h"

namespace pysnap {

struct Free {
  void operator()(std::uint8_t* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<std::uint8_t, Free>;

// Uninitialised; room up to the next multiple of kPageSize. Throws std::bad_alloc.
inline Buffer make_buffer(std::size_t size) {
  void* memory = std::aligned_alloc(kPageSize, round_up(size == 0 ? 1 : size, kPageSize));
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<std::uint8_t*>(memory));
}

}  // namespace pysnap
