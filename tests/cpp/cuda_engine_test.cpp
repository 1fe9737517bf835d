// Captures from devices. What the engine does not order, the fake driver does at the worst moment.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda_fixture.h"
#include "engine.h"
#include "restore.h"

namespace {

using fixture::Bytes;
using fixture::DeviceState;
using fixture::fake;
using fixture::HealthyDriver;
using fixture::mixed_sizes;
using fixture::TemporaryDirectory;
using fixture::thrown_by;
using pysnap::DeviceIndex;
using pysnap::Engine;
using pysnap::EngineOptions;
using pysnap::Job;
using pysnap::kHost;
using pysnap::WrittenPack;

constexpr std::size_t kChunk = 16 * 1024;
constexpr std::chrono::milliseconds kAtOnce{0};
constexpr std::chrono::milliseconds kSoon{20};
constexpr std::chrono::hours kForever{24};
const std::vector<DeviceIndex> kEverywhere{0, kHost, 1};

EngineOptions small_engine(std::size_t slots = 64) {
  EngineOptions options;
  options.chunk_size = kChunk;
  options.slots = slots;
  options.nice = 0;
  return options;
}

std::shared_ptr<Job> begin(Engine& engine, const DeviceState& state, std::size_t eager = 1000) {
  const std::vector<pysnap::Span> spans = state.spans(kChunk);
  return engine.begin(state.extents(), spans, std::min(eager, spans.size()));
}

std::future<WrittenPack> write_pack_beside(Job& job, const std::string& path) {
  return std::async(std::launch::async, [&job, path] {
    job.open_pack(path);
    job.wait_written(kForever);
    return job.finish();
  });
}

Bytes read_back(const std::string& path, const WrittenPack& pack) {
  std::size_t size = 0;
  for (const pysnap::StoredChunk& chunk : pack.chunks) size += chunk.raw;
  Bytes bytes(size);
  const pysnap::Target all{0, reinterpret_cast<std::uintptr_t>(bytes.data()), size, kHost};
  CHECK(pysnap::restore({{path, pack.size}}, pack.chunks, {all}, 2, nullptr, {}, nullptr, nullptr));
  return bytes;
}

// A snapshot of tensors in host memory, which takes every slot there is.
bool takes_a_host_snapshot(Engine& engine, const std::string& path, std::size_t chunks = 20) {
  const DeviceState state(std::vector<std::size_t>(chunks, kChunk), {kHost});
  const std::shared_ptr<Job> job = begin(engine, state);
  std::future<WrittenPack> pack = write_pack_beside(*job, path);
  job->capture({}, nullptr);
  return read_back(path, pack.get()) == state.stream();
}

// The given-up job's copies into `slots` slots, all there are, have not begun. Its successor has
// its bytes on the host, where a copy that comes late would overwrite them.
void check_that_slots_are_not_reused(Engine& engine, std::size_t slots, const std::string& path) {
  const DeviceState state(std::vector<std::size_t>(slots, kChunk), {kHost});
  const std::shared_ptr<Job> job = begin(engine, state);
  int polls = 0;
  CHECK(job->capture({}, [&] {
    if (++polls == 2) fake().release();
    return false;
  }));
  CHECK(polls >= 2);
  fake().release();
  fake().finish();
  std::future<WrittenPack> written = write_pack_beside(*job, path);
  CHECK(read_back(path, written.get()) == state.stream());
}

}  // namespace

TEST(what_is_restored_is_what_was_captured) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  int pack = 0;
  for (const FakeCuda::Late late : {FakeCuda::kNothing, FakeCuda::kCopies, FakeCuda::kKernels}) {
    fake().set_late(late);
    for (const std::vector<DeviceIndex>& devices : {{0}, {1}, {0, 1}, kEverywhere}) {
      for (const std::size_t slots : {2U, 64U}) {
        for (const std::size_t eager : {0U, 3U, 1000U}) {
          EngineOptions options = small_engine(slots);
          options.copy_threads = 1 + pack % 3;
          const std::shared_ptr<Engine> engine = Engine::create(options);
          DeviceState state(mixed_sizes(), devices, pack % 2 == 0);
          if (pack % 4 < 2) engine->reserve(1, {0, 1}, state.stream().size());
          const std::shared_ptr<Job> job = begin(*engine, state, eager);
          const std::string path = directory / std::to_string(pack++);
          std::future<WrittenPack> written = write_pack_beside(*job, path);
          CHECK(job->capture(state.streams(), nullptr));
          CHECK(job->gate(state.streams(), nullptr));
          state.fill(0xDD);
          CHECK(read_back(path, written.get()) == state.stream());
        }
      }
    }
  }
}

