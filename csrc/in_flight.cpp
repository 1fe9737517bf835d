#include "in_flight.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <thread>
#include <utility>

namespace pysnap {

namespace {

// A copy of a slot takes some 100 us; one that waits for the caller's work takes long.
constexpr std::chrono::microseconds kShortestNap{20};
constexpr std::chrono::microseconds kLongestNap{1000};

}  // namespace

void InFlight::enter(Device& device) {
  if (fences.count(&device) != 0) return;
  if (std::unique_ptr<Fence> fence = device.fence()) fences.emplace(&device, std::move(fence));
}

void InFlight::mark() noexcept {
  for (const auto& [device, fence] : fences) fence->mark();
}

bool InFlight::wait(std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  std::chrono::microseconds nap = kShortestNap;
  while (!fences.empty()) {
    bool over = true;
    try {
      over = fences.begin()->second->is_complete();
    } catch (const std::exception& caught) {
      if (!failure) failure = Error::from(caught);
    }
    if (over) {
      fences.erase(fences.begin());
      continue;
    }
    if (Clock::now() - start >= timeout) return false;
    // Not cuEventSynchronize: that would wait for ever where the device hangs.
    std::this_thread::sleep_for(nap);
    nap = std::min(2 * nap, kLongestNap);
  }
  if (failure) throw *failure;
  return true;
}

void abandon(InFlight flight) {
  static std::mutex mutex;
  static auto* const abandoned = new std::list<InFlight>;
  const std::lock_guard<std::mutex> lock(mutex);
  abandoned->push_back(std::move(flight));
  abandoned->back().slot.lose();
}

}  // namespace pysnap
