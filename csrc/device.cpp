#include "device.h"

#include <algorithm>
#include <string>

#include "copy.h"
#include "cuda_device.h"
#include "error.h"

namespace pysnap {

namespace {

// Host memory: copies are complete when the call returns, and no stream exists that they could
// overtake.
class HostDevice : public Device {
 public:
  void follow(StreamHandle) override {}
  void read(void* slot, const std::vector<Source>& sources) override {
    auto* to = static_cast<std::uint8_t*>(slot);
    for (const Source& source : sources) {
      stream_copy(to, reinterpret_cast<const void*>(static_cast<std::uintptr_t>(source.address)),
                  source.length);
      to += source.length;
    }
  }
  void write(const void* slot, const std::vector<Place>& places) override {
    const auto* from = static_cast<const std::uint8_t*>(slot);
    for (const Place& place : places) {
      stream_copy(reinterpret_cast<void*>(static_cast<std::uintptr_t>(place.address)),
                  from + place.offset, place.length);
    }
  }
  std::unique_ptr<Fence> fence() override { return nullptr; }
  void gate(StreamHandle) override {}
  void reserve_clone(std::size_t) override {}
  std::optional<std::uint64_t> clone(const std::vector<Source>&) override { return std::nullopt; }
  void pin(void*, std::size_t) override {}
  void unpin(void*) noexcept override {}
  std::optional<int> numa_node() const override { return std::nullopt; }
};

}  // namespace

std::shared_ptr<Device> open_device(DeviceIndex index) {
  if (index == kHost) return std::make_shared<HostDevice>();
  return open_cuda_device(index);
}

void order_streams(const Devices& devices, const Streams& streams,
                   void (Device::*order)(StreamHandle)) {
  for (const auto& [index, device] : devices) {
    const bool named = std::any_of(streams.begin(), streams.end(),
                                   [&](const auto& stream) { return stream.first == index; });
    if (index != kHost && !named) {
      throw Error(ErrorKind::kInvalid,
                  "no stream of CUDA device " + std::to_string(index) + " was given");
    }
  }
  for (const auto& [index, stream] : streams) {
    if (auto device = devices.find(index); device != devices.end())
      (device->second.get()->*order)(stream);
  }
}

}  // namespace pysnap
