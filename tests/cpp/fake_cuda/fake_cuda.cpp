#include "fake_cuda.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "piece_kernel.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using pysnap::CudaAddress;
using pysnap::CudaContext;
using pysnap::CudaDriver;
using pysnap::CudaEvent;
using pysnap::CudaFunction;
using pysnap::CudaModule;
using pysnap::CudaResult;
using pysnap::CudaStream;

// Done once what was queued before it on its stream has run.
struct Mark {
  bool done = false;
};

struct CUctx_st {
  int device;
};

struct CUevent_st {
  int device;
  std::shared_ptr<Mark> mark;  // of the last record
};

namespace {

constexpr CudaResult kInvalidValue = 1;
constexpr CudaResult kInvalidContext = 201;
constexpr CudaResult kIllegalAddress = 700;

constexpr int kDevices = 2;
constexpr std::size_t kPage = 4096;
// No host address: to use one on the host is a fault.
constexpr std::uint64_t kDeviceMemory = std::uint64_t{1} << 63;
constexpr std::chrono::milliseconds kQuiet{3};

struct Operation {
  // kTrial copies nothing: it is neither late nor the copy that fails.
  enum Kind { kCopy, kDownload, kTrial, kKernel, kRecord, kWait } kind;
  std::shared_ptr<Mark> mark;  // what it sets, or waits for; null: nothing
  std::function<void()> run;   // kCopy, kDownload, kTrial, kKernel
};

}  // namespace

struct CUstream_st {
  int device;
  std::deque<Operation> queue;
  bool capturing = false;
};

struct CUmod_st {
  int device;
};

struct CUfunc_st {
  int device;
};

namespace {

struct Memory {
  std::vector<std::uint8_t> bytes;
  int device;
  bool by_driver;  // cuMemAlloc
};

// Guarded by mutex. Never destroyed: the thread goes on to the end of the process.
struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::uint64_t, Memory> memory;
  std::uint64_t next_address = kDeviceMemory;
  std::vector<std::unique_ptr<CUstream_st>> streams;  // the first ones are the default streams
  std::set<CUstream_st*> created;                     // by cuStreamCreate
  std::set<CUevent_st*> events;
  std::set<CUmod_st*> modules;
  CUfunc_st functions[kDevices] = {{0}, {1}};
  std::map<std::uintptr_t, std::size_t> registered;
  CUctx_st contexts[kDevices] = {{0}, {1}};
  int retained[kDevices] = {0, 0};
  bool lost[kDevices] = {false, false};
  int device_count = kDevices;
  FakeCuda::Late late = FakeCuda::kNothing;
  bool held[kDevices] = {false, false};
  std::chrono::steady_clock::time_point last_queued;
  std::map<std::string, unsigned> calls;
  std::set<std::string> held_calls;
  std::map<std::string, std::pair<unsigned, CudaResult>> failures;
  unsigned failing_copy = 0;
  unsigned pageable_copies = 0;
  std::string violation;
  std::string leaks;

  void violate(const std::string& what) {
    if (violation.empty()) violation = what;
  }
};

void run_devices();

State& state() {
  static State* const only = [] {
    auto* created = new State;
    for (int device = 0; device < kDevices; ++device) {
      created->streams.push_back(std::make_unique<CUstream_st>(CUstream_st{device, {}, false}));
    }
    return created;
  }();
  static const bool started = [] {
    std::thread(run_devices).detach();
    return true;
  }();
  static_cast<void>(started);
  return *only;
}

// The contexts that a thread has pushed.
struct Stack {
  std::vector<CUctx_st*> contexts;
  int capture_mode = 0;
  int inside = 0;  // calls of this library
  ~Stack() {
    if (contexts.empty() && capture_mode == 0) return;
    std::lock_guard<std::mutex> lock(state().mutex);
    state().violate("a thread ended with a context");
  }
};
// The library comes and goes: with the usual model, LeakSanitizer looks for what has gone with it.
__attribute__((tls_model("initial-exec"))) thread_local Stack stack;

