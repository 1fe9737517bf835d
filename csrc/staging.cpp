#include "staging.h"

namespace pysnap {

Staging::Staging(std::size_t slot_size, std::size_t max_slots)
    : slots_(SlotPool::create(slot_size, max_slots)) {}

Staging::~Staging() { close(); }

std::shared_ptr<Device> Staging::device(DeviceIndex index) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Device>& device = devices_[index];
  if (device == nullptr) {
    device = open_device(index);
    if (index != kHost) slots_->pin(device);
  }
  return device;
}

void Staging::close() {
  slots_->stop();
  std::lock_guard<std::mutex> lock(mutex_);
  devices_.clear();
}

}  // namespace pysnap
