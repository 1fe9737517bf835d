#include "cuda_device.h"

#include <mutex>
#include <string>
#include <utility>

#include "cuda_driver.h"
#include "error.h"

namespace pysnap {

namespace {

// Sources below this length are gathered.
constexpr std::size_t kShort = std::size_t{1} << 20;
// Where they are gathered.
constexpr std::size_t kScratch = std::size_t{4} << 20;

// The primary context of a device, retained.
class PrimaryContext {
 public:
  PrimaryContext(std::shared_ptr<const CudaDriver> driver, int device)
      : driver_(std::move(driver)), device_(device) {
    driver_->check(driver_->cuDevicePrimaryCtxRetain(&context_, device_), "retaining the context");
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() { driver_->cuDevicePrimaryCtxRelease_v2(device_); }

  const CudaDriver& driver() const { return *driver_; }
  CudaContext get() const { return context_; }

 private:
  const std::shared_ptr<const CudaDriver> driver_;
  const int device_;
  CudaContext context_ = nullptr;
};

// While it lives, the context is current in the calling thread.
class Current {
 public:
  explicit Current(const PrimaryContext& context)
      : driver_(context.driver()), result_(driver_.cuCtxPushCurrent_v2(context.get())) {}
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    CudaContext popped = nullptr;
    if (result_ == kCudaSuccess) driver_.cuCtxPopCurrent_v2(&popped);
  }

  bool ok() const { return result_ == kCudaSuccess; }
  void check() const { driver_.check(result_, "entering the context"); }

 private:
  const CudaDriver& driver_;
  const CudaResult result_;
};

// An event of the current context. May be destroyed while streams still wait for it.
class Event {
 public:
  explicit Event(const CudaDriver& driver) : driver_(driver) {
    driver_.check(driver_.cuEventCreate(&event_, kCudaEventWithoutTiming), "creating an event");
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { driver_.cuEventDestroy_v2(event_); }

  void record(CudaStream stream) {
    driver_.check(driver_.cuEventRecord(event_, stream), "recording an event");
  }
  CudaEvent get() const { return event_; }

 private:
  const CudaDriver& driver_;
  CudaEvent event_ = nullptr;
};

// `later` waits for what is queued on `earlier` now.
void chain(const CudaDriver& driver, CudaStream earlier, CudaStream later) {
  Event event(driver);
  event.record(earlier);
  driver.check(driver.cuStreamWaitEvent(later, event.get(), 0), "making a stream wait");
}

CudaStream to_stream(StreamHandle handle) { return reinterpret_cast<CudaStream>(handle); }

class CudaDevice : public Device, public std::enable_shared_from_this<CudaDevice> {
 public:
  CudaDevice(std::shared_ptr<const CudaDriver> driver, int device)
      : context_(std::move(driver), device) {
    const Current current(context_);
    current.check();
    this->driver().check(this->driver().cuStreamCreate(&stream_, kCudaNonBlockingStream),
                         "creating a stream");
    if (this->driver().cuMemAlloc_v2(&scratch_, kScratch) != kCudaSuccess) scratch_ = 0;
  }
  ~CudaDevice() override {
    const Current current(context_);
    if (scratch_ != 0) driver().cuMemFree_v2(scratch_);
    driver().cuStreamDestroy_v2(stream_);
  }

  void follow(StreamHandle stream) override {
    const Current current(context_);
    current.check();
    chain(driver(), to_stream(stream), stream_);
  }

  void gate(StreamHandle stream) override {
    const Current current(context_);
    current.check();
    chain(driver(), stream_, to_stream(stream));
  }

  void read(void* slot, const std::vector<Source>& sources) override {
    const Current current(context_);
    current.check();
    // The scratch memory belongs to one gathering at a time.
    const std::lock_guard<std::mutex> lock(gathering_);
    auto* to = static_cast<std::uint8_t*>(slot);
    for (std::size_t i = 0; i < sources.size();) {
      std::size_t end = i;
      std::size_t length = 0;
      while (end < sources.size() && sources[end].length < kShort &&
             length + sources[end].length <= kScratch) {
        length += sources[end++].length;
      }
      if (scratch_ == 0 || end - i < 2) {
        length = sources[i].length;
        copy_out(to, sources[i].address, length);
        ++i;
      } else {
        CudaAddress at = scratch_;
        for (; i < end; at += sources[i++].length) {
          driver().check(
              driver().cuMemcpyDtoDAsync_v2(at, sources[i].address, sources[i].length, stream_),
              "a copy in device memory");
        }
        copy_out(to, scratch_, length);
      }
      to += length;
    }
  }

  void write(std::uint64_t address, const void* slot, std::size_t length) override {
    const Current current(context_);
    current.check();
    driver().check(driver().cuMemcpyHtoDAsync_v2(address, slot, length, stream_),
                   "a copy to the device");
  }

  std::unique_ptr<Fence> fence() override;

  void pin(void* memory, std::size_t size) override {
    const Current current(context_);
    current.check();
    driver().check(driver().cuMemHostRegister_v2(memory, size, kCudaPortable),
                   "registering staging memory");
  }

  void unpin(void* memory) noexcept override {
    const Current current(context_);
    driver().cuMemHostUnregister(memory);
  }

  const PrimaryContext& context() const { return context_; }
  const CudaDriver& driver() const { return context_.driver(); }
  CudaStream stream() const { return stream_; }

 private:
  void copy_out(void* to, CudaAddress address, std::size_t length) {
    driver().check(driver().cuMemcpyDtoHAsync_v2(to, address, length, stream_),
                   "a copy from the device");
  }

  // Constant after construction.
  const PrimaryContext context_;
  CudaStream stream_ = nullptr;
  CudaAddress scratch_ = 0;  // 0 where there is none

  std::mutex gathering_;
};

// Keeps the device open: its stream and scratch memory are in use until then.
class CudaFence : public Fence {
 public:
  explicit CudaFence(std::shared_ptr<const CudaDevice> device) : device_(std::move(device)) {
    const Current current(device_->context());
    try {
      current.check();
      event_.emplace(device_->driver());
      event_->record(device_->stream());
    } catch (const Error&) {
      // Without an event, the copies are complete when the stream is idle.
      event_.reset();
    }
  }
  ~CudaFence() override {
    const Current current(device_->context());
    event_.reset();
  }

  bool is_complete() override {
    const CudaDriver& driver = device_->driver();
    const Current current(device_->context());
    current.check();
    const CudaResult result =
        event_ ? driver.cuEventQuery(event_->get()) : driver.cuStreamQuery(device_->stream());
    if (result == kCudaNotReady) return false;
    driver.check(result, "a copy between host and device");
    return true;
  }

 private:
  const std::shared_ptr<const CudaDevice> device_;
  std::optional<Event> event_;
};

std::unique_ptr<Fence> CudaDevice::fence() {
  return std::make_unique<CudaFence>(shared_from_this());
}

}  // namespace

std::shared_ptr<Device> open_cuda_device(DeviceIndex index) {
  std::shared_ptr<const CudaDriver> driver = CudaDriver::open();
  if (index < 0 || index >= driver->device_count()) {
    throw Error(ErrorKind::kInvalid, "there is no CUDA device " + std::to_string(index) +
                                         "; the driver finds " +
                                         std::to_string(driver->device_count()));
  }
  int device = 0;
  driver->check(driver->cuDeviceGet(&device, index), "opening the device");
  return std::make_shared<CudaDevice>(std::move(driver), device);
}

}  // namespace pysnap
