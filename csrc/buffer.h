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

// Gives back what make_buffer took: a mapping of `size` bytes that begins at `mapped`, before the
// buffer, or memory of the heap where `mapped` is null.
struct GiveBack {
  void* mapped = nullptr;
  std::size_t size = 0;
  void operator()(std::uint8_t* memory) const {
    if (mapped != nullptr) {
      ::munmap(mapped, size);
    } else {
      std::free(memory);
    }
  }
};
using Buffer = std::unique_ptr<std::uint8_t, GiveBack>;

// For make_buffer. Huge pages begin at multiples of their size; what is mapped before the first is
// never touched. Not of the heap, which would hand such pages to others later.
inline Buffer map_huge_pages(std::size_t room) {
  const std::size_t mapped = room + kHugePage;
  void* memory =
      ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  auto* start = static_cast<std::uint8_t*>(memory) + (round_up(address, kHugePage) - address);
  ::madvise(start, room, MADV_HUGEPAGE);
  return Buffer(start, GiveBack{memory, mapped});
}

// Uninitialised; room up to the next multiple of kPageSize. Where there is room for huge pages it
// is made of them if the system has any: a direct write of small pages, which lie anywhere in
// memory, is cut into many for the disk. Throws std::bad_alloc.
inline Buffer make_buffer(std::size_t size) {
  const std::size_t room = round_up(size == 0 ? 1 : size, kPageSize);
  if (room >= kHugePage) return map_huge_pages(room);
  void* memory = std::aligned_alloc(kPageSize, room);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<std::uint8_t*>(memory), GiveBack{});
}

}  // namespace pysnap
