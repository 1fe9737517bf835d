// The device alone: what is gathered, and where pinned memory comes from.

#include "cuda_device.h"

#include <algorithm>
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

#include "check.h"
#include "cuda_fixture.h"
#include "in_flight.h"
#include "slot_pool.h"

namespace {

using fixture::Bytes;
using fixture::DeviceState;
using fixture::fake;
using fixture::HealthyDriver;
using pysnap::Device;
using pysnap::InFlight;
using pysnap::Slot;
using pysnap::SlotPool;
using pysnap::Source;

constexpr std::chrono::hours kForever{24};
constexpr std::chrono::milliseconds kSoon{20};
constexpr std::size_t kMiB = std::size_t{1} << 20;

// Pinned slots of a device.
class Slots {
 public:
  Slots(const std::shared_ptr<Device>& device, std::size_t size, std::size_t slots)
      : pool_(SlotPool::create(size, slots)) {
    pool_->pin(device);
  }
  ~Slots() { pool_->stop(); }
  Slot take() { return std::move(*pool_->acquire(kForever)); }
  SlotPool& pool() { return *pool_; }

 private:
  std::shared_ptr<SlotPool> pool_;
};

std::vector<Source> sources_of(const DeviceState& state) {
  std::vector<Source> sources;
  for (const pysnap::Extent& extent : state.extents())
    sources.push_back({extent.address, extent.length});
  return sources;
}

// The sources of a state that has all its tensors on one device, as a slot has them.
Bytes read_all(Device& device, const DeviceState& state, Slot slot) {
  InFlight flight(std::move(slot));
  flight.enter(device);
  device.read(flight.slot.data(), sources_of(state));
  flight.mark();
  CHECK(flight.wait(kForever));
  return Bytes(flight.slot.data(), flight.slot.data() + state.stream().size());
}

// What the tensors have when the stream of the state was written to them.
Bytes write_all(Device& device, const DeviceState& state, Slot slot) {
  std::copy(state.stream().begin(), state.stream().end(), slot.data());
  std::vector<pysnap::Place> places;
  std::size_t offset = 0;
  for (const pysnap::Extent& extent : state.extents()) {
    places.push_back({extent.address, offset, extent.length});
    offset += extent.length;
  }
  InFlight flight(std::move(slot));
  flight.enter(device);
  device.write(flight.slot.data(), places);
  flight.mark();
  CHECK(flight.wait(kForever));
  return state.now();
}

}  // namespace

TEST(tiny_sources_cross_together) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 1);
  const DeviceState state(std::vector<std::size_t>(5000, 4), {0});
  fake().set_late(FakeCuda::kCopies);
  CHECK(read_all(*device, state, slots.take()) == state.stream());
  // One launch when the device is opened, and one for each 170 sources.
  CHECK_EQ(fake().calls("cuLaunchKernel"), 1 + 30);
  CHECK_EQ(fake().calls("cuMemcpyDtoDAsync_v2"), 0);
  CHECK_EQ(fake().calls("cuMemcpyDtoHAsync_v2"), 1);
}

TEST(without_the_kernel_copies_of_the_driver_gather) {
  for (const char* refused : {"cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"}) {
    const HealthyDriver driver;
    fake().fail_call(refused, 1, 218);
    const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
    Slots slots(device, 64 * 1024, 1);
    const DeviceState state(std::vector<std::size_t>(500, 4), {0});
    fake().set_late(FakeCuda::kCopies);
    CHECK(read_all(*device, state, slots.take()) == state.stream());
    CHECK_EQ(fake().calls("cuMemcpyDtoDAsync_v2"), 500);
    CHECK_EQ(fake().calls("cuMemcpyDtoHAsync_v2"), 1);
  }
}

TEST(long_sources_cross_alone) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(1);
  Slots slots(device, 8 * kMiB, 1);
  const DeviceState state({kMiB, 2 * kMiB, 5, kMiB, 7, 9}, {1});
  CHECK(read_all(*device, state, slots.take()) == state.stream());
  CHECK_EQ(fake().calls("cuLaunchKernel"), 1 + 1);
  CHECK_EQ(fake().calls("cuMemcpyDtoHAsync_v2"), 5);
}

TEST(what_is_gathered_may_exceed_the_scratch_memory) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 16 * kMiB, 1);
  const DeviceState state(std::vector<std::size_t>(20, 3 * kMiB / 4 + 1), {0});
  fake().set_late(FakeCuda::kCopies);
  CHECK(read_all(*device, state, slots.take()) == state.stream());
  CHECK_EQ(fake().calls("cuMemcpyDtoHAsync_v2"), 4);
}

