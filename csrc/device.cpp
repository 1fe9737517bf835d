#include "device.h"

#include <string>

#include "copy.h"
#include "error.h"

namespace pysnap {

namespace {

// Host memory: copies are complete when the call returns, and no stream exists that they could
// overtake.
class HostDevice : public Device {
 public:
  void follow(StreamHandle) override {}
  void read(void* slot, std::uint64_t address, std::size_t length) override {
    stream_copy(slot, reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address)), length);
  }
  void write(std::uint64_t address, const void* slot, std::size_t length) override {
    stream_copy(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), slot, length);
  }
  std::unique_ptr<Fence> fence() override { return nullptr; }
  void gate(StreamHandle) override {}
};

}  // namespace

std::shared_ptr<Device> open_device(DeviceIndex index) {
  if (index == kHost) return std::make_shared<HostDevice>();
  throw Error(ErrorKind::kInvalid,
              "CUDA device " + std::to_string(index) +
                  ": this version captures host tensors only; move the tensor to the CPU first");
}

}  // namespace pysnap
