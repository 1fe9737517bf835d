// cuda_device.h: a CUDA device, through the driver API.
//
// Each opened device has one stream of its own, which no other stream waits for unless it is told
// to: all copies go there, in order. Events tie it to the caller's streams: the caller's CPU never
// waits. The primary context (torch's) is retained while the device is open, and every call pushes
// it for its own duration, so that any thread may call and none is left changed.
//
// Sources shorter than 1 MiB, which cross the bus slowly one by one, are first copied together in
// the device's memory, by a kernel (see piece_kernel.h), and then cross as one; on the way back,
// the same in the other direction. Where the driver refuses the kernel, copies of the driver
// gather; where the device has no 4 MiB left for that, they cross one by one.
#pragma once

#include <memory>

#include "device.h"

namespace pysnap {

// Throws Error(kInvalid) where CUDA cannot be used or has no such device, Error(kDevice) where it
// refuses.
std::shared_ptr<Device> open_cuda_device(DeviceIndex index);

}  // namespace pysnap
