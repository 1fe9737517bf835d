// copy.h: copying into memory that will not be read again soon.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu.h"

namespace pysnap {

// memcpy with non-temporal stores for what is large, so that the destination is not read first and
// the training's caches stay warm. The bytes are visible to other threads after the usual
// synchronisation. `path` is one that this CPU runs.
void stream_copy(void* destination, const void* source, std::size_t size,
                 SimdPath path = best_simd_path()) noexcept;

// Streaming copies that are made a little at a time, in turns with other work of the same thread
// that waits for memory, too: the two wait together. What is left when it is destroyed is not
// copied.
class PendingCopies {
 public:
  explicit PendingCopies(SimdPath path = best_simd_path()) : path_(path) {}

  void add(void* destination, const void* source, std::size_t size);
  bool empty() const noexcept { return next_ == copies_.size(); }
  // Copies about a kilobyte, in the order of add().
  void take_turn() noexcept;
  // Copies the rest. Only now the bytes are visible, as those of stream_copy.
  void finish() noexcept;

 private:
  struct Copy {
    char* to;
    const char* from;
    std::size_t size;
  };

  // Copies `wanted` bytes of the first copy that is left, or up to a line more, or what it has.
  std::size_t advance(std::size_t wanted) noexcept;

  const SimdPath path_;
  std::vector<Copy> copies_;
  std::size_t next_ = 0;  // the first that is left
};

}  // namespace pysnap