struct Inside {
  Inside() { ++stack.inside; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  ~Inside() { --stack.inside; }
};

// The bytes at a device's address; null, and a violation, where they are not in one allocation.
std::uint8_t* find(std::uint64_t address, std::size_t size, int device) {
  State& s = state();
  auto after = s.memory.upper_bound(address);
  if (after != s.memory.begin()) {
    auto& [start, memory] = *std::prev(after);
    if (address - start <= memory.bytes.size() && size <= memory.bytes.size() - (address - start) &&
        memory.device == device) {
      return memory.bytes.data() + (address - start);
    }
  }
  s.violate("an address that the device does not have");
  return nullptr;
}

std::uint64_t allocate_memory(int device, std::size_t size, bool by_driver) {
  State& s = state();
  const std::uint64_t address = s.next_address;
  s.next_address += (size / 512 + 2) * 512;
  s.memory[address] = {std::vector<std::uint8_t>(size), device, by_driver};
  return address;
}

bool is_copy(const Operation& operation) {
  return operation.kind == Operation::kCopy || operation.kind == Operation::kDownload;
}

bool is_late(const Operation& operation) {
  return (is_copy(operation) && state().late == FakeCuda::kCopies) ||
         (operation.kind == Operation::kDownload && state().late == FakeCuda::kDownloads) ||
         (operation.kind == Operation::kKernel && state().late == FakeCuda::kKernels);
}

// A stream whose next operation may run; late ones only if `late`.
CUstream_st* choose(bool late) {
  for (const auto& stream : state().streams) {
    if (stream->queue.empty()) continue;
    const Operation& next = stream->queue.front();
    if (next.kind == Operation::kWait && next.mark != nullptr && !next.mark->done) continue;
    if (!is_late(next) || (late && !state().held[stream->device])) return stream.get();
  }
  return nullptr;
}

void lose_device(int device) {
  State& s = state();
  s.lost[device] = true;
  for (const auto& stream : s.streams) {
    if (stream->device != device) continue;
    for (const Operation& operation : stream->queue) {
      if (operation.kind != Operation::kWait && operation.mark) operation.mark->done = true;
    }
    stream->queue.clear();
  }
}

void run_devices() {
  State& s = state();
  const Inside inside;
  std::unique_lock<std::mutex> lock(s.mutex);
  for (;;) {
    CUstream_st* stream = choose(false);
    if (stream == nullptr && std::chrono::steady_clock::now() - s.last_queued >= kQuiet)
      stream = choose(true);
    if (stream == nullptr) {
      s.changed.wait_for(lock, kQuiet);
      continue;
    }
    const Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (is_copy(operation) && s.failing_copy > 0 && --s.failing_copy == 0) {
      if (operation.mark) operation.mark->done = true;
      lose_device(stream->device);
    } else {
      if (operation.run) operation.run();
      if (operation.kind != Operation::kWait && operation.mark) operation.mark->done = true;
    }
    s.changed.notify_all();
  }
}

// One call of the driver: counted, refused if a test wants it so, and holding the mutex.
class Call {
 public:
  enum Needs { kNothing, kContext };

  explicit Call(const char* name, Needs needs = kContext) : lock(state().mutex) {
    State& s = state();
    ++s.calls[name];
    s.changed.wait(lock, [&] { return s.held_calls.count(name) == 0; });
    if (auto failure = s.failures.find(name);
        failure != s.failures.end() && --failure->second.first == 0) {
      result = failure->second.second;
      s.failures.erase(failure);
    } else if (needs == kContext && stack.contexts.empty()) {
      s.violate(std::string(name) + " without a context");
      result = kInvalidContext;
    } else if (needs == kContext && s.lost[device()]) {
      result = kIllegalAddress;
    } else if (needs == kContext && stack.capture_mode != pysnap::kCudaCaptureRelaxed &&
               std::any_of(s.streams.begin(), s.streams.end(),
                           [](const auto& stream) { return stream->capturing; })) {
      s.violate(std::string(name) + " would spoil the capture of a graph");
    }
  }

  int device() const { return stack.contexts.back()->device; }
  bool refused() const { return result != 0; }

  // 0 is the default stream.
  CUstream_st* find_stream(CudaStream stream) const {
    State& s = state();
    if (stream == nullptr) return s.streams[static_cast<std::size_t>(device())].get();
    for (const auto& known : s.streams) {
      if (known.get() == stream) {
        if (stream->device != device()) s.violate("a stream of another device");
        return stream;
      }
    }
    s.violate("a stream that does not exist");
    return s.streams[static_cast<std::size_t>(device())].get();
  }

