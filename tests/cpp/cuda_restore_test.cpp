// Restores to devices.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "cuda_fixture.h"
#include "digest.h"
#include "pack.h"
#include "restore.h"

namespace {

using fixture::Bytes;
using fixture::DeviceState;
using fixture::fake;
using fixture::HealthyDriver;
using fixture::mixed_sizes;
using fixture::thrown_by;
using pysnap::DeviceIndex;
using pysnap::kHost;
using pysnap::StoredChunk;

constexpr std::size_t kChunk = 16 * 1024;
const std::vector<std::vector<DeviceIndex>> kPlaces{{0}, {1, 0}, {0, kHost, 1}};

// A pack of raw chunks that holds the stream of a state, whose tensors are then zeroed.
class Snapshot {
 public:
  explicit Snapshot(const std::vector<DeviceIndex>& devices, bool default_streams = false,
                    const std::vector<std::size_t>& sizes = mixed_sizes(),
                    std::size_t chunk_size = kChunk)
      : state(sizes, devices, default_streams) {
    pysnap::PackWriter writer(directory_ / "0.pack", 0, false);
    for (std::size_t at = 0; at < state.stream().size(); at += chunk_size) {
      const std::size_t size = std::min(chunk_size, state.stream().size() - at);
      const pysnap::Buffer buffer = pysnap::make_buffer(size);
      std::copy_n(state.stream().begin() + static_cast<std::ptrdiff_t>(at), size, buffer.get());
      const auto raw = static_cast<std::uint32_t>(size);
      chunks.push_back({0, raw, raw, pysnap::Element::kU8, pysnap::Encoding::kRaw,
                        writer.append(buffer.get(), size), pysnap::xxh3_128(buffer.get(), size)});
    }
    size_ = writer.finish();
    state.fill(0);
    if (devices != std::vector<DeviceIndex>{kHost}) fake().finish();
  }

  std::string path() const { return directory_ / "0.pack"; }

  bool restore(unsigned threads = 3, const pysnap::Interrupted& interrupted = nullptr,
               const std::shared_ptr<pysnap::Staging>& staging = nullptr) const {
    return pysnap::restore({{path(), size_}}, chunks, state.targets(), threads, nullptr,
                           state.streams(), staging, interrupted);
  }

  DeviceState state;
  std::vector<StoredChunk> chunks;

 private:
  const fixture::TemporaryDirectory directory_;
  std::uint64_t size_;
};

// A restore that is interrupted at that poll, while the devices are held: it polls no more, but its
// slots are in use until the copies have ended.
void check_interrupted_at(int poll, const Snapshot& snapshot, unsigned threads) {
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  std::atomic<int> polls{0};
  std::future<bool> restored = std::async(std::launch::async, [&] {
    return snapshot.restore(threads, [&] { return ++polls == poll; });
  });
  CHECK(restored.wait_for(std::chrono::seconds(1)) == std::future_status::timeout);
  CHECK_EQ(polls.load(), poll);
  fake().release();
  CHECK(!restored.get());
}

}  // namespace

// Without waiting for anything, the tensors are whole when restore returns.
TEST(devices_are_whole_when_restore_returns) {
  const HealthyDriver driver;
  for (const FakeCuda::Late late : {FakeCuda::kNothing, FakeCuda::kCopies}) {
    for (const unsigned threads : {1U, 3U}) {
      for (const std::vector<DeviceIndex>& devices : kPlaces) {
        const Snapshot snapshot(devices, threads == 1);
        fake().set_late(late);
        CHECK(snapshot.restore(threads));
        CHECK(snapshot.state.now() == snapshot.state.stream());
        fake().set_late(FakeCuda::kNothing);
      }
    }
  }
  CHECK_EQ(fake().pageable_copies(), 0);
  // Each chunk has an event of its own.
  CHECK_EQ(fake().calls("cuStreamQuery"), 0);
}

TEST(what_was_queued_before_restore_comes_before_it) {
  const HealthyDriver driver;
  Snapshot snapshot({0, 1});
  fake().set_late(FakeCuda::kKernels);
  fake().hold(-1);
  snapshot.state.fill(0xDD);
  std::future<bool> restored = std::async(std::launch::async, [&] { return snapshot.restore(); });
  CHECK(restored.wait_for(std::chrono::milliseconds(300)) == std::future_status::timeout);
  fake().release();
  CHECK(restored.get());
  fake().finish();
  CHECK(snapshot.state.now() == snapshot.state.stream());
}

TEST(memory_that_cannot_be_pinned_serves_all_the_same) {
  const HealthyDriver driver;
  const Snapshot snapshot({0, 1});
  fake().set_late(FakeCuda::kCopies);
  fake().fail_call("cuMemHostRegister_v2", 1, 2);
  CHECK(snapshot.restore());
  CHECK(fake().pageable_copies() > 0);
  CHECK(snapshot.state.now() == snapshot.state.stream());
}

