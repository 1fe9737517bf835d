#include "slot_pool.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "file.h"
#include "fixture.h"

namespace {

using pysnap::kPageSize;
using pysnap::Slot;
using pysnap::SlotPool;

constexpr std::size_t kSlotSize = 4 * kPageSize;
constexpr std::chrono::milliseconds kAtOnce{0};
// A wait this long that ends was woken.
constexpr std::chrono::hours kForever{24};

std::vector<Slot> acquire_all(SlotPool& pool) {
  std::vector<Slot> slots;
  while (slots.size() < pool.max_slots()) {
    std::optional<Slot> slot = pool.acquire(kForever);
    if (!slot) break;
    slots.push_back(std::move(*slot));
  }
  return slots;
}

// Host memory that is said to be near a node.
class NearNode : public pysnap::Device {
 public:
  explicit NearNode(int node) : node_(node) {}
  void follow(pysnap::StreamHandle) override {}
  void read(void*, const std::vector<pysnap::Source>&) override {}
  void write(const void*, const std::vector<pysnap::Place>&) override {}
  std::unique_ptr<pysnap::Fence> fence() override { return nullptr; }
  void gate(pysnap::StreamHandle) override {}
  void reserve_clone(std::size_t) override {}
  std::optional<std::uint64_t> clone(const std::vector<pysnap::Source>&) override { return {}; }
  void pin(void*, std::size_t) override {}
  void unpin(void*) noexcept override {}
  std::optional<int> numa_node() const override { return node_; }

 private:
  const int node_;
};

// A flag that the system tells of the mapping of an address, as "dc" (not inherited by a fork).
bool has_flag(const void* address, const std::string& flag) {
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    unsigned long long start = 0;
    unsigned long long end = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx ", &start, &end) == 2) {
      const auto at = reinterpret_cast<std::uintptr_t>(address);
      inside = start <= at && at < end;
    } else if (inside && line.rfind("VmFlags:", 0) == 0) {
      return (line + " ").find(" " + flag + " ") != std::string::npos;
    }
  }
  return false;
}

bool is_resident(const std::uint8_t* memory, std::size_t size) {
  std::vector<unsigned char> pages(size / kPageSize);
  return ::mincore(const_cast<std::uint8_t*>(memory), size, pages.data()) == 0 &&
         std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

// How often the growing thread of the only pool has waited so far.
long waits_of_grower() {
  return std::stol(fixture::told_of_threads("pysnap-grow", "voluntary_ctxt_switches:").at(0));
}

bool is_mapped(void* page) { return ::msync(page, kPageSize, MS_ASYNC) == 0; }

}  // namespace

TEST(no_more_slots_than_the_bound) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 5);
  CHECK_EQ(pool->slot_size(), kSlotSize);
  CHECK_EQ(pool->max_slots(), 5);
  std::vector<Slot> slots = acquire_all(*pool);
  CHECK_EQ(slots.size(), 5);
  CHECK(!pool->try_acquire());
  CHECK(!pool->acquire(kAtOnce));
  slots.pop_back();
  CHECK(pool->try_acquire().has_value());
}

TEST(what_is_lost_is_not_usable) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 5);
  std::vector<Slot> slots = acquire_all(*pool);
  CHECK_EQ(pool->usable_slots(), 5);
  slots[1].lose();
  slots[3].lose();
  CHECK_EQ(pool->usable_slots(), 3);
  CHECK_EQ(pool->max_slots(), 5);
}

TEST(memory_is_touched_ahead_of_need_by_any_number_of_threads) {
  for (const unsigned touchers : {1U, 2U, 3U, 40U}) {
    const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 500, touchers);
    pool->reserve(500);
    pool->wait_reserved();
    for (const Slot& slot : acquire_all(*pool)) CHECK(is_resident(slot.data(), kSlotSize));
  }
}

TEST(a_forked_child_gets_no_staging_memory) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 2);
  const std::optional<Slot> slot = pool->acquire(kForever);
  CHECK(has_flag(slot->data(), "dc"));
}

TEST(large_regions_ask_for_huge_pages) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(std::size_t{4} << 20, 2);
  const std::optional<Slot> slot = pool->acquire(kForever);
  CHECK(has_flag(slot->data(), "hg") || ::access("/sys/kernel/mm/transparent_hugepage", F_OK) != 0);
}

// What the system says where it lets a process ask; there is a node 0 everywhere.
TEST(memory_is_near_the_device_that_it_is_pinned_for) {
  constexpr int kPreferred = 1;
  const auto policy_of = [](const void* address) {
    int policy = -1;
    constexpr unsigned long kOfAddress = 2;
    const long result = ::syscall(SYS_get_mempolicy, &policy, nullptr, 0, address, kOfAddress);
    return result == 0 ? policy : -1;
  };
  const std::shared_ptr<SlotPool> plain = SlotPool::create(kSlotSize, 1);
  const std::optional<Slot> anywhere = plain->acquire(kForever);
  const int usual = policy_of(anywhere->data());
  if (usual < 0) return;  // the system does not let this process ask
  CHECK_EQ(usual, 0);
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 1);
  pool->pin(std::make_shared<NearNode>(0));
  const std::optional<Slot> slot = pool->acquire(kForever);
  CHECK_EQ(policy_of(slot->data()), kPreferred);
  // A node that no machine has.
  const std::shared_ptr<SlotPool> odd = SlotPool::create(kSlotSize, 1);
  odd->pin(std::make_shared<NearNode>(1023));
  CHECK(odd->acquire(kForever).has_value());
}

