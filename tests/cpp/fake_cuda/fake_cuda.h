// A libcuda.so.1 of ours, so that the CUDA path is tested without a GPU: two devices whose memory
// is not host memory, streams, events, and one thread that does what is queued, in an order chosen
// to hurt. Whatever no event or stream orders happens at the worst moment, on every run.
//
// The library has every function of CudaDriver, and this table of controls beside them.

#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_driver.h"

struct FakeCuda {
  enum Late {
    kNothing,    // everything runs as soon as it may
    kCopies,     // copies run only when nothing else can and nothing was queued for a while
    kKernels,    // kernels do
    kDownloads,  // copies to the host do
  };

  // Everything is as in a new process with healthy devices. Nothing may be in use.
  void (*reset)();

  // Memory of a device, zeroed, as a tensor's; and a look at it, past all streams.
  std::uint64_t (*allocate)(int device, std::size_t size);
  void (*free)(std::uint64_t address);
  void (*poke)(std::uint64_t address, const void* bytes, std::size_t size);
  void (*peek)(std::uint64_t address, void* bytes, std::size_t size);

  // The caller's streams, and a kernel that fills memory.
  std::uintptr_t (*make_stream)(int device);
  void (*fill)(int device, std::uintptr_t stream, std::uint64_t address, std::uint8_t byte,
               std::size_t size);

  void (*set_late)(Late late);
  // What is late does not run at all before release(), on this device, or on all (-1): it hangs.
  void (*hold)(int device);
  // A call of this function does nothing before release(), but counts.
  void (*hold_calls)(const char* function);
  void (*release)();
  // Waits until nothing more is queued.
  void (*finish)();

  // The `nth` call of a function from now on (1: the next) does nothing and returns `result`.
  void (*fail_call)(const char* function, unsigned nth, int result);
  // The `nth` copy of bytes that runs from now on fails, and with it every later call for its
  // device.
  void (*fail_copy)(unsigned nth);
  // Whether the stream captures a graph; what is queued on it then never runs.
  void (*set_capturing)(std::uintptr_t stream, bool capturing);
  void (*set_device_count)(int count);

  unsigned (*calls)(const char* function);  // so far
  bool (*is_inside)();                      // whether the calling thread is in this library
  unsigned (*pageable_copies)();            // to and from host memory that is not registered
  std::size_t (*registered)();              // bytes of host memory
  // What the calling code did that a real driver would punish; empty if nothing.
  const char* (*violation)();
  // What was created and is still there (not allocate and make_stream); empty if nothing.
  const char* (*leaks)();
};

extern "C" const FakeCuda* fake_cuda();