  void queue(CUstream_st* stream, Operation operation) const {
    if (stream->capturing) return state().violate("work of ours in the graph of somebody else");
    stream->queue.push_back(std::move(operation));
    state().last_queued = std::chrono::steady_clock::now();
    state().changed.notify_all();
  }

  void check_event(CudaEvent event) const {
    if (state().events.count(event) == 0) {
      state().violate("an event that does not exist");
    } else if (event->device != device()) {
      state().violate("an event of another device");
    }
  }

  const Inside inside;
  std::unique_lock<std::mutex> lock;
  CudaResult result = 0;
};

bool is_registered(const void* memory, std::size_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  auto after = state().registered.upper_bound(address);
  if (after == state().registered.begin()) return false;
  const auto& [start, length] = *std::prev(after);
  return address - start <= length && size <= length - (address - start);
}

bool is_mapped(const void* memory, std::size_t size) {
  return ::msync(const_cast<void*>(memory), size, MS_ASYNC) == 0;
}

}  // namespace

EXPORTED CudaResult cuInit(unsigned) { return Call("cuInit", Call::kNothing).result; }

EXPORTED CudaResult cuGetErrorString(CudaResult error, const char** words) {
  *words = error == kIllegalAddress ? "an illegal memory access was encountered" : "a fake error";
  return 0;
}

EXPORTED CudaResult cuDeviceGetCount(int* count) {
  const Call call("cuDeviceGetCount", Call::kNothing);
  *count = state().device_count;
  return call.result;
}

EXPORTED CudaResult cuDeviceGet(int* device, int ordinal) {
  const Call call("cuDeviceGet", Call::kNothing);
  *device = ordinal;
  return call.result;
}

EXPORTED CudaResult cuDeviceGetPCIBusId(char* id, int length, int device) {
  const Call call("cuDeviceGetPCIBusId", Call::kNothing);
  std::snprintf(id, static_cast<std::size_t>(length), "FFFF:%02X:1F.7", device);
  return call.result;
}

EXPORTED CudaResult cuDevicePrimaryCtxRetain(CudaContext* context, int device) {
  const Call call("cuDevicePrimaryCtxRetain", Call::kNothing);
  if (call.refused()) return call.result;
  ++state().retained[device];
  *context = &state().contexts[device];
  return 0;
}

EXPORTED CudaResult cuDevicePrimaryCtxRelease_v2(int device) {
  const Call call("cuDevicePrimaryCtxRelease_v2", Call::kNothing);
  if (--state().retained[device] < 0) state().violate("a context released too often");
  return call.result;
}

EXPORTED CudaResult cuCtxPushCurrent_v2(CudaContext context) {
  const Call call("cuCtxPushCurrent_v2", Call::kNothing);
  if (call.refused()) return call.result;
  if (state().retained[context->device] < 1) state().violate("a context that is not retained");
  stack.contexts.push_back(context);
  return 0;
}

EXPORTED CudaResult cuCtxPopCurrent_v2(CudaContext* context) {
  const Call call("cuCtxPopCurrent_v2", Call::kNothing);
  if (stack.contexts.empty()) {
    state().violate("a context popped too often");
    return kInvalidContext;
  }
  *context = stack.contexts.back();
  stack.contexts.pop_back();
  return call.result;
}

EXPORTED CudaResult cuStreamCreate(CudaStream* stream, unsigned flags) {
  const Call call("cuStreamCreate");
  if (call.refused()) return call.result;
  if (flags != pysnap::kCudaNonBlockingStream)
    state().violate("a stream that the default stream waits for");
  state().streams.push_back(std::make_unique<CUstream_st>(CUstream_st{call.device(), {}, false}));
  *stream = state().streams.back().get();
  state().created.insert(*stream);
  return 0;
}

EXPORTED CudaResult cuStreamDestroy_v2(CudaStream stream) {
  const Call call("cuStreamDestroy_v2");
  if (state().created.erase(stream) == 0) {
    state().violate("a stream destroyed that does not exist");
  } else if (stream->queue.empty()) {
    auto& streams = state().streams;
    streams.erase(std::find_if(streams.begin(), streams.end(),
                               [&](const auto& known) { return known.get() == stream; }));
  }
  // Else what is queued still runs.
  return call.result;
}

