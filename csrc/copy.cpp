#include "copy.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pysnap {

namespace {

// Below this the set-up costs more than the saved reads.
constexpr std::size_t kStreamingMinimum = 4096;

#if defined(__x86_64__)

constexpr std::size_t kLine = 64;

__attribute__((target("avx512f"))) void copy_lines_avx512(char* destination, const char* source,
                                                          std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) {
    __m512i line = _mm512_loadu_si512(source + i * kLine);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + i * kLine), line);
  }
}

__attribute__((target("avx2"))) void copy_lines_avx2(char* destination, const char* source,
                                                     std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) {
    const __m256i* from = reinterpret_cast<const __m256i*>(source + i * kLine);
    __m256i* to = reinterpret_cast<__m256i*>(destination + i * kLine);
    __m256i low = _mm256_loadu_si256(from);
    __m256i high = _mm256_loadu_si256(from + 1);
    _mm256_stream_si256(to, low);
    _mm256_stream_si256(to + 1, high);
  }
}

void copy_lines_portable(char* destination, const char* source, std::size_t lines) {
  for (std::size_t i = 0; i < lines; ++i) {
    const __m128i* from = reinterpret_cast<const __m128i*>(source + i * kLine);
    __m128i* to = reinterpret_cast<__m128i*>(destination + i * kLine);
    for (int j = 0; j < 4; ++j) _mm_stream_si128(to + j, _mm_loadu_si128(from + j));
  }
}

void copy_lines(char* destination, const char* source, std::size_t lines, SimdPath path) {
  if (path == SimdPath::kAvx512) return copy_lines_avx512(destination, source, lines);
  if (path == SimdPath::kAvx2) return copy_lines_avx2(destination, source, lines);
  copy_lines_portable(destination, source, lines);
}

#endif

}  // namespace

void stream_copy(void* destination, const void* source, std::size_t size, SimdPath path) noexcept {
#if defined(__x86_64__)
  if (size >= kStreamingMinimum) {
    char* to = static_cast<char*>(destination);
    const char* from = static_cast<const char*>(source);
    std::size_t head = (kLine - reinterpret_cast<std::uintptr_t>(to) % kLine) % kLine;
    std::memcpy(to, from, head);
    std::size_t lines = (size - head) / kLine;
    copy_lines(to + head, from + head, lines, path);
    std::size_t done = head + lines * kLine;
    std::memcpy(to + done, from + done, size - done);
    // Streaming stores are weakly ordered; a mutex alone would not publish them.
    _mm_sfence();
    return;
  }
#endif
  static_cast<void>(path);
  if (size > 0) std::memcpy(destination, source, size);
}

}  // namespace pysnap
