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
#include "restore.h"

namespace {

using fixture::DeviceState;
using fixture::fake;
using pysnap::Engine;
using pysnap::EngineOptions;
using pysnap::Job;

constexpr std::size_t kChunk = 16 * 1024;
constexpr std::chrono::milliseconds kTimeout{50};

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
  const fixture::TemporaryDirectory directory;
  const DeviceState state({kChunk}, {0});
  pysnap::PackWriter writer(directory / "0.pack", 0, false);
  const pysnap::Buffer buffer = pysnap::make_buffer(kChunk);
  std::fill_n(buffer.get(), kChunk, 1);
  const std::uint64_t offset = writer.append(buffer.get(), kChunk);
  const std::uint64_t size = writer.finish();
  const HangingDevice device;
  int polls = 0;
  CHECK(!pysnap::restore(
      {{directory / "0.pack", size}},
      {{0, kChunk, kChunk, pysnap::Element::kU8, pysnap::Encoding::kRaw, offset,
        pysnap::xxh3_128(buffer.get(), kChunk)}},
      state.targets(), 1, nullptr, state.streams(), nullptr, [&] { return ++polls == 3; },
      kTimeout));
}