EXPORTED CudaResult cuStreamQuery(CudaStream stream) {
  const Call call("cuStreamQuery");
  if (call.refused()) return call.result;
  return call.find_stream(stream)->queue.empty() ? 0 : pysnap::kCudaNotReady;
}

EXPORTED CudaResult cuStreamIsCapturing(CudaStream stream, pysnap::CudaCaptureStatus* status) {
  const Call call("cuStreamIsCapturing");
  if (call.refused()) return call.result;
  *status = call.find_stream(stream)->capturing ? 1 : pysnap::kCudaNotCapturing;
  return 0;
}

EXPORTED CudaResult cuThreadExchangeStreamCaptureMode(pysnap::CudaCaptureMode* mode) {
  const Call call("cuThreadExchangeStreamCaptureMode", Call::kNothing);
  if (!call.refused()) std::swap(*mode, stack.capture_mode);
  return call.result;
}

EXPORTED CudaResult cuStreamWaitEvent(CudaStream stream, CudaEvent event, unsigned) {
  const Call call("cuStreamWaitEvent");
  if (call.refused()) return call.result;
  call.check_event(event);
  call.queue(call.find_stream(stream), {Operation::kWait, event->mark, nullptr});
  return 0;
}

EXPORTED CudaResult cuEventCreate(CudaEvent* event, unsigned) {
  const Call call("cuEventCreate");
  if (call.refused()) return call.result;
  *event = new CUevent_st{call.device(), nullptr};
  state().events.insert(*event);
  return 0;
}

EXPORTED CudaResult cuEventDestroy_v2(CudaEvent event) {
  const Call call("cuEventDestroy_v2");
  if (state().events.erase(event) == 0) {
    state().violate("an event destroyed that does not exist");
  } else {
    delete event;
  }
  return call.result;
}

EXPORTED CudaResult cuEventRecord(CudaEvent event, CudaStream stream) {
  const Call call("cuEventRecord");
  if (call.refused()) return call.result;
  call.check_event(event);
  event->mark = std::make_shared<Mark>();
  call.queue(call.find_stream(stream), {Operation::kRecord, event->mark, nullptr});
  return 0;
}

EXPORTED CudaResult cuEventQuery(CudaEvent event) {
  const Call call("cuEventQuery");
  if (call.refused()) return call.result;
  call.check_event(event);
  return event->mark == nullptr || event->mark->done ? 0 : pysnap::kCudaNotReady;
}

EXPORTED CudaResult cuMemAlloc_v2(CudaAddress* address, std::size_t size) {
  const Call call("cuMemAlloc_v2");
  if (call.refused()) return call.result;
  *address = allocate_memory(call.device(), size, true);
  return 0;
}

EXPORTED CudaResult cuMemFree_v2(CudaAddress address) {
  const Call call("cuMemFree_v2");
  auto memory = state().memory.find(address);
  if (memory == state().memory.end() || !memory->second.by_driver) {
    state().violate("memory freed that was not allocated");
  } else {
    state().memory.erase(memory);
  }
  return call.result;
}

EXPORTED CudaResult cuMemHostRegister_v2(void* memory, std::size_t size, unsigned flags) {
  const Call call("cuMemHostRegister_v2");
  if (call.refused()) return call.result;
  State& s = state();
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  if (flags != pysnap::kCudaPortable) s.violate("registered for one context only");
  if (address % kPage != 0 || size % kPage != 0) s.violate("registered without alignment");
  if (!is_mapped(memory, size)) s.violate("registered without being mapped");
  if (is_registered(memory, 1)) s.violate("registered twice");
  s.registered[address] = size;
  return 0;
}

EXPORTED CudaResult cuMemHostUnregister(void* memory) {
  const Call call("cuMemHostUnregister");
  auto found = state().registered.find(reinterpret_cast<std::uintptr_t>(memory));
  if (found == state().registered.end()) {
    state().violate("unregistered without being registered");
    return kInvalidValue;
  }
  if (!is_mapped(memory, found->second)) state().violate("unmapped before it was unregistered");
  state().registered.erase(found);
  return call.result;
}

