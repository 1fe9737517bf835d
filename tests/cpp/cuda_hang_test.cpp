// Devices whose copies never end. What they might still write to is kept for ever, so this leaves
// something behind, and is a program of its own.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "cuda_fixture.h"
#include "digest.h"
#include "engine.h"
#include "pack.h"
#include "restore.h"
#include "staging.h"

namespace {

using fixture::DeviceState;
using fixture::fake;
using pysnap::Engine;
using pysnap::EngineOptions;
using pysnap::Job;

constexpr std::size_t kChunk = 16 * 1024;
constexpr std::size_t kChunks = 2;
constexpr std::chrono::milliseconds kTimeout{50};

// As many chunks of a device as one thread of a restore takes slots.
class Snapshot {
 public:
  Snapshot() : state_(std::vector<std::size_t>(kChunks, kChunk), {0}) {
    pysnap::PackWriter writer(directory_ / "0.pack", 0, false);
    const pysnap::Buffer buffer = pysnap::make_buffer(kChunk);
    std::fill_n(buffer.get(), kChunk, 1);
    for (std::size_t i = 0; i < kChunks; ++i) {
      chunks_.push_back({0, kChunk, kChunk, pysnap::Element::kU8, pysnap::Encoding::kRaw,
                         writer.append(buffer.get(), kChunk),
                         pysnap::xxh3_128(buffer.get(), kChunk)});
    }
    size_ = writer.finish();
  }

  // False if that poll interrupted it.
  bool restore_for(int polls, const std::shared_ptr<pysnap::Staging>& staging) const {
    int polled = 0;
    return pysnap::restore(
        {{directory_ / "0.pack", size_}}, chunks_, state_.targets(), 1, nullptr, state_.streams(),
        staging, [&] { return ++polled == polls; }, kTimeout);
  }

 private:
  const fixture::TemporaryDirectory directory_;
  const DeviceState state_;
  std::vector<pysnap::StoredChunk> chunks_;
  std::uint64_t size_ = 0;
};

// The device comes back to life at last: were the memory gone, its copies would fault.
class HangingDevice {
 public:
  HangingDevice() {
    fake().set_late(FakeCuda::kCopies);
    fake().hold(-1);
  }
  ~HangingDevice() {
    CHECK(fake().registered() > 0);
    fake().release();
    fake().finish();
    CHECK_EQ(fake().violation(), "");
  }
};

}  // namespace

TEST(close_does_not_wait_for_ever) {
  // Short ones, which go through memory of the devices.
  const DeviceState state(std::vector<std::size_t>(40, kChunk / 4), {0, 0, 1, 1});
  const HangingDevice device;
  EngineOptions options;
  options.chunk_size = kChunk;
  options.slots = 64;
  options.device_timeout = kTimeout;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const std::shared_ptr<Job> job = engine->begin(state.extents(), state.spans(kChunk), 5);
  CHECK(job->capture(state.streams(), nullptr));
  CHECK(job->gate(state.streams(), nullptr));
  engine->close();
  CHECK_EQ(fixture::thrown_by([&] { job->finish(); }), "closed");
}

TEST(restore_does_not_wait_for_ever) {
  const Snapshot snapshot;
  const HangingDevice device;
  CHECK(!snapshot.restore_for(3, nullptr));
}

TEST(a_restore_after_one_that_hung_does_not_wait_for_the_slots_that_it_lost) {
  const Snapshot snapshot;
  const auto staging = std::make_shared<pysnap::Staging>(kChunk, kChunks);
  staging->slots().reserve(kChunks);
  staging->slots().wait_reserved();
  {
    const HangingDevice device;
    CHECK(!snapshot.restore_for(3, staging));
  }
  CHECK_EQ(staging->slots().usable_slots(), 0);
  CHECK(snapshot.restore_for(100, staging));
}
