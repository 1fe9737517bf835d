#include "copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pysnap {

namespace {

// Below this the set-up costs more than the saved reads.
constexpr std::size_t kStreamingMinimum = 4096;
constexpr std::size_t kLine = 64;
constexpr std::size_t kTurn = 1024;

std::size_t lead_to_line(std::uintptr_t address) { return (kLine - address % kLine) % kLine; }

#if defined(__x86_64__)

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

// Lines of the destination are written as wholes, past the caches; what is beside them is not.
void copy_past_caches(char* to, const char* from, std::size_t size, SimdPath path) {
  const std::size_t head = std::min(lead_to_line(reinterpret_cast<std::uintptr_t>(to)), size);
  std::memcpy(to, from, head);
  const std::size_t lines = (size - head) / kLine;
  copy_lines(to + head, from + head, lines, path);
  const std::size_t done = head + lines * kLine;
  std::memcpy(to + done, from + done, size - done);
}

// Streaming stores are weakly ordered; a mutex alone would not publish them.
void publish() { _mm_sfence(); }

#else

void copy_past_caches(char* to, const char* from, std::size_t size, SimdPath) {
  std::memcpy(to, from, size);
}

void publish() {}

#endif

}  // namespace

void stream_copy(void* destination, const void* source, std::size_t size, SimdPath path) noexcept {
  if (size < kStreamingMinimum) {
    if (size > 0) std::memcpy(destination, source, size);
    return;
  }
  copy_past_caches(static_cast<char*>(destination), static_cast<const char*>(source), size, path);
  publish();
}

void PendingCopies::add(void* destination, const void* source, std::size_t size) {
  copies_.push_back({static_cast<char*>(destination), static_cast<const char*>(source), size});
}

void PendingCopies::take_turn() noexcept {
  for (std::size_t done = 0; done < kTurn && next_ < copies_.size();) done += advance(kTurn - done);
}

void PendingCopies::finish() noexcept {
  while (next_ < copies_.size()) advance(copies_[next_].size);
  copies_.clear();
  next_ = 0;
  publish();
}

std::size_t PendingCopies::advance(std::size_t wanted) noexcept {
  Copy& copy = copies_[next_];
  // Up to the end of a line, which is written as a whole then.
  const std::size_t size = std::min(
      copy.size, wanted + lead_to_line(reinterpret_cast<std::uintptr_t>(copy.to) + wanted));
  copy_past_caches(copy.to, copy.from, size, path_);
  copy.to += size;
  copy.from += size;
  copy.size -= size;
  if (copy.size == 0) ++next_;
  return size;
}

}  // namespace pysnap