EXPORTED CudaResult cuMemcpyDtoHAsync_v2(void* to, CudaAddress from, std::size_t size,
                                         CudaStream stream) {
  Call call("cuMemcpyDtoHAsync_v2");
  if (call.refused()) return call.result;
  const int device = call.device();
  const auto mark = std::make_shared<Mark>();
  const bool pageable = !is_registered(to, size);
  call.queue(call.find_stream(stream), {Operation::kDownload, mark, [=] {
                                          if (!pageable && !is_registered(to, size))
                                            state().violate("unregistered during a copy");
                                          if (const std::uint8_t* bytes = find(from, size, device))
                                            std::memcpy(to, bytes, size);
                                        }});
  if (pageable) {
    ++state().pageable_copies;
    state().changed.wait(call.lock, [&] { return mark->done; });
  }
  return 0;
}

EXPORTED CudaResult cuMemcpyHtoDAsync_v2(CudaAddress to, const void* from, std::size_t size,
                                         CudaStream stream) {
  const Call call("cuMemcpyHtoDAsync_v2");
  if (call.refused()) return call.result;
  const int device = call.device();
  const bool pageable = !is_registered(from, size);
  const auto* bytes = static_cast<const std::uint8_t*>(from);
  // Of pageable memory the driver takes a copy before it returns.
  std::vector<std::uint8_t> copy;
  if (pageable) {
    ++state().pageable_copies;
    copy.assign(bytes, bytes + size);
  }
  call.queue(call.find_stream(stream), {Operation::kCopy, nullptr, [=] {
                                          if (!pageable && !is_registered(from, size))
                                            state().violate("unregistered during a copy");
                                          if (std::uint8_t* target = find(to, size, device))
                                            std::memcpy(target, pageable ? copy.data() : bytes,
                                                        size);
                                        }});
  return 0;
}

EXPORTED CudaResult cuMemcpyDtoDAsync_v2(CudaAddress to, CudaAddress from, std::size_t size,
                                         CudaStream stream) {
  const Call call("cuMemcpyDtoDAsync_v2");
  if (call.refused()) return call.result;
  const int device = call.device();
  call.queue(call.find_stream(stream), {Operation::kCopy, nullptr, [=] {
                                          std::uint8_t* target = find(to, size, device);
                                          const std::uint8_t* bytes = find(from, size, device);
                                          if (target != nullptr && bytes != nullptr)
                                            std::memmove(target, bytes, size);
                                        }});
  return 0;
}

// The one module there is: that of csrc/piece_kernel.cpp.
EXPORTED CudaResult cuModuleLoadData(CudaModule* module, const void* image) {
  const Call call("cuModuleLoadData");
  if (call.refused()) return call.result;
  if (std::strstr(static_cast<const char*>(image), ".entry copy_pieces(") == nullptr)
    return kInvalidValue;
  *module = new CUmod_st{call.device()};
  state().modules.insert(*module);
  return 0;
}

EXPORTED CudaResult cuModuleUnload(CudaModule module) {
  const Call call("cuModuleUnload");
  if (state().modules.erase(module) == 0) {
    state().violate("a module unloaded that does not exist");
  } else {
    delete module;
  }
  return call.result;
}

EXPORTED CudaResult cuModuleGetFunction(CudaFunction* function, CudaModule module,
                                        const char* name) {
  const Call call("cuModuleGetFunction");
  if (call.refused()) return call.result;
  if (module->device != call.device()) state().violate("a module of another device");
  if (std::string(name) != "copy_pieces") return kInvalidValue;
  *function = &state().functions[module->device];
  return 0;
}

