#include "slot_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "error.h"
#include "file.h"
#include "numa.h"
#include "thread.h"
#include "trace.h"

namespace pysnap {

namespace {

// Large enough for huge pages and few mappings, small enough that the first slots are ready at
// once.
constexpr std::size_t kRegionSize = std::size_t{32} << 20;

// The kernel zeroes 2 to 4 GB/s in one thread.
constexpr unsigned kMostTouchers = 4;

// False where the system has no memory left: to touch it all the same would get the process killed.
bool touch(std::uint8_t* memory, std::size_t size) {
#ifdef MADV_POPULATE_WRITE
  if (::madvise(memory, size, MADV_POPULATE_WRITE) == 0) return true;
  if (errno == ENOMEM) return false;
#endif
  for (std::size_t i = 0; i < size; i += kPageSize)
    static_cast<volatile std::uint8_t*>(memory)[i] = 0;
  return true;
}

bool touch_side_by_side(std::uint8_t* memory, std::size_t size, unsigned threads) {
  const std::size_t part = round_up(size / threads + 1, kHugePage);
  std::atomic<bool> touched{true};
  auto touch_part = [&](std::size_t start) {
    if (!touch(memory + start, std::min(part, size - start))) touched = false;
  };
  std::vector<std::thread> helpers;
  std::size_t start = part;
  try {
    helpers.reserve(size / part);
    for (; start < size; start += part)
      helpers.push_back(start_thread("pysnap-touch", [&touch_part, start] { touch_part(start); }));
  } catch (const std::exception&) {
    // The rest is touched here.
  }
  touch_part(0);
  for (; start < size; start += part) touch_part(start);
  for (std::thread& helper : helpers) helper.join();
  return touched;
}

}  // namespace

Slot::~Slot() {
  if (pool_ != nullptr) pool_->release(data_);
}

void Slot::lose() {
  if (pool_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(pool_->mutex_);
  ++pool_->lost_;
}

void SlotPool::Unmap::operator()(std::uint8_t* memory) const {
  if (pinned_by != nullptr) pinned_by->unpin(memory);
  ::munmap(memory, size);
}

std::shared_ptr<SlotPool> SlotPool::create(std::size_t slot_size, std::size_t max_slots,
                                           unsigned touchers) {
  // Half of the processors at most: the program is at work.
  if (touchers == 0) touchers = std::clamp(available_processors() / 2, 1U, kMostTouchers);
  std::shared_ptr<SlotPool> pool(new SlotPool(slot_size, max_slots, touchers));
  // The raw pointer is safe: stop() joins the thread before the pool dies.
  pool->grower_ = start_thread("pysnap-grow", [raw = pool.get()] { raw->grow(); });
  return pool;
}

SlotPool::~SlotPool() { stop(); }

void SlotPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  growth_.notify_all();
  if (grower_.joinable()) grower_.join();
}

std::size_t SlotPool::usable_slots() {
  std::lock_guard<std::mutex> lock(mutex_);
  return max_slots_ - lost_;
}

void SlotPool::reserve(std::size_t slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  ask(std::min(slots, max_slots_));
}

void SlotPool::ask(std::size_t slots) {
  wanted_ = std::max(wanted_, slots);
  exhausted_ = false;
  growth_.notify_all();
}

void SlotPool::pin(std::shared_ptr<Device> device) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (pin_with_ != nullptr || why_pageable_) return;
    pin_with_ = std::move(device);
  }
  growth_.notify_all();
}

std::string SlotPool::why_pageable() {
  std::lock_guard<std::mutex> lock(mutex_);
  return why_pageable_ ? why_pageable_->what() : "";
}

void SlotPool::wait_reserved() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return stopping_ || (!must_grow() && !must_pin()); });
}

std::optional<Slot> SlotPool::try_acquire() {
  std::lock_guard<std::mutex> lock(mutex_);
  return pop();
}

std::optional<Slot> SlotPool::acquire(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (free_.empty() && ready_ < max_slots_) ask(ready_ + 1);
  changed_.wait_for(lock, timeout,
                    [&] { return !free_.empty() || stopping_ || (exhausted_ && ready_ == 0); });
  if (exhausted_ && ready_ == 0) throw Error::io("mapping staging memory for", "a slot", ENOMEM);
  return pop();
}

std::optional<Slot> SlotPool::pop() {
  if (free_.empty()) return std::nullopt;
  std::uint8_t* data = free_.back();
  free_.pop_back();
  return Slot(shared_from_this(), data);
}

void SlotPool::release(std::uint8_t* data) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(data);
  }
  changed_.notify_all();
}

// Registers the region; why that was refused, else nothing.
std::optional<Error> SlotPool::pin_region(Region& region,
                                          const std::shared_ptr<Device>& device) const {
  try {
    device->pin(region.get(), region.get_deleter().size);
    region.get_deleter().pinned_by = device;
    return std::nullopt;
  } catch (const std::exception& caught) {
    return Error::from(caught);
  }
}

void SlotPool::end_pinning(const std::optional<Error>& refusal) {
  if (!refusal) {
    ++pinned_;
  } else {
    why_pageable_ = refusal;
    pin_with_.reset();
  }
}

// Whether there is memory for the list of so many more slots in a region of their own.
bool SlotPool::make_room(std::size_t slots) {
  try {
    regions_.reserve(regions_.size() + 1);
    free_.reserve(ready_ + slots);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// Null where the system has no memory left. `device` may be null.
SlotPool::Region SlotPool::map_region(std::size_t size, const Device* device) const {
  void* mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return Region(nullptr, Unmap{size, nullptr});
  Region region(static_cast<std::uint8_t*>(mapped), Unmap{size, nullptr});
  if (size >= kHugePage) ::madvise(mapped, size, MADV_HUGEPAGE);
  ::madvise(mapped, size, MADV_DONTFORK);
  if (device != nullptr) {
    if (const std::optional<int> node = device->numa_node()) prefer_numa_node(mapped, size, *node);
  }
  if (!touch_side_by_side(region.get(), size, touchers_)) region.reset();
  return region;
}

void SlotPool::grow() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    growth_.wait(lock, [&] { return stopping_ || must_grow() || must_pin(); });
    if (stopping_) return;
    const std::shared_ptr<Device> device = pin_with_;
    if (must_pin()) {
      // Only this thread changes regions_.
      Region& region = regions_[pinned_];
      lock.unlock();
      const std::optional<Error> refusal = pin_region(region, device);
      lock.lock();
      end_pinning(refusal);
      changed_.notify_all();
      continue;
    }
    const std::size_t slots =
        std::min(std::max<std::size_t>(1, kRegionSize / slot_size_), wanted_ - ready_);
    const std::size_t size = slots * slot_size_;
    lock.unlock();
    const trace::Scope scope(trace::Phase::kMap, size);
    Region region = map_region(size, device.get());
    std::optional<Error> refusal;
    if (region != nullptr && device != nullptr) refusal = pin_region(region, device);
    lock.lock();
    if (region == nullptr || !make_room(slots)) {
      exhausted_ = true;
    } else {
      for (std::size_t i = slots; i > 0; --i) free_.push_back(region.get() + (i - 1) * slot_size_);
      ready_ += slots;
      wanted_ = std::max(wanted_, ready_);
      regions_.push_back(std::move(region));
      if (device != nullptr) end_pinning(refusal);
    }
    changed_.notify_all();
  }
}

}  // namespace pysnap
