// What this CPU can run. The binary carries every path of its architecture and picks one at run
// time, so it needs no -march flag and one build serves every machine.

#pragma once

#include <vector>

namespace pysnap {

// A set of vector instructions that the engine has code for.
enum class SimdPath {
  kPortable,  // plain C++; every CPU
  kAvx2,      // x86-64 with AVX2
  kAvx512,    // x86-64 with AVX-512 F, BW, DQ and VL (all servers that have AVX-512 at all)
  kNeon,      // 64-bit ARM, where NEON is part of the base instruction set
};

// Whether this binary has the path and this CPU and operating system can run it. Any thread.
bool cpu_runs(SimdPath path) noexcept;

// The paths for which cpu_runs() holds, from portable to best.
std::vector<SimdPath> supported_simd_paths();

// The last of supported_simd_paths().
SimdPath best_simd_path() noexcept;

// Whether a CPU with the path kAvx512 can also look bytes up in registers (VBMI: Ice Lake, Zen 4
// and later). Any thread.
bool cpu_has_vbmi() noexcept;

// "portable", "avx2", "avx512" or "neon".
const char* simd_path_name(SimdPath path) noexcept;

}  // namespace pysnap