// What the kernel does, block by block; it counts as a copy.
EXPORTED CudaResult cuLaunchKernel(CudaFunction function, unsigned x, unsigned y, unsigned z,
                                   unsigned threads, unsigned threads_y, unsigned threads_z,
                                   unsigned shared, CudaStream stream, void** parameters,
                                   void** extra) {
  const Call call("cuLaunchKernel");
  if (call.refused()) return call.result;
  const int device = call.device();
  if (function->device != device) state().violate("a function of another device");
  if (x < 1 || x > pysnap::kPiecesPerLaunch || y < 1 || y > 65535 || z != 1 || threads < 1 ||
      threads > 1024 || threads_y != 1 || threads_z != 1 || shared != 0 || extra != nullptr) {
    state().violate("a launch that the kernel is not made for");
  }
  const pysnap::Pieces pieces = *static_cast<const pysnap::Pieces*>(parameters[0]);
  const bool is_trial = std::all_of(pieces.begin(), pieces.begin() + x,
                                    [](const pysnap::Piece& piece) { return piece.length == 0; });
  const Operation::Kind kind = is_trial ? Operation::kTrial : Operation::kCopy;
  call.queue(call.find_stream(stream), {kind, nullptr, [=] {
                                          for (unsigned i = 0; i < x; ++i) {
                                            const pysnap::Piece& piece = pieces[i];
                                            if (piece.length == 0) continue;
                                            std::uint8_t* to = find(piece.to, piece.length, device);
                                            const std::uint8_t* from =
                                                find(piece.from, piece.length, device);
                                            if (to != nullptr && from != nullptr)
                                              std::memcpy(to, from, piece.length);
                                          }
                                        }});
  return 0;
}

#define SAME_TYPE(name) static_assert(std::is_same_v<decltype(&name), decltype(CudaDriver::name)>)
SAME_TYPE(cuInit);
SAME_TYPE(cuGetErrorString);
SAME_TYPE(cuDeviceGetCount);
SAME_TYPE(cuDeviceGet);
SAME_TYPE(cuDeviceGetPCIBusId);
SAME_TYPE(cuDevicePrimaryCtxRetain);
SAME_TYPE(cuDevicePrimaryCtxRelease_v2);
SAME_TYPE(cuCtxPushCurrent_v2);
SAME_TYPE(cuCtxPopCurrent_v2);
SAME_TYPE(cuStreamCreate);
SAME_TYPE(cuStreamDestroy_v2);
SAME_TYPE(cuStreamQuery);
SAME_TYPE(cuStreamIsCapturing);
SAME_TYPE(cuThreadExchangeStreamCaptureMode);
SAME_TYPE(cuStreamWaitEvent);
SAME_TYPE(cuEventCreate);
SAME_TYPE(cuEventDestroy_v2);
SAME_TYPE(cuEventRecord);
SAME_TYPE(cuEventQuery);
SAME_TYPE(cuMemAlloc_v2);
SAME_TYPE(cuMemFree_v2);
SAME_TYPE(cuMemHostRegister_v2);
SAME_TYPE(cuMemHostUnregister);
SAME_TYPE(cuMemcpyDtoHAsync_v2);
SAME_TYPE(cuMemcpyHtoDAsync_v2);
SAME_TYPE(cuMemcpyDtoDAsync_v2);
SAME_TYPE(cuModuleLoadData);
SAME_TYPE(cuModuleUnload);
SAME_TYPE(cuModuleGetFunction);
SAME_TYPE(cuLaunchKernel);

namespace {

class Lock {
 public:
  explicit Lock(std::mutex& mutex) : lock_(mutex) {}