TEST(a_run_without_devices_never_opens_the_driver) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  engine->reserve(10 * kChunk, {kHost});
  CHECK(takes_a_host_snapshot(*engine, directory / "0.pack"));
  CHECK_EQ(fake().calls("cuInit"), 0);
  CHECK_EQ(engine->why_pageable(), "");
}

TEST(reserve_opens_the_devices_and_pins_the_memory) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const DeviceState state(mixed_sizes(), {0, 1});
  engine->reserve(state.stream().size(), {0, 1});
  engine->wait_reserved();
  CHECK(fake().registered() >= state.stream().size());
  const unsigned retained = fake().calls("cuDevicePrimaryCtxRetain");
  for (int i = 0; i < 3; ++i) {
    const std::shared_ptr<Job> job = begin(*engine, state);
    const std::string path = directory / std::to_string(i);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(job->capture(state.streams(), nullptr));
    CHECK(read_back(path, written.get()) == state.stream());
  }
  CHECK_EQ(fake().calls("cuDevicePrimaryCtxRetain"), retained);
  // Each chunk has an event of its own.
  CHECK_EQ(fake().calls("cuStreamQuery"), 0);
  CHECK_EQ(fake().pageable_copies(), 0);
  CHECK_EQ(engine->why_pageable(), "");
  CHECK_EQ(thrown_by([&] { engine->reserve(1, {2}); }), "invalid");
}

TEST(memory_that_cannot_be_pinned_serves_all_the_same) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().fail_call("cuMemHostRegister_v2", 1, 2);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine(4));
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state);
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(job->capture(state.streams(), nullptr));
  state.fill(0xDD);
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
  CHECK(engine->why_pageable() != "");
  CHECK(fake().pageable_copies() > 0);
}

TEST(a_capture_comes_after_what_was_queued_before) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kKernels);
  for (const std::size_t eager : {0U, 1000U}) {
    fake().hold(-1);
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    DeviceState state(mixed_sizes(), {0, 1});
    state.fill(7);
    const std::shared_ptr<Job> job = begin(*engine, state, eager);
    const std::string path = directory / std::to_string(eager);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(job->capture(state.streams(), nullptr));
    CHECK(!job->wait_staged(kSoon));
    fake().release();
    CHECK(read_back(path, written.get()) == Bytes(state.stream().size(), 7));
  }
}

// The caller's CPU does not wait: the copies run only after capture has returned.
TEST(what_is_queued_after_capture_comes_after_the_eager_copies) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture(state.streams(), nullptr));
  state.fill(0xDD);
  std::this_thread::sleep_for(kSoon);
  fake().release();
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

// Of a device that has cloned them, copies over the bus may come late.
TEST(streams_wait_for_the_clone_of_eager_chunks_and_not_for_the_bus) {
  for (const bool cloned : {true, false}) {
    const HealthyDriver driver;
    const TemporaryDirectory directory;
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    DeviceState state(mixed_sizes(), {0, 1});
    if (cloned) engine->reserve(1, {0, 1}, state.stream().size());
    fake().set_late(FakeCuda::kDownloads);
    fake().hold(-1);
    const std::shared_ptr<Job> job = begin(*engine, state, 5);
    CHECK(job->capture(state.streams(), nullptr));
    // The next step changes what is eager: the first tensors.
    const pysnap::Extent& first = state.extents().front();
    fake().fill(first.device, state.streams().front().second, first.address, 0xDD, first.length);
    std::uint8_t byte = 0;
    for (int i = 0; i < (cloned ? 10'000 : 20) && byte != 0xDD; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      fake().peek(first.address, &byte, 1);
    }
    CHECK_EQ(byte == 0xDD, cloned);
    fake().release();
    std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
    CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
  }
}

TEST(what_is_queued_after_capture_comes_after_the_clone) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  engine->reserve(1, {0, 1}, state.stream().size());
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Job> job = begin(*engine, state, 5);
  CHECK(job->capture(state.streams(), nullptr));
  for (std::size_t i = 0; i < 150; ++i) {
    const pysnap::Extent& extent = state.extents()[i];
    const pysnap::StreamHandle stream =
        state.streams()[static_cast<std::size_t>(extent.device)].second;
    fake().fill(extent.device, stream, extent.address, 0xDD, extent.length);
  }
  std::this_thread::sleep_for(kSoon);
  fake().release();
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

TEST(a_clone_is_made_anew_for_every_snapshot) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  engine->reserve(1, {0, 1}, state.stream().size());
  const unsigned allocations = fake().calls("cuMemAlloc_v2");
  fake().set_late(FakeCuda::kCopies);
  for (const std::uint8_t byte : {1, 2, 3}) {
    state.fill(byte);
    const std::shared_ptr<Job> job = begin(*engine, state, 5);
    CHECK(job->capture(state.streams(), nullptr));
    CHECK(job->gate(state.streams(), nullptr));
    state.fill(0xDD);
    const std::string path = directory / std::to_string(byte);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(read_back(path, written.get()) == Bytes(state.stream().size(), byte));
  }
  CHECK_EQ(fake().calls("cuMemAlloc_v2"), allocations);
  // Clones have events, too.
  CHECK_EQ(fake().calls("cuStreamQuery"), 0);
}