TEST(slots_are_page_aligned_and_apart_and_keep_their_bytes) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 7);
  std::vector<Slot> slots = acquire_all(*pool);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(slots[i].data()) % kPageSize, 0);
    std::fill_n(slots[i].data(), kSlotSize, static_cast<std::uint8_t>(i));
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    CHECK_EQ(std::count(slots[i].data(), slots[i].data() + kSlotSize, static_cast<std::uint8_t>(i)),
             kSlotSize);
  }
}

// Regions are 32 MiB: this pool has several, and the last one is smaller.
TEST(a_pool_of_several_regions_keeps_its_bound) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(std::size_t{16} << 20, 5);
  const std::vector<Slot> slots = acquire_all(*pool);
  std::set<std::uint8_t*> places;
  for (const Slot& slot : slots) places.insert(slot.data());
  CHECK_EQ(places.size(), 5);
  CHECK(!pool->acquire(kAtOnce));
}

TEST(what_was_reserved_is_there_without_waiting) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 6);
  CHECK(!pool->try_acquire());
  pool->wait_reserved();
  pool->reserve(100);
  pool->wait_reserved();
  std::vector<Slot> slots;
  while (std::optional<Slot> slot = pool->try_acquire()) slots.push_back(std::move(*slot));
  CHECK_EQ(slots.size(), 6);
  pool->wait_reserved();
}

TEST(slots_come_back_in_any_order) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 4);
  std::vector<Slot> slots = acquire_all(*pool);
  std::set<std::uint8_t*> places;
  for (const Slot& slot : slots) places.insert(slot.data());
  for (const std::size_t i : {2U, 0U, 1U, 0U}) slots.erase(slots.begin() + i);
  slots = acquire_all(*pool);
  std::set<std::uint8_t*> again;
  for (const Slot& slot : slots) again.insert(slot.data());
  CHECK(again == places);
}

TEST(a_slot_that_was_moved_comes_back_once) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 2);
  std::vector<Slot> slots = acquire_all(*pool);
  {
    const Slot moved(std::move(slots[0]));
  }
  slots[1] = std::move(slots[0]);
  slots.clear();
  slots = acquire_all(*pool);
  CHECK_EQ(slots.size(), 2);
  CHECK(slots[0].data() != slots[1].data());
}

TEST(a_slot_that_comes_back_wakes_who_waits) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 2);
  for (int round = 0; round < 100; ++round) {
    std::vector<Slot> slots = acquire_all(*pool);
    std::atomic<int> waiting{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&] {
        ++waiting;
        CHECK(pool->acquire(kForever).has_value());
      });
    }
    while (waiting < 2) std::this_thread::yield();
    slots.pop_back();
    for (std::thread& thread : threads) thread.join();
  }
}

// A thread that is woken for nothing takes the processor from training.
TEST(a_slot_that_comes_back_does_not_wake_the_growing_thread) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 2);
  pool->reserve(2);
  pool->wait_reserved();
  const long before = waits_of_grower();
  for (int round = 0; round < 10'000; ++round) CHECK(pool->try_acquire().has_value());
  // It may have been on its way to its first wait.
  CHECK(waits_of_grower() - before < 5);
}

TEST(many_threads_share_few_slots) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 3);
  std::atomic<int> in_use{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        const std::optional<Slot> slot = pool->acquire(kForever);
        CHECK(slot.has_value());
        CHECK(++in_use <= 3);
        slot->data()[0] = static_cast<std::uint8_t>(round);
        --in_use;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(a_pool_lives_as_long_as_its_last_slot) {
  std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 2);
  std::optional<Slot> slot = pool->acquire(kForever);
  pool->stop();
  pool.reset();
  std::uint8_t* page = slot->data();
  std::fill_n(page, kSlotSize, 1);
  CHECK(is_mapped(page));
  slot.reset();
  CHECK(!is_mapped(page));
}

TEST(stop_ends_every_wait) {
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kSlotSize, 1);
  const std::optional<Slot> slot = pool->acquire(kForever);
  std::thread waiter([&] { CHECK(!pool->acquire(kForever)); });
  pool->stop();
  waiter.join();
  pool->reserve(1);
  pool->wait_reserved();
  pool->stop();
}

TEST(memory_that_cannot_be_had_is_an_error) {
  constexpr std::size_t kMoreThanAnAddressSpace = std::size_t{1} << 60;
  const std::shared_ptr<SlotPool> pool = SlotPool::create(kMoreThanAnAddressSpace, 1);
  pool->reserve(1);
  pool->wait_reserved();
  for (int i = 0; i < 2; ++i) {
    CHECK_EQ(fixture::errno_of([&] { pool->acquire(kForever); }), ENOMEM);
  }
}

// The sanitizers map memory of their own and die of this limit.
TEST(memory_is_asked_for_again_after_the_system_refused) {
  if (fixture::kAddressSanitizer || fixture::kThreadSanitizer) return;
  const std::shared_ptr<SlotPool> pool = SlotPool::create(std::size_t{32} << 20, 2);
  std::optional<Slot> first = pool->acquire(kForever);
  rlimit before;
  CHECK_EQ(::getrlimit(RLIMIT_AS, &before), 0);
  const rlimit limit{1, before.rlim_max};
  CHECK_EQ(::setrlimit(RLIMIT_AS, &limit), 0);
  pool->reserve(2);
  pool->wait_reserved();
  const bool refused = !pool->try_acquire().has_value();
  CHECK_EQ(::setrlimit(RLIMIT_AS, &before), 0);
  CHECK(refused);
  CHECK(pool->acquire(kForever).has_value());
}
