#include "copy.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fixture.h"

namespace {

using fixture::Bytes;
using pysnap::SimdPath;
using pysnap::stream_copy;

constexpr std::size_t kLine = 64;
constexpr std::size_t kMargin = 64;
constexpr std::uint8_t kUntouched = 0xA5;

// Lines of 64 bytes, so that an offset into them is an alignment.
struct alignas(kLine) Line {
  std::uint8_t bytes[kLine];
};

class Memory {
 public:
  explicit Memory(std::size_t size) : lines_(size / kLine + 1) {}
  std::uint8_t* data() { return lines_.front().bytes; }

 private:
  std::vector<Line> lines_;
};

// Copies are compared with the source, and the bytes around them with what they were.
class Copier {
 public:
  explicit Copier(std::size_t largest)
      : source_(largest + kLine), destination_(largest + kLine + 2 * kMargin) {
    const Bytes bytes = fixture::random_bytes(largest + kLine, 1);
    std::copy(bytes.begin(), bytes.end(), source_.data());
  }

  bool copies(std::size_t size, std::size_t to_offset, std::size_t from_offset, SimdPath path) {
    std::uint8_t* before = destination_.data() + to_offset;
    std::uint8_t* to = before + kMargin;
    const std::uint8_t* from = source_.data() + from_offset;
    std::memset(before, kUntouched, size + 2 * kMargin);
    stream_copy(to, from, size, path);
    return std::equal(to, to + size, from) && std::count(before, to, kUntouched) == kMargin &&
           std::count(to + size, to + size + kMargin, kUntouched) == kMargin;
  }

 private:
  Memory source_;
  Memory destination_;
};

}  // namespace

TEST(copies_short_runs_at_every_alignment) {
  Copier copier(300);
  for (std::size_t size = 0; size <= 300; ++size) {
    for (std::size_t to = 0; to < 16; ++to) {
      for (const std::size_t from : {0U, 1U, 8U, 15U}) {
        CHECK(copier.copies(size, to, from, pysnap::best_simd_path()));
      }
    }
  }
}

TEST(copies_around_the_shortest_streamed_run_at_every_alignment) {
  Copier copier(4200);
  for (const SimdPath path : pysnap::supported_simd_paths()) {
    for (std::size_t size = 4090; size <= 4200; ++size) {
      for (std::size_t to = 0; to < kLine; ++to) {
        for (const std::size_t from : {0U, 1U, 32U}) CHECK(copier.copies(size, to, from, path));
      }
    }
  }
}

TEST(copies_a_long_run) {
  const std::size_t size = (std::size_t{8} << 20) + 77;
  Copier copier(size);
  for (const SimdPath path : pysnap::supported_simd_paths()) {
    CHECK(copier.copies(size, 0, 0, path));
    CHECK(copier.copies(size, 33, 5, path));
  }
}

TEST(no_bytes_need_no_address) { stream_copy(nullptr, nullptr, 0); }