TEST(devices_keep_no_large_clones) {
  const HealthyDriver driver;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  engine->reserve(1, {0}, (std::uint64_t{64} << 20) + 1);
  CHECK_EQ(fake().calls("cuMemAlloc_v2"), 1);
  engine->reserve(1, {0}, std::uint64_t{64} << 20);
  CHECK_EQ(fake().calls("cuMemAlloc_v2"), 2);
}

// The work of the engine must get into no graph, and spoil none: the fake driver tells.
TEST(a_graph_may_be_captured_beside_a_snapshot) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::uintptr_t capturing = fake().make_stream(0);
  fake().set_capturing(capturing, true);
  fake().set_late(FakeCuda::kCopies);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  engine->reserve(1, {0, 1}, 100'000);
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state, 5);
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(job->capture(state.streams(), nullptr));
  // The optimizer's step is captured: nothing of it runs.
  CHECK(job->gate({{0, capturing}, {1, state.streams()[1].second}}, nullptr));
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

TEST(a_snapshot_inside_the_capture_of_a_graph_fails) {
  const HealthyDriver driver;
  const std::uintptr_t capturing = fake().make_stream(0);
  fake().set_capturing(capturing, true);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const DeviceState state(mixed_sizes(), {0});
  const std::shared_ptr<Job> job = begin(*engine, state, 5);
  CHECK(job->capture({{0, capturing}}, nullptr));
  CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "device");
  job->abort();
}

TEST(what_is_queued_after_the_gate_comes_after_all_copies) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state, 0);
  CHECK(job->capture(state.streams(), nullptr));
  CHECK(job->gate(state.streams(), nullptr));
  state.fill(0xDD);
  std::this_thread::sleep_for(kSoon);
  fake().release();
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

TEST(the_lazy_chunks_are_copied_without_a_gate) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine(2));
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state, 0);
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(job->capture(state.streams(), nullptr));
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

TEST(staged_means_that_the_bytes_are_in_host_memory) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), kEverywhere);
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture(state.streams(), nullptr));
  CHECK(job->gate(state.streams(), nullptr));
  CHECK(!job->wait_staged(kSoon));
  fake().release();
  CHECK(job->wait_staged(kForever));
  state.free();
  CHECK(job->wait_staged(kAtOnce));
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(read_back(directory / "0.pack", written.get()) == state.stream());
}

TEST(nothing_is_read_after_the_job_has_ended) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  for (int way = 0; way < 3; ++way) {
    fake().hold(-1);
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    DeviceState state(mixed_sizes(), {0, 1});
    const std::shared_ptr<Job> job = begin(*engine, state, way % 2 == 0 ? 1000 : 5);
    CHECK(job->capture(state.streams(), nullptr));
    if (way > 0) CHECK_EQ(thrown_by([&] { job->open_pack(directory / "missing/0.pack"); }), "io");
    std::future<void> ended = std::async(std::launch::async, [&] {
      if (way == 0) job->abort();
      if (way == 1) CHECK_EQ(thrown_by([&] { job->finish(); }), "io");
      if (way == 2) CHECK(job->wait_staged(kForever));
    });
    CHECK(ended.wait_for(4 * pysnap::kPoll) == std::future_status::timeout);
    fake().release();
    ended.get();
    state.free();
    job->abort();
  }
}

