// ahead.h: many objects that lie all over the memory, looked at one after the other without waiting
// for the memory each time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pysnap {

// Where the content of an object is: a guess, for it goes to the processor's prefetch alone, which
// does no harm where there is no memory.
using Content = std::uintptr_t (*)(void* object);

// Called before objects[at] is looked at, for one after the other. Prefetches the content of an
// object behind it, and one still further behind, so that its content can be found in time.
// Always inlined: GCC drops calls of a function that does nothing but prefetch.
[[gnu::always_inline]] inline void look_ahead(void* const* objects, std::size_t count,
                                              std::size_t at, Content content) {
  constexpr std::size_t kAhead = 8;
  constexpr std::uintptr_t kLine = 64, kLines = 4;
  if (at + 2 * kAhead < count) __builtin_prefetch(objects[at + 2 * kAhead]);
  if (at + kAhead < count) {
    const std::uintptr_t address = content(objects[at + kAhead]);
    for (std::uintptr_t line = 0; line < kLines; ++line)
      __builtin_prefetch(reinterpret_cast<const void*>(address + line * kLine));
  }
}

}  // namespace pysnap
