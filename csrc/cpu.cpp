#include "cpu.h"

namespace pysnap {
namespace {

constexpr SimdPath kFromPortableToBest[] = {SimdPath::kPortable, SimdPath::kAvx2, SimdPath::kAvx512,
                                            SimdPath::kNeon};

}  // namespace

bool cpu_runs(SimdPath path) noexcept {
  switch (path) {
    case SimdPath::kPortable:
      return true;
    case SimdPath::kAvx2:
#if defined(__x86_64__)
      return __builtin_cpu_supports("avx2");
#else
      return false;
#endif
    case SimdPath::kAvx512:
#if defined(__x86_64__)
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
    case SimdPath::kNeon:
#if defined(__aarch64__)
      return true;
#else
      return false;
#endif
  }
  return false;
}

std::vector<SimdPath> supported_simd_paths() {
  std::vector<SimdPath> paths;
  for (const SimdPath path : kFromPortableToBest) {
    if (cpu_runs(path)) paths.push_back(path);
  }
  return paths;
}

SimdPath best_simd_path() noexcept {
  SimdPath best = SimdPath::kPortable;
  for (const SimdPath path : kFromPortableToBest) {
    if (cpu_runs(path)) best = path;
  }
  return best;
}

bool cpu_has_vbmi() noexcept {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

const char* simd_path_name(SimdPath path) noexcept {
  switch (path) {
    case SimdPath::kPortable:
      return "portable";
    case SimdPath::kAvx2:
      return "avx2";
    case SimdPath::kAvx512:
      return "avx512";
    case SimdPath::kNeon:
      return "neon";
  }
  return "unknown";
}

}  // namespace pysnap
