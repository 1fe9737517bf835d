// staging.h: the memory that bytes pass through between tensors and the disk, in both directions,
// and the devices that copy to and from it.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

#include "device.h"
#include "slot_pool.h"

namespace pysnap {

// Thread safe, but for close().
class Staging {
 public:
  // Starts the pool's thread; no memory is mapped yet, no device opened.
  Staging(std::size_t slot_size, std::size_t max_slots);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  // As close().
  ~Staging();

  SlotPool& slots() const { return *slots_; }
  // Opened when it is first asked for, which is slow, and kept open. From the first CUDA device on,
  // the slots are registered. Throws as open_device.
  std::shared_ptr<Device> device(DeviceIndex index);
  // Ends the pool's thread and lets the devices go; for the owner, when nobody asks for more. Slots
  // and devices in use stay usable. Safe to repeat.
  void close();

 private:
  // Constant after construction.
  const std::shared_ptr<SlotPool> slots_;

  std::mutex mutex_;
  // Guarded by mutex_.
  Devices devices_;
};

}  // namespace pysnap