 private:
  const Inside inside_;
  const std::lock_guard<std::mutex> lock_;
};

void finish() {
  const Inside inside;
  State& s = state();
  std::unique_lock<std::mutex> lock(s.mutex);
  s.changed.wait(lock, [&] {
    return std::all_of(s.streams.begin(), s.streams.end(),
                       [](const auto& stream) { return stream->queue.empty(); });
  });
}

void reset() {
  State& s = state();
  {
    const Lock lock(s.mutex);
    s.late = FakeCuda::kNothing;
    std::fill_n(s.held, kDevices, false);
    s.held_calls.clear();
  }
  finish();
  const Lock lock(s.mutex);
  s.memory.clear();
  s.streams.resize(kDevices);
  s.created.clear();
  std::fill_n(s.lost, kDevices, false);
  s.device_count = kDevices;
  s.calls.clear();
  s.failures.clear();
  s.failing_copy = 0;
  s.pageable_copies = 0;
  s.violation.clear();
}

std::uint64_t allocate(int device, std::size_t size) {
  const Lock lock(state().mutex);
  return allocate_memory(device, size, false);
}

void free_memory(std::uint64_t address) {
  const Lock lock(state().mutex);
  state().memory.erase(address);
}

int device_of(std::uint64_t address) {
  return std::prev(state().memory.upper_bound(address))->second.device;
}

void poke(std::uint64_t address, const void* bytes, std::size_t size) {
  const Lock lock(state().mutex);
  if (size > 0) std::memcpy(find(address, size, device_of(address)), bytes, size);
}

void peek(std::uint64_t address, void* bytes, std::size_t size) {
  const Lock lock(state().mutex);
  if (size > 0) std::memcpy(bytes, find(address, size, device_of(address)), size);
}

std::uintptr_t make_stream(int device) {
  const Lock lock(state().mutex);
  state().streams.push_back(std::make_unique<CUstream_st>(CUstream_st{device, {}, false}));
  return reinterpret_cast<std::uintptr_t>(state().streams.back().get());
}

void fill(int device, std::uintptr_t stream, std::uint64_t address, std::uint8_t byte,
          std::size_t size) {
  State& s = state();
  const Lock lock(s.mutex);
  CUstream_st* on = stream == 0 ? s.streams[static_cast<std::size_t>(device)].get()
                                : reinterpret_cast<CUstream_st*>(stream);
  on->queue.push_back({Operation::kKernel, nullptr, [=] {
                         if (std::uint8_t* bytes = find(address, size, device))
                           std::memset(bytes, byte, size);
                       }});
  s.last_queued = std::chrono::steady_clock::now();
  s.changed.notify_all();
}

void set_late(FakeCuda::Late late) {
  const Lock lock(state().mutex);
  state().late = late;
}

void hold(int device) {
  const Lock lock(state().mutex);
  for (int i = 0; i < kDevices; ++i) state().held[i] = state().held[i] || device < 0 || device == i;
}

void hold_calls(const char* function) {
  const Lock lock(state().mutex);
  state().held_calls.insert(function);
}

void release() {
  const Lock lock(state().mutex);
  std::fill_n(state().held, kDevices, false);
  state().held_calls.clear();
  state().changed.notify_all();
}

void fail_call(const char* function, unsigned nth, int result) {
  const Lock lock(state().mutex);
  state().failures[function] = {nth, result};
}

void fail_copy(unsigned nth) {
  const Lock lock(state().mutex);
  state().failing_copy = nth;
}

void set_capturing(std::uintptr_t stream, bool capturing) {
  const Lock lock(state().mutex);
  reinterpret_cast<CUstream_st*>(stream)->capturing = capturing;
}

void set_device_count(int count) {
  const Lock lock(state().mutex);
  state().device_count = count;
}

unsigned calls(const char* function) {
  const Lock lock(state().mutex);
  return state().calls[function];
}

bool is_inside() { return stack.inside > 0; }

unsigned pageable_copies() {
  const Lock lock(state().mutex);
  return state().pageable_copies;
}

std::size_t registered() {
  const Lock lock(state().mutex);
  std::size_t size = 0;
  for (const auto& [address, length] : state().registered) size += length;
  return size;
}

const char* violation() {
  const Lock lock(state().mutex);
  if (!stack.contexts.empty()) state().violate("the calling thread has a context left");
  if (stack.capture_mode != 0) state().violate("the calling thread has another capture mode");
  return state().violation.c_str();
}

const char* leaks() {
  State& s = state();
  const Lock lock(s.mutex);
  s.leaks.clear();
  auto count = [&](const char* what, std::size_t number) {
    if (number > 0) s.leaks += std::to_string(number) + " " + what + "; ";
  };
  count("contexts", static_cast<std::size_t>(s.retained[0] + s.retained[1]));
  count("streams", s.created.size());
  count("events", s.events.size());
  count("modules", s.modules.size());
  count("registrations", s.registered.size());
  count("allocations",
        static_cast<std::size_t>(std::count_if(s.memory.begin(), s.memory.end(),
                                               [](const auto& m) { return m.second.by_driver; })));
  return s.leaks.c_str();
}

}  // namespace

EXPORTED const FakeCuda* fake_cuda() {
  static const FakeCuda controls{reset,
                                 allocate,
                                 free_memory,
                                 poke,
                                 peek,
                                 make_stream,
                                 fill,
                                 set_late,
                                 hold,
                                 hold_calls,
                                 release,
                                 finish,
                                 fail_call,
                                 fail_copy,
                                 set_capturing,
                                 set_device_count,
                                 calls,
                                 is_inside,
                                 pageable_copies,
                                 registered,
                                 violation,
                                 leaks};
  return &controls;
}