// Of an engine: its memory is registered, and its devices are open.
TEST(staging_memory_that_is_there_is_used) {
  const HealthyDriver driver;
  const Snapshot snapshot({0, 1});
  const auto staging = std::make_shared<pysnap::Staging>(kChunk, 6);
  staging->slots().reserve(6);
  staging->device(0);
  staging->device(1);
  staging->slots().wait_reserved();
  const unsigned registered = fake().calls("cuMemHostRegister_v2");
  const unsigned retained = fake().calls("cuDevicePrimaryCtxRetain");
  CHECK(registered > 0);
  CHECK(snapshot.restore(3, nullptr, staging));
  CHECK(snapshot.state.now() == snapshot.state.stream());
  CHECK_EQ(fake().calls("cuMemHostRegister_v2"), registered);
  CHECK_EQ(fake().calls("cuDevicePrimaryCtxRetain"), retained);
}

// The others would have to come into the processor's caches, and bytes would go to memory.
TEST(few_of_many_slots_are_used) {
  const HealthyDriver driver;
  for (const FakeCuda::Late late : {FakeCuda::kNothing, FakeCuda::kCopies}) {
    const Snapshot snapshot({0, 1});
    const auto staging = std::make_shared<pysnap::Staging>(kChunk, 64);
    staging->slots().reserve(64);
    staging->slots().wait_reserved();
    const auto all_slots = [&] {
      std::vector<pysnap::Slot> slots;
      while (std::optional<pysnap::Slot> slot = staging->slots().try_acquire())
        slots.push_back(std::move(*slot));
      CHECK_EQ(slots.size(), 64);
      return slots;
    };
    const Bytes unused(kChunk, 0xEE);
    for (const pysnap::Slot& slot : all_slots())
      std::copy(unused.begin(), unused.end(), slot.data());
    fake().set_late(late);
    CHECK(snapshot.restore(2, nullptr, staging));
    fake().set_late(FakeCuda::kNothing);
    const std::vector<pysnap::Slot> slots = all_slots();
    const auto used = std::count_if(slots.begin(), slots.end(), [&](const pysnap::Slot& slot) {
      return !std::equal(unused.begin(), unused.end(), slot.data());
    });
    CHECK(used > 0 && used <= 4);
  }
}

