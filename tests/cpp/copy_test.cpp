#include "copy.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fixture.h"

namespace {

using fixture::Bytes;
using pysnap::PendingCopies;
using pysnap::SimdPath;
using pysnap::stream_copy;

constexpr std::size_t kLine = 64;
constexpr std::size_t kMargin = 64;
constexpr std::size_t kTurn = 1024;
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
  using Copy = std::function<void(void*, const void*, std::size_t, SimdPath)>;

  explicit Copier(std::size_t largest, Copy copy = stream_copy)
      : copy_(std::move(copy)),
        source_(largest + kLine),
        destination_(largest + kLine + 2 * kMargin) {
    const Bytes bytes = fixture::random_bytes(largest + kLine, 1);
    std::copy(bytes.begin(), bytes.end(), source_.data());
  }

  bool copies(std::size_t size, std::size_t to_offset, std::size_t from_offset, SimdPath path) {
    std::uint8_t* before = destination_.data() + to_offset;
    std::uint8_t* to = before + kMargin;
    const std::uint8_t* from = source_.data() + from_offset;
    std::memset(before, kUntouched, size + 2 * kMargin);
    copy_(to, from, size, path);
    return std::equal(to, to + size, from) && std::count(before, to, kUntouched) == kMargin &&
           std::count(to + size, to + size + kMargin, kUntouched) == kMargin;
  }

 private:
  Copy copy_;
  Memory source_;
  Memory destination_;
};

// In as many turns as it takes.
void copy_in_turns(void* to, const void* from, std::size_t size, SimdPath path) {
  PendingCopies copies(path);
  copies.add(to, from, size);
  for (std::size_t done = 0; done < size + kTurn; done += kTurn) copies.take_turn();
}

// The rest after some turns.
void copy_at_last(void* to, const void* from, std::size_t size, SimdPath path) {
  PendingCopies copies(path);
  copies.add(to, from, size);
  copies.take_turn();
  copies.finish();
}

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

TEST(pending_copies_copy_the_same_in_turns_and_at_last) {
  for (const auto& copy : {copy_in_turns, copy_at_last}) {
    Copier copier(4200, copy);
    for (const SimdPath path : pysnap::supported_simd_paths()) {
      for (const std::size_t size : {0U, 1U, 63U, 64U, 1000U, 1023U, 1024U, 1025U, 1100U, 4159U}) {
        for (std::size_t to = 0; to < kLine; ++to) {
          for (const std::size_t from : {0U, 1U, 32U}) CHECK(copier.copies(size, to, from, path));
        }
      }
    }
  }
}

TEST(a_turn_copies_about_a_kilobyte_in_the_order_of_the_copies) {
  const Bytes from(10 * kTurn, 1);
  Bytes to(from.size(), 0);
  const std::size_t sizes[] = {5, 300, 64, 3000, 1, 4000};
  PendingCopies copies;
  std::size_t added = 0;
  for (const std::size_t size : sizes) {
    copies.add(to.data() + added, from.data() + added, size);
    added += size;
  }
  std::size_t copied = 0;
  for (std::size_t turn = 1; copied < added; ++turn) {
    copies.take_turn();
    const auto end = std::find(to.begin(), to.end(), 0);
    const std::size_t now = static_cast<std::size_t>(end - to.begin());
    CHECK_EQ(std::count(end, to.end(), 0), to.end() - end);
    CHECK(now >= std::min(copied + kTurn, added) && now < copied + kTurn + kLine);
    copied = now;
  }
  CHECK_EQ(copied, added);
}

TEST(pending_copies_are_used_again_after_they_are_finished) {
  const Bytes from = fixture::random_bytes(5000, 1);
  PendingCopies copies;
  copies.finish();
  for (int i = 0; i < 2; ++i) {
    Bytes to(from.size(), 0);
    copies.add(to.data(), from.data(), to.size());
    copies.take_turn();
    copies.finish();
    CHECK(to == from);
    std::fill(to.begin(), to.end(), 0);
    copies.finish();
    CHECK_EQ(std::count(to.begin(), to.end(), 0), static_cast<std::ptrdiff_t>(to.size()));
  }
}

TEST(what_is_left_of_pending_copies_is_not_copied) {
  const Bytes from(4 * kTurn, 1);
  Bytes to(from.size(), 0);
  {
    PendingCopies copies;
    copies.add(to.data(), from.data(), to.size());
    copies.take_turn();
  }
  CHECK(std::count(to.begin(), to.end(), 1) < static_cast<std::ptrdiff_t>(kTurn + kLine));
}
