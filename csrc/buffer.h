// buffer.h: page-aligned memory, as direct I/O needs it.
#pragma once

#include <sys/mman.h>

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

// Uninitialised; room up to the next multiple of kPageSize. Where it has room for huge pages it
// asks for them: a direct write of small pages, which lie anywhere in memory, is cut into many for
// the disk. Throws std::bad_alloc.
inline Buffer make_buffer(std::size_t size) {
  const std::size_t alignment = size < kHugePage ? kPageSize : kHugePage;
  const std::size_t room = round_up(size == 0 ? 1 : size, alignment);
  void* memory = std::aligned_alloc(alignment, room);
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) ::madvise(memory, room, MADV_HUGEPAGE);
  return Buffer(static_cast<std::uint8_t*>(memory));
}

}  // namespace pysnap
