// in_flight.h: a slot that devices may still copy into or out of.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "device.h"
#include "error.h"
#include "slot_pool.h"

namespace pysnap {

// May die only when wait() has returned true or thrown, or was never needed (no fences). Movable;
// moves do not throw.
struct InFlight {
  explicit InFlight(Slot slot_given) : slot(std::move(slot_given)) {}

  Slot slot;
  std::map<Device*, std::unique_ptr<Fence>> fences;
  std::optional<Error> failure;

  // Before the first copy of `device`: what comes later may throw.
  void enter(Device& device);
  // After the last copy.
  void mark() noexcept;
  // True once every fence is complete, false after `timeout`. Throws the first Error(kDevice) of
  // the fences, once all of them are over.
  bool wait(std::chrono::milliseconds timeout);
};

// For copies of a device that hangs: keeps the slot and the fences for the life of the process.
void abandon(InFlight flight);

}  // namespace pysnap