TEST(without_scratch_memory_nothing_is_gathered) {
  const HealthyDriver driver;
  fake().fail_call("cuMemAlloc_v2", 1, 2);
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 1);
  const DeviceState state(std::vector<std::size_t>(100, 4), {0});
  CHECK(read_all(*device, state, slots.take()) == state.stream());
  CHECK_EQ(fake().calls("cuLaunchKernel"), 1);
  CHECK_EQ(fake().calls("cuMemcpyDtoHAsync_v2"), 100);
}

TEST(tiny_places_are_written_together) {
  for (const bool refused : {false, true}) {
    const HealthyDriver driver;
    if (refused) fake().fail_call("cuModuleLoadData", 1, 218);
    const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
    Slots slots(device, 8 * kMiB, 1);
    std::vector<std::size_t> sizes(1000, 4);
    sizes.insert(sizes.end(), {2 * kMiB, 7, 5 * kMiB / 2, 9});
    sizes.insert(sizes.end(), 1000, 12);
    DeviceState state(sizes, {0});
    const Bytes expected = state.stream();
    state.fill(0xDD);
    fake().finish();
    fake().set_late(FakeCuda::kCopies);
    CHECK(write_all(*device, state, slots.take()) == expected);
    CHECK_EQ(fake().calls("cuMemcpyHtoDAsync_v2"), refused ? 2004 : 5);
  }
}

// What is read back must not come before what is written: both use the scratch memory.
TEST(places_in_any_order_and_with_gaps_are_written) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 1);
  const DeviceState state({100, 100, 100, 100}, {0});
  Slot slot = slots.take();
  for (std::size_t i = 0; i < 1000; ++i) slot.data()[i] = static_cast<std::uint8_t>(i % 251);
  const std::vector<std::size_t> offsets{0, 300, 200, 250};
  std::vector<pysnap::Place> places;
  for (std::size_t i = 0; i < 4; ++i)
    places.push_back({state.extents()[i].address, offsets[i], 100});
  InFlight flight(std::move(slot));
  flight.enter(*device);
  fake().set_late(FakeCuda::kCopies);
  device->write(flight.slot.data(), places);
  flight.mark();
  CHECK(flight.wait(kForever));
  Bytes expected;
  for (const std::size_t offset : offsets)
    expected.insert(expected.end(), flight.slot.data() + offset, flight.slot.data() + offset + 100);
  CHECK(state.now() == expected);
}

TEST(a_clone_stays_as_it_is) {
  for (const bool refused : {false, true}) {
    const HealthyDriver driver;
    if (refused) fake().fail_call("cuModuleLoadData", 1, 218);
    const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
    Slots slots(device, 4 * kMiB, 1);
    std::vector<std::size_t> sizes(300, 5);
    sizes.push_back(3 * kMiB / 2);
    DeviceState state(sizes, {0});
    device->reserve_clone(1);
    device->reserve_clone(64 * kMiB);  // the first size counts
    const std::vector<Source> sources = sources_of(state);
    fake().set_late(FakeCuda::kCopies);
    const std::optional<std::uint64_t> at = device->clone(sources);
    CHECK(at.has_value());
    device->gate(state.streams().front().second);
    state.fill(0xDD);
    InFlight flight(slots.take());
    flight.enter(*device);
    device->read(flight.slot.data(), {{*at, state.stream().size()}});
    flight.mark();
    CHECK(flight.wait(kForever));
    CHECK(Bytes(flight.slot.data(), flight.slot.data() + state.stream().size()) == state.stream());
    CHECK(!device->clone({sources.back(), sources.back()}));
    CHECK_EQ(fake().calls("cuMemAlloc_v2"), 2);
  }
}

TEST(without_memory_for_it_nothing_is_cloned) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  const DeviceState state({100}, {0});
  CHECK(!device->clone(sources_of(state)));
  fake().fail_call("cuMemAlloc_v2", 1, 2);
  device->reserve_clone(100);
  CHECK(!device->clone(sources_of(state)));
}

// Else a slot would be reused while it is copied to.
TEST(a_call_that_is_refused_says_nothing_of_copies) {
  for (const auto& [call, result] : std::vector<std::pair<const char*, int>>{
           {"cuCtxPushCurrent_v2", 2}, {"cuEventQuery", 999}}) {
    const HealthyDriver driver;
    const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
    Slots slots(device, 64 * 1024, 1);
    const DeviceState state({1000}, {0});
    fake().set_late(FakeCuda::kCopies);
    fake().hold(-1);
    InFlight flight(slots.take());
    flight.enter(*device);
    device->read(flight.slot.data(), sources_of(state));
    flight.mark();
    fake().fail_call(call, 1, result);
    CHECK(!flight.wait(std::chrono::milliseconds(0)));
    fake().release();
    CHECK(flight.wait(kForever));
  }
}