TEST(slots_of_a_job_that_was_given_up_are_not_reused_during_its_copies) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  EngineOptions options = small_engine(6);
  options.device_timeout = kSoon;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const DeviceState state(std::vector<std::size_t>(6, kChunk), {0, 1});
  const std::shared_ptr<Job> given_up = begin(*engine, state);
  CHECK(given_up->capture(state.streams(), nullptr));
  given_up->abort();
  CHECK(!given_up->wait_staged(kAtOnce));
  check_that_slots_are_not_reused(*engine, 6, directory / "0.pack");
}

// Of the second chunk, one device copies its part, and the other refuses.
TEST(slots_of_a_job_that_failed_are_not_reused_during_its_copies) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  EngineOptions options = small_engine(2);
  options.device_timeout = kSoon;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const DeviceState state({kChunk, kChunk / 2, kChunk / 2}, {0, 0, 1});
  const std::shared_ptr<Job> failed = begin(*engine, state, 1);
  fake().fail_call("cuMemcpyDtoHAsync_v2", 3, 2);
  CHECK(failed->capture(state.streams(), nullptr));
  CHECK(failed->gate(state.streams(), nullptr));
  CHECK_EQ(thrown_by([&] { failed->wait_written(kForever); }), "device");
  failed->abort();
  check_that_slots_are_not_reused(*engine, 2, directory / "0.pack");
}

// A helper is in the middle of the chunk, and has queued nothing yet.
TEST(the_chunk_that_a_helper_copies_is_waited_for) {
  for (const char* const way : {"gate", "abort", "close"}) {
    const HealthyDriver driver;
    const TemporaryDirectory directory;
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    engine->reserve(kChunk, {0});
    engine->wait_reserved();
    DeviceState state({kChunk}, {0});
    const std::shared_ptr<Job> job = begin(*engine, state, 0);
    job->open_pack(directory / "0.pack");
    fake().hold_calls("cuMemcpyDtoHAsync_v2");
    CHECK(job->capture(state.streams(), nullptr));
    while (fake().calls("cuMemcpyDtoHAsync_v2") == 0) std::this_thread::yield();
    CHECK(!job->wait_staged(kAtOnce));
    fake().set_late(FakeCuda::kCopies);
    std::future<void> waited = std::async(std::launch::async, [&] {
      if (way == std::string("gate")) CHECK(job->gate(state.streams(), nullptr));
      if (way == std::string("abort")) job->abort();
      if (way == std::string("close")) engine->close();
    });
    CHECK(waited.wait_for(kSoon) == std::future_status::timeout);
    fake().release();
    waited.get();
    if (way == std::string("gate")) {
      state.fill(0xDD);
      job->wait_written(kForever);
      CHECK(read_back(directory / "0.pack", job->finish()) == state.stream());
    } else {
      state.free();
    }
  }
}

TEST(capture_returns_when_the_eager_chunks_are_queued) {
  const HealthyDriver driver;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  engine->reserve(kChunk, {0});
  engine->wait_reserved();
  const DeviceState state({kChunk}, {0});
  const std::shared_ptr<Job> job = begin(*engine, state);
  fake().hold_calls("cuMemcpyDtoHAsync_v2");
  std::future<bool> captured =
      std::async(std::launch::async, [&] { return job->capture(state.streams(), nullptr); });
  CHECK(captured.wait_for(5 * kSoon) == std::future_status::timeout);
  fake().release();
  CHECK(captured.get());
}

// However long that takes: no timeout of devices ends it.
TEST(abort_waits_for_the_chunk_that_a_helper_copies) {
  const HealthyDriver driver;
  EngineOptions options = small_engine();
  options.device_timeout = kAtOnce;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  engine->reserve(kChunk, {0});
  engine->wait_reserved();
  const DeviceState state({kChunk}, {0});
  const std::shared_ptr<Job> job = begin(*engine, state, 0);
  fake().hold_calls("cuMemcpyDtoHAsync_v2");
  CHECK(job->capture(state.streams(), nullptr));
  while (fake().calls("cuMemcpyDtoHAsync_v2") == 0) std::this_thread::yield();
  std::future<void> aborted = std::async(std::launch::async, [&] { job->abort(); });
  CHECK(aborted.wait_for(5 * kSoon) == std::future_status::timeout);
  fake().release();
  aborted.get();
  fake().finish();
  CHECK(job->wait_staged(kForever));
}

