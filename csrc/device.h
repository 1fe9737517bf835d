// device.h: where a tensor's bytes live, and how they come to host memory and back. The engine
// knows only this interface.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
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

// Bytes in the memory of one device.
struct Source {
  std::uint64_t address;
  std::size_t length;
};

// Where bytes of a slot go on one device.
struct Place {
  std::uint64_t address;
  std::size_t offset;  // in the slot
  std::size_t length;
};

// How long whoever must give memory back waits for copies of a device that seems to hang. Long: the
// copies come after all that the caller has queued.
constexpr std::chrono::milliseconds kDeviceTimeout{30'000};

// Becomes complete when the copies before its mark are. Made before them, so that none is under way
// without one. Any thread may ask, one at a time.
class Fence {
 public:
  virtual ~Fence() = default;
  // After the last copy, once.
  virtual void mark() noexcept = 0;
  // Does not block. Throws Error(kDevice) where the copies failed; they have ended then, too.
  virtual bool is_complete() = 0;
};

// One place. Copies may be asynchronous: a slot that was read into may be looked at, and a slot
// that was written from may be reused, only after a later fence is complete. After an exception of
// read or write a part may be under way all the same. Thread safe. No call waits for the device,
// but for copies to or from memory that is not pinned.
class Device {
 public:
  virtual ~Device() = default;

  // Copies that are issued later start after all that is queued on `stream` now.
  virtual void follow(StreamHandle stream) = 0;
  // Copies `sources` from the device into `slot`, end to end.
  virtual void read(void* slot, const std::vector<Source>& sources) = 0;
  // Copies bytes of `slot` to the device.
  virtual void write(const void* slot, const std::vector<Place>& places) = 0;
  // Null where copies are complete when the call returns. Does not throw Error.
  virtual std::unique_ptr<Fence> fence() = 0;
  // What is queued on `stream` later starts after the copies issued so far.
  virtual void gate(StreamHandle stream) = 0;

  // Has memory on the device for clones of up to `size` bytes, where there is some to spare. The
  // first size counts. Slow, and may wait for the device.
  virtual void reserve_clone(std::size_t size) = 0;
  // Copies `sources` within the device, end to end; where that copy begins, or nothing where no
  // memory is reserved for it. It stays as it is until copies are issued after the next clone.
  virtual std::optional<std::uint64_t> clone(const std::vector<Source>& sources) = 0;

  // Registers host memory, page-aligned, so that copies to and from it are asynchronous and fast,
  // on every device of the kind. Slow. Throws Error(kDevice) where that is refused.
  virtual void pin(void* memory, std::size_t size) = 0;
  // Before the memory is given back.
  virtual void unpin(void* memory) noexcept = 0;
  // The NUMA node that the device is attached to; nothing where there is none, or nobody knows.
  virtual std::optional<int> numa_node() const = 0;
};

using Devices = std::map<DeviceIndex, std::shared_ptr<Device>>;

// Never null; throws Error(kInvalid) for a device that this machine does not have, Error(kDevice)
// for one that refuses.
std::shared_ptr<Device> open_device(DeviceIndex index);

// Calls `order` (follow or gate) for every stream whose device is one of `devices`. Throws
// Error(kInvalid) where one that has streams is not named: its copies would be in no order.
void order_streams(const Devices& devices, const Streams& streams,
                   void (Device::*order)(StreamHandle));

}  // namespace pysnap