// One thread stops behind its first chunk, until another has put all the rest through its slot.
TEST(a_slot_is_on_the_host_before_others_have_it) {
  const HealthyDriver driver;
  // Each chunk has tensors in all places.
  Snapshot snapshot({0, kHost, 1}, false, std::vector<std::size_t>(4000, 40));
  CHECK(snapshot.restore(1));
  const unsigned records = fake().calls("cuEventRecord");
  // Where the other thread is so fast that there is no second chunk, nothing was shown.
  for (int polls = 0; polls < 2;) {
    snapshot.state.fill(0);
    fake().finish();
    const unsigned before = fake().calls("cuEventRecord");
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    polls = 0;
    CHECK(snapshot.restore(2, [&] {
      // The second chunk, which the others lack, has two events at most.
      const auto waits = [&] { return fake().calls("cuEventRecord") + 2 < before + records; };
      if (++polls == 2) {
        while (waits() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      }
      return false;
    }));
    CHECK(std::chrono::steady_clock::now() < deadline);
    CHECK(snapshot.state.now() == snapshot.state.stream());
  }
}

TEST(staging_memory_that_is_too_small_is_not_used) {
  const HealthyDriver driver;
  const Snapshot snapshot({0, 1});
  for (const std::size_t slot : {kChunk / 2, kChunk}) {
    const auto staging = std::make_shared<pysnap::Staging>(slot, 5);
    CHECK(snapshot.restore(3, nullptr, staging));
    CHECK(snapshot.state.now() == snapshot.state.stream());
    CHECK(!staging->slots().try_acquire());
  }
}

TEST(a_damaged_chunk_does_not_reach_a_device) {
  const HealthyDriver driver;
  Snapshot snapshot({0, 1});
  Bytes file = fixture::read_file(snapshot.path());
  const std::size_t damaged = 5;
  file[snapshot.chunks[damaged].offset] ^= 1;
  fixture::write_file(snapshot.path(), file);
  CHECK_EQ(thrown_by([&] { snapshot.restore(1); }), "corrupt");
  fake().finish();
  const Bytes now = snapshot.state.now();
  const auto start = static_cast<std::ptrdiff_t>(damaged * kChunk);
  CHECK(Bytes(now.begin(), now.begin() + start) ==
        Bytes(snapshot.state.stream().begin(), snapshot.state.stream().begin() + start));
  CHECK(Bytes(now.begin() + start, now.begin() + start + kChunk) == Bytes(kChunk));
}

// What is read of a chunk is digested before the rest comes.
TEST(a_chunk_that_is_read_in_pieces_is_checked_to_its_end) {
  const HealthyDriver driver;
  Snapshot snapshot({0}, false, {1'300'000, 77}, std::size_t{2} << 20);
  CHECK_EQ(snapshot.chunks.size(), 1);
  CHECK(snapshot.restore());
  CHECK(snapshot.state.now() == snapshot.state.stream());
  const Bytes whole = fixture::read_file(snapshot.path());
  for (const std::size_t at : {std::size_t{5}, std::size_t{600'000}, std::size_t{1'300'076}}) {
    Bytes file = whole;
    file[snapshot.chunks[0].offset + at] ^= 1;
    fixture::write_file(snapshot.path(), file);
    CHECK_EQ(thrown_by([&] { snapshot.restore(); }), "corrupt");
  }
}

TEST(a_device_without_a_stream_is_refused) {
  const HealthyDriver driver;
  const Snapshot snapshot({0, 1});
  CHECK_EQ(thrown_by([&] {
             pysnap::restore({{snapshot.path(), 0}}, snapshot.chunks, snapshot.state.targets(), 1,
                             nullptr, {{1, 0}}, nullptr, nullptr);
           }),
           "invalid");
}

TEST(nothing_is_copied_after_a_failure) {
  const HealthyDriver driver;
  Snapshot snapshot({0, 1});
  Bytes file = fixture::read_file(snapshot.path());
  file[snapshot.chunks[5].offset] ^= 1;
  fixture::write_file(snapshot.path(), file);
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  std::future<std::string> outcome =
      std::async(std::launch::async, [&] { return thrown_by([&] { snapshot.restore(); }); });
  CHECK(outcome.wait_for(std::chrono::milliseconds(300)) == std::future_status::timeout);
  fake().release();
  CHECK_EQ(outcome.get(), "corrupt");
  snapshot.state.free();
}

TEST(a_device_that_is_lost_is_an_error) {
  for (const unsigned nth : {1U, 3U, 15U}) {
    const HealthyDriver driver;
    const Snapshot snapshot({0, 1});
    fake().set_late(FakeCuda::kCopies);
    fake().fail_copy(nth);
    CHECK_EQ(thrown_by([&] { snapshot.restore(); }), "device");
  }
}

// One device copies its part of a chunk when the other refuses; which one is chance.
TEST(a_refusal_waits_for_the_copies_under_way) {
  const HealthyDriver driver;
  const Snapshot snapshot({0, 1});
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  fake().fail_call("cuMemcpyHtoDAsync_v2", 2, 2);
  std::future<std::string> outcome =
      std::async(std::launch::async, [&] { return thrown_by([&] { snapshot.restore(1); }); });
  CHECK(outcome.wait_for(std::chrono::milliseconds(300)) == std::future_status::timeout);
  fake().release();
  CHECK_EQ(outcome.get(), "device");
}

// All calls of the driver have succeeded then: only a fence can tell.
TEST(a_device_that_is_lost_during_the_last_copy_is_an_error) {
  const HealthyDriver driver;
  const Snapshot snapshot({0});
  CHECK(snapshot.restore());
  fake().set_late(FakeCuda::kCopies);
  // The first launch is a trial, and copies nothing.
  fake().fail_copy(fake().calls("cuMemcpyHtoDAsync_v2") + fake().calls("cuLaunchKernel") - 1);
  CHECK_EQ(thrown_by([&] { snapshot.restore(); }), "device");
}

TEST(a_call_that_is_refused_never_makes_a_wrong_restore) {
  for (const char* function :
       {"cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuStreamCreate",
        "cuStreamQuery", "cuStreamWaitEvent", "cuEventCreate", "cuEventRecord", "cuEventQuery",
        "cuMemAlloc_v2", "cuMemHostRegister_v2", "cuMemcpyHtoDAsync_v2", "cuModuleLoadData",
        "cuModuleGetFunction", "cuLaunchKernel", "cuStreamIsCapturing"}) {
    for (const unsigned nth : {1U, 2U, 3U, 6U, 14U}) {
      const HealthyDriver driver;
      const Snapshot snapshot({0, 1});
      fake().set_late(FakeCuda::kCopies);
      fake().fail_call(function, nth, 999);
      const std::string outcome = thrown_by([&] {
        CHECK(snapshot.restore());
        CHECK(snapshot.state.now() == snapshot.state.stream());
      });
      if (outcome != "nothing" && outcome != "device" && outcome != "invalid") {
        check::fail(__FILE__, __LINE__,
                    std::string(function) + " refused: the failure is " + outcome);
      }
    }
  }
}

TEST(a_wait_for_a_device_can_be_interrupted) {
  const HealthyDriver driver;
  check_interrupted_at(3, Snapshot({0, 1}), 2);
}

TEST(an_interrupted_wait_for_the_only_copy_leaves_it_its_slot) {
  const HealthyDriver driver;
  check_interrupted_at(2, Snapshot({0}, false, {kChunk}), 1);
}