// It reads the tensors, too.
TEST(the_clone_of_a_job_that_failed_is_waited_for) {
  const HealthyDriver driver;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  engine->reserve(1, {0, 1}, state.stream().size());
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Job> job = begin(*engine, state, 5);
  // Each device is ordered after the caller's stream, and the first one's stream after the clone.
  fake().fail_call("cuStreamWaitEvent", 3, 2);
  CHECK(job->capture(state.streams(), nullptr));
  CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "device");
  CHECK(!job->wait_staged(kSoon));
  fake().release();
  job->abort();
  CHECK(job->wait_staged(kAtOnce));
  state.free();
}

TEST(a_chunk_is_staged_when_all_its_devices_have_copied) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  for (const DeviceIndex late : {0, 1}) {
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    const DeviceState state({kChunk / 2, kChunk / 2}, {0, 1});
    const std::shared_ptr<Job> job = begin(*engine, state);
    fake().hold(late);
    CHECK(job->capture(state.streams(), nullptr));
    CHECK(!job->wait_staged(kSoon));
    fake().release();
    CHECK(job->wait_staged(kForever));
    job->abort();
  }
}

TEST(a_wait_for_slots_that_devices_fill_can_be_interrupted) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  for (const std::size_t eager : {0U, 1000U}) {
    fake().hold(-1);
    EngineOptions options = small_engine(4);
    options.device_timeout = kSoon;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const DeviceState state(mixed_sizes(), {0});
    const std::shared_ptr<Job> job = begin(*engine, state, eager);
    const std::string path = directory / std::to_string(eager);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    const auto interrupted = [] { return true; };
    CHECK_EQ(job->capture(state.streams(), interrupted), eager == 0);
    if (eager == 0) {
      // The job goes on.
      CHECK(!job->gate(state.streams(), interrupted));
      fake().release();
      CHECK(read_back(path, written.get()) == state.stream());
    } else {
      CHECK_EQ(thrown_by([&] { written.get(); }), "closed");
      fake().release();
    }
  }
}

TEST(a_device_without_a_stream_fails_the_job) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const DeviceState state(mixed_sizes(), {0, 1});
  for (const bool at_gate : {false, true}) {
    const std::shared_ptr<Job> job = begin(*engine, state, 0);
    CHECK(job->capture(at_gate ? state.streams() : pysnap::Streams{{0, 0}}, nullptr));
    if (at_gate) CHECK(job->gate({{0, 0}}, nullptr));
    CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "invalid");
    CHECK_EQ(thrown_by([&] { job->finish(); }), "invalid");
  }
  CHECK(takes_a_host_snapshot(*engine, directory / "0.pack"));
}

TEST(a_device_that_is_lost_fails_the_job_and_no_other) {
  const TemporaryDirectory directory;
  for (const unsigned nth : {1U, 2U, 9U}) {
    const HealthyDriver driver;
    fake().set_late(FakeCuda::kCopies);
    fake().fail_copy(nth);
    const std::shared_ptr<Engine> engine = Engine::create(small_engine(4));
    const DeviceState state(mixed_sizes(), {0});
    const std::shared_ptr<Job> job = begin(*engine, state);
    const std::string path = directory / std::to_string(nth);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(job->capture(state.streams(), nullptr));
    CHECK(job->gate(state.streams(), nullptr));
    CHECK(job->wait_staged(kForever));
    CHECK_EQ(thrown_by([&] { written.get(); }), "device");
    job->abort();
    CHECK(takes_a_host_snapshot(*engine, path + ".host"));
    // The other device is not concerned.
    const DeviceState other(mixed_sizes(), {1});
    const std::shared_ptr<Job> next = begin(*engine, other);
    written = write_pack_beside(*next, path + ".other");
    CHECK(next->capture(other.streams(), nullptr));
    CHECK(read_back(path + ".other", written.get()) == other.stream());
  }
}

