// copy.h: copying into memory that will not be read again soon.
#pragma once

#include <cstddef>

#include "cpu.h"

namespace pysnap {

// memcpy with non-temporal stores for what is large, so that the destination is not read first and
// the training's caches stay warm. The bytes are visible to other threads after the usual
// synchronisation. `path` is one that this CPU runs.
void stream_copy(void* destination, const void* source, std::size_t size,
                 SimdPath path = best_simd_path()) noexcept;

}  // namespace pysnap
