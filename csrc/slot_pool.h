// slot_pool.h: the staging memory, cut into chunk-sized slots.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device.h"
#include "error.h"

namespace pysnap {

class SlotPool;

// One slot; move-only, goes back to its pool when it dies. Page-aligned.
class Slot {
 public:
  Slot(std::shared_ptr<SlotPool> pool, std::uint8_t* data) : pool_(std::move(pool)), data_(data) {}
  Slot(Slot&& other) noexcept : pool_(std::move(other.pool_)), data_(other.data_) {}
  Slot& operator=(Slot&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Slot();

  std::uint8_t* data() const { return data_; }
  // Tells the pool that this one, which must live on, never comes back.
  void lose();

 private:
  std::shared_ptr<SlotPool> pool_;
  std::uint8_t* data_;
};

// Bounded: never more than `max_slots`. Memory is mapped and touched by a thread of the pool, ahead
// of need (reserve) or on demand (acquire), and is given back when the pool dies. It is not
// inherited by forked children. Huge pages where the system gives them. Thread safe.
class SlotPool : public std::enable_shared_from_this<SlotPool> {
 public:
  // `touchers` threads touch side by side; 0: as many as suit the machine.
  static std::shared_ptr<SlotPool> create(std::size_t slot_size, std::size_t max_slots,
                                          unsigned touchers = 0);
  ~SlotPool();

  std::size_t slot_size() const { return slot_size_; }
  std::size_t max_slots() const { return max_slots_; }
  // max_slots() without those that were lost.
  std::size_t usable_slots();

  // Asks for `slots` to be ready (at most max_slots). Does not wait.
  void reserve(std::size_t slots);
  // Has the memory, that of now and of later, registered with `device` by the growing thread. What
  // is mapped from now on is ready only then, and is near the device; slots that exist already are
  // usable meanwhile. The
  // first device counts, as memory that is registered with one is so for all. Does not wait.
  void pin(std::shared_ptr<Device> device);
  // Why memory that pin() asked for is pageable: copies between it and a device block and are
  // slower. Empty where none is. After one refusal no more is registered.
  std::string why_pageable();
  // Blocks until what was asked for is ready, and registered, or cannot be had.
  void wait_reserved();
  // A free slot that is ready, without waiting.
  std::optional<Slot> try_acquire();
  // Waits for a slot, at most `timeout`. Memory that the system refused before is asked for again;
  // throws Error(kIo, ENOMEM) where not one slot can be had.
  std::optional<Slot> acquire(std::chrono::milliseconds timeout);
  // Ends the growing thread. Called by the owner before the pool's last reference may be dropped by
  // another thread.
  void stop();

 private:
  friend class Slot;
  struct Unmap {
    std::size_t size;
    std::shared_ptr<Device> pinned_by;  // null while it is not registered
    void operator()(std::uint8_t* memory) const;
  };
  using Region = std::unique_ptr<std::uint8_t, Unmap>;

  SlotPool(std::size_t slot_size, std::size_t max_slots, unsigned touchers)
      : slot_size_(slot_size), max_slots_(max_slots), touchers_(touchers) {}
  Region map_region(std::size_t size, const Device* device) const;
  void grow();
  std::optional<Error> pin_region(Region& region, const std::shared_ptr<Device>& device) const;
  void release(std::uint8_t* data);
  // With mutex_ held:
  std::optional<Slot> pop();
  void ask(std::size_t slots);
  void end_pinning(const std::optional<Error>& refusal);
  bool make_room(std::size_t slots);
  bool must_grow() const { return ready_ < wanted_ && !exhausted_; }
  bool must_pin() const { return pin_with_ != nullptr && pinned_ < regions_.size(); }

  // Constant after construction.
  const std::size_t slot_size_;
  const std::size_t max_slots_;
  const unsigned touchers_;
  std::thread grower_;

  std::mutex mutex_;
  // Guarded by mutex_.
  std::condition_variable changed_;  // a slot is free, or regions changed, or stopping
  std::condition_variable growth_;   // something to map or to register, or stopping
  std::vector<Region> regions_;
  std::size_t pinned_ = 0;            // of regions_, how many have been registered; the first ones
  std::shared_ptr<Device> pin_with_;  // null: not asked for, or refused
  std::optional<Error> why_pageable_;
  std::vector<std::uint8_t*> free_;
  std::size_t wanted_ = 0;  // slots asked for so far
  std::size_t ready_ = 0;   // slots mapped and touched, free or in use
  std::size_t lost_ = 0;    // of these, never free again
  bool exhausted_ = false;  // the system gave no more when it was asked last
  bool stopping_ = false;
};

}  // namespace pysnap