// Whichever call of the driver is refused: the snapshot is right or fails, the engine serves on,
// and nothing is left behind.
TEST(a_call_that_is_refused_never_makes_a_wrong_snapshot) {
  const TemporaryDirectory directory;
  int pack = 0;
  for (const char* function : {"cuInit",
                               "cuDeviceGetCount",
                               "cuDeviceGet",
                               "cuDevicePrimaryCtxRetain",
                               "cuDevicePrimaryCtxRelease_v2",
                               "cuCtxPushCurrent_v2",
                               "cuCtxPopCurrent_v2",
                               "cuStreamCreate",
                               "cuStreamDestroy_v2",
                               "cuStreamQuery",
                               "cuStreamWaitEvent",
                               "cuEventCreate",
                               "cuEventDestroy_v2",
                               "cuEventRecord",
                               "cuEventQuery",
                               "cuMemAlloc_v2",
                               "cuMemFree_v2",
                               "cuMemHostRegister_v2",
                               "cuMemHostUnregister",
                               "cuMemcpyDtoHAsync_v2",
                               "cuMemcpyDtoDAsync_v2",
                               "cuDeviceGetPCIBusId",
                               "cuStreamIsCapturing",
                               "cuModuleLoadData",
                               "cuModuleUnload",
                               "cuModuleGetFunction",
                               "cuLaunchKernel"}) {
    for (const unsigned nth : {1U, 2U, 3U, 6U, 14U}) {
      const HealthyDriver driver;
      fake().set_late(FakeCuda::kCopies);
      fake().fail_call(function, nth, 999);
      const std::shared_ptr<Engine> engine = Engine::create(small_engine(8));
      const std::string path = directory / std::to_string(pack++);
      DeviceState state(std::vector<std::size_t>(30, 5000), {0, 1});
      std::string outcome = thrown_by([&] {
        engine->reserve(1, {0, 1}, pack % 2 == 0 ? state.stream().size() : 0);
        const std::shared_ptr<Job> job = begin(*engine, state, 5);
        std::future<WrittenPack> written = write_pack_beside(*job, path);
        CHECK(job->capture(state.streams(), nullptr));
        CHECK(job->gate(state.streams(), nullptr));
        state.fill(0xDD);
        try {
          CHECK(read_back(path, written.get()) == state.stream());
        } catch (const pysnap::Error&) {
          job->abort();
          throw;
        }
      });
      if (outcome != "nothing" && outcome != "device" && outcome != "invalid") {
        check::fail(__FILE__, __LINE__,
                    std::string(function) + " refused: the failure is " + outcome);
      }
      CHECK(takes_a_host_snapshot(*engine, path + ".next"));
    }
  }
}

// The last calls of the driver have succeeded when the device is lost: only a fence can tell.
TEST(a_device_that_is_lost_during_the_last_copy_fails_the_job) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const DeviceState state({kChunk, kChunk}, {0});
  const std::shared_ptr<Job> job = begin(*engine, state);
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(job->capture(state.streams(), nullptr));
  CHECK(job->gate(state.streams(), nullptr));
  fake().fail_copy(2);
  fake().release();
  CHECK_EQ(thrown_by([&] { written.get(); }), "device");
}

// A capture that blocks inside the driver, as for memory that is not pinned, is waited for; whether
// the caller or a helper copies is chance.
TEST(close_waits_for_the_chunk_that_the_caller_copies) {
  for (int round = 0; round < 10; ++round) {
    const HealthyDriver driver;
    fake().set_late(FakeCuda::kCopies);
    fake().hold(-1);
    fake().fail_call("cuMemHostRegister_v2", 1, 2);
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    engine->reserve(1, {0});
    engine->wait_reserved();
    const DeviceState state({1000}, {0});
    const std::shared_ptr<Job> job = begin(*engine, state);
    std::future<bool> captured =
        std::async(std::launch::async, [&] { return job->capture(state.streams(), nullptr); });
    while (fake().pageable_copies() == 0) std::this_thread::yield();
    std::future<void> closed = std::async(std::launch::async, [&] { engine->close(); });
    CHECK(closed.wait_for(kSoon) == std::future_status::timeout);
    fake().release();
    closed.get();
    CHECK(captured.get());
    CHECK(job->wait_staged(std::chrono::seconds(1)));
  }
}

TEST(close_waits_for_the_devices) {
  const HealthyDriver driver;
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  DeviceState state(mixed_sizes(), {0, 1});
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture(state.streams(), nullptr));
  std::future<void> closed = std::async(std::launch::async, [&] { engine->close(); });
  CHECK(closed.wait_for(4 * pysnap::kPoll) == std::future_status::timeout);
  fake().release();
  closed.get();
  state.free();
}

TEST(an_engine_may_go_while_devices_copy) {
  const HealthyDriver driver;
  const TemporaryDirectory directory;
  fake().set_late(FakeCuda::kCopies);
  for (int i = 0; i < 10; ++i) {
    const DeviceState state(mixed_sizes(), kEverywhere);
    const std::shared_ptr<Engine> engine = Engine::create(small_engine());
    const std::shared_ptr<Job> job = begin(*engine, state, 2 * i);
    job->open_pack(directory / std::to_string(i));
    CHECK(job->capture(state.streams(), nullptr));
  }
}