TEST(a_context_that_is_gone_copies_nothing_more) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 1);
  const DeviceState state({1000}, {0});
  for (const int gone : {4, 201, 709}) {
    InFlight flight(slots.take());
    flight.enter(*device);
    device->read(flight.slot.data(), sources_of(state));
    flight.mark();
    fake().finish();
    fake().fail_call("cuCtxPushCurrent_v2", 1, gone);
    CHECK_EQ(fixture::thrown_by([&] { flight.wait(kForever); }), "device");
  }
}

// They share the scratch memory.
TEST(threads_may_gather_side_by_side) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 4);
  fake().set_late(FakeCuda::kCopies);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const DeviceState state(std::vector<std::size_t>(300 + i, 8 + i), {0});
      for (int round = 0; round < 3; ++round)
        CHECK(read_all(*device, state, slots.take()) == state.stream());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Another thread's pieces would overwrite those that have not crossed yet.
TEST(the_scratch_memory_belongs_to_one_thread_until_its_copies_are_queued) {
  for (const bool writes : {false, true}) {
    const HealthyDriver driver;
    const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
    Slots slots(device, 64 * 1024, 2);
    slots.pool().reserve(2);
    slots.pool().wait_reserved();
    fake().set_late(FakeCuda::kCopies);
    // Of the two calls that a thread makes, the first fills the memory, the second empties it.
    const char* const first = writes ? "cuMemcpyHtoDAsync_v2" : "cuLaunchKernel";
    const char* const second = writes ? "cuLaunchKernel" : "cuMemcpyDtoHAsync_v2";
    const unsigned filled = fake().calls(first);
    fake().hold_calls(second);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < 2; ++i) {
      threads.emplace_back([&, i] {
        const DeviceState state(std::vector<std::size_t>(100 + i, 8 + i), {0});
        const Bytes found = writes ? write_all(*device, state, slots.take())
                                   : read_all(*device, state, slots.take());
        CHECK(found == state.stream());
      });
    }
    while (fake().calls(first) == filled) std::this_thread::yield();
    std::this_thread::sleep_for(10 * kSoon);
    CHECK_EQ(fake().calls(first), filled + 1);
    fake().release();
    for (std::thread& thread : threads) thread.join();
  }
}

TEST(a_fence_waits_for_its_own_copies_alone) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 2);
  const DeviceState state({1000}, {0});
  InFlight first(slots.take());
  first.enter(*device);
  device->read(first.slot.data(), sources_of(state));
  first.mark();
  fake().finish();
  fake().set_late(FakeCuda::kCopies);
  fake().hold(-1);
  InFlight second(slots.take());
  second.enter(*device);
  device->read(second.slot.data(), sources_of(state));
  second.mark();
  CHECK(first.wait(kSoon));
  CHECK(!second.wait(kSoon));
  fake().release();
  CHECK(second.wait(kForever));
}

TEST(what_fails_on_one_device_is_told_when_the_others_have_copied) {
  for (const int lost : {0, 1}) {
    const HealthyDriver driver;
    const std::vector<std::shared_ptr<Device>> devices{pysnap::open_cuda_device(0),
                                                       pysnap::open_cuda_device(1)};
    Slots slots(devices[0], 64 * 1024, 1);
    const DeviceState state({1000, 1000}, {0, 1});
    fake().set_late(FakeCuda::kCopies);
    fake().hold(1 - lost);
    fake().fail_copy(1);
    InFlight flight(slots.take());
    for (std::size_t i = 0; i < 2; ++i) {
      flight.enter(*devices[i]);
      devices[i]->read(flight.slot.data() + 1000 * i, {{state.extents()[i].address, 1000}});
    }
    flight.mark();
    CHECK_EQ(fixture::thrown_by([&] { CHECK(!flight.wait(kSoon)); }), "nothing");
    fake().release();
    CHECK_EQ(fixture::thrown_by([&] { flight.wait(kForever); }), "device");
  }
}

TEST(a_fence_without_an_event_waits_for_the_stream) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  Slots slots(device, 64 * 1024, 1);
  const DeviceState state({1000}, {0});
  fake().set_late(FakeCuda::kCopies);
  for (const char* refused : {"cuEventCreate", "cuEventRecord"}) {
    fake().fail_call(refused, 1, 2);
    CHECK(read_all(*device, state, slots.take()) == state.stream());
  }
  CHECK(fake().calls("cuStreamQuery") > 0);
}

