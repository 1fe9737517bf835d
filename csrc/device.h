// device.h: where a tensor's bytes live, and how they come to host memory and back. The engine
// knows only this interface.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace pysnap {

// Host memory, or the index of a CUDA device.
using DeviceIndex = std::int32_t;
constexpr DeviceIndex kHost = -1;

// The caller's stream on a device (a CUstream); 0 is the default stream, and all there is on the
// host.
using StreamHandle = std::uintptr_t;
// The caller's current stream of each device.
using Streams = std::vector<std::pair<DeviceIndex, StreamHandle>>;

// A run of bytes of the stream, in order. The bytes stay valid until they have been copied.
struct Extent {
  std::uint64_t address;
  std::uint64_t length;
  DeviceIndex device;
};

// Becomes complete when the copies before it are. wait() may be called by any thread; it throws
// Error(kIo) if a copy failed.
class Fence {
 public:
  virtual ~Fence() = default;
  virtual void wait() = 0;
};

// One place. Copies may be asynchronous: a slot that was read into may be looked at only after a
// later fence, and a slot that is written from may be reused only then. Thread safe.
class Device {
 public:
  virtual ~Device() = default;

  // Copies that are issued later start after all that is queued on `stream` now.
  virtual void follow(StreamHandle stream) = 0;
  // Copies bytes from the device into `slot`.
  virtual void read(void* slot, std::uint64_t address, std::size_t length) = 0;
  // Copies bytes from `slot` to the device.
  virtual void write(std::uint64_t address, const void* slot, std::size_t length) = 0;
  // Null where everything issued so far is complete already.
  virtual std::unique_ptr<Fence> fence() = 0;
  // What is queued on `stream` later starts after the copies issued so far. Does not block the
  // caller.
  virtual void gate(StreamHandle stream) = 0;
};

// Never null; throws Error(kInvalid) for a device that this build or machine does not have.
std::shared_ptr<Device> open_device(DeviceIndex index);

}  // namespace pysnap