TEST(memory_is_pinned_before_it_is_used_and_unpinned_before_it_goes) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  {
    Slots slots(device, 4 * kMiB, 20);
    slots.pool().reserve(20);
    slots.pool().wait_reserved();
    CHECK_EQ(fake().registered(), 80 * kMiB);
    CHECK_EQ(slots.pool().why_pageable(), "");
    const Slot slot = slots.take();
  }
  CHECK_EQ(fake().registered(), 0);
}

TEST(no_slot_is_had_before_its_memory_is_pinned) {
  const HealthyDriver driver;
  Slots slots(pysnap::open_cuda_device(0), 4 * kMiB, 1);
  fake().hold_calls("cuMemHostRegister_v2");
  slots.pool().reserve(1);
  while (fake().calls("cuMemHostRegister_v2") == 0) std::this_thread::yield();
  std::optional<Slot> slot = slots.pool().acquire(kSoon);
  CHECK(!slot);
  fake().release();
  if (!slot) slot = slots.take();
  CHECK_EQ(fake().registered(), 4 * kMiB);
}

TEST(stop_waits_for_memory_that_is_just_being_pinned) {
  const HealthyDriver driver;
  const std::shared_ptr<SlotPool> pool = SlotPool::create(4 * kMiB, 1);
  pool->pin(pysnap::open_cuda_device(0));
  fake().hold_calls("cuMemHostRegister_v2");
  pool->reserve(1);
  while (fake().calls("cuMemHostRegister_v2") == 0) std::this_thread::yield();
  std::future<void> stopped = std::async(std::launch::async, [&] { pool->stop(); });
  CHECK(stopped.wait_for(kSoon) == std::future_status::timeout);
  fake().release();
  stopped.get();
}

TEST(memory_that_exists_is_pinned_later) {
  const HealthyDriver driver;
  const std::shared_ptr<SlotPool> pool = SlotPool::create(4 * kMiB, 20);
  pool->reserve(12);
  pool->wait_reserved();
  CHECK_EQ(fake().registered(), 0);
  fake().hold_calls("cuMemHostRegister_v2");
  pool->pin(pysnap::open_cuda_device(0));
  std::future<void> reserved = std::async(std::launch::async, [&] { pool->wait_reserved(); });
  CHECK(reserved.wait_for(kSoon) == std::future_status::timeout);
  fake().release();
  reserved.get();
  CHECK_EQ(fake().registered(), 48 * kMiB);
  pool->pin(pysnap::open_cuda_device(1));
  pool->reserve(20);
  pool->wait_reserved();
  CHECK_EQ(fake().registered(), 80 * kMiB);
  CHECK_EQ(fake().calls("cuMemHostRegister_v2"), 3);
}

// A slot that outlives its pool and its device keeps both.
TEST(a_slot_stays_pinned_as_long_as_it_lives) {
  const HealthyDriver driver;
  std::shared_ptr<SlotPool> pool = SlotPool::create(4 * kMiB, 1);
  pool->pin(pysnap::open_cuda_device(0));
  std::optional<Slot> slot = pool->acquire(kForever);
  pool->stop();
  pool.reset();
  CHECK_EQ(fake().registered(), 4 * kMiB);
  slot.reset();
  CHECK_EQ(fake().registered(), 0);
}

TEST(memory_that_cannot_be_pinned_serves_all_the_same) {
  const HealthyDriver driver;
  const std::shared_ptr<Device> device = pysnap::open_cuda_device(0);
  const DeviceState state({1000, 2000}, {0});
  fake().fail_call("cuMemHostRegister_v2", 2, 2);
  Slots slots(device, 32 * kMiB, 3);
  slots.pool().reserve(3);
  slots.pool().wait_reserved();
  CHECK_EQ(fake().registered(), 32 * kMiB);
  CHECK_EQ(fake().calls("cuMemHostRegister_v2"), 2);
  CHECK_EQ(slots.pool().why_pageable(),
           "registering staging memory failed: a fake error (error 2)");
  std::vector<Slot> taken;
  for (int i = 0; i < 3; ++i) taken.push_back(slots.take());
  while (!taken.empty()) {
    CHECK(read_all(*device, state, std::move(taken.back())) == state.stream());
    taken.pop_back();
  }
  CHECK_EQ(fake().pageable_copies(), 2);
}
