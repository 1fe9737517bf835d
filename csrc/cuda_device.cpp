#include "cuda_device.h"

#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "cuda_driver.h"
#include "error.h"
#include "file.h"
#include "numa.h"
#include "piece_kernel.h"

namespace pysnap {

namespace {

// What is shorter crosses the bus together with its neighbours, through memory of this size.
constexpr std::size_t kShort = std::size_t{1} << 20;
constexpr std::size_t kScratch = std::size_t{4} << 20;
// Memory for clones is a multiple of it.
constexpr std::size_t kCloneUnit = std::size_t{2} << 20;

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

// While it lives, the context is current in the calling thread, and a CUDA graph that another
// thread captures does not forbid (nor is it spoilt by) what the calling thread does: nothing here
// is part of a graph.
class Current {
 public:
  explicit Current(const PrimaryContext& context)
      : driver_(context.driver()), result_(driver_.cuCtxPushCurrent_v2(context.get())) {
    exchanged_ = driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_) == kCudaSuccess;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    if (exchanged_) driver_.cuThreadExchangeStreamCaptureMode(&capture_mode_);
    CudaContext popped = nullptr;
    if (result_ == kCudaSuccess) driver_.cuCtxPopCurrent_v2(&popped);
  }

  bool ok() const { return result_ == kCudaSuccess; }
  // Nothing of the context runs any more, or ever will.
  bool is_gone() const {
    return result_ == kCudaDeinitialized || result_ == kCudaInvalidContext ||
           result_ == kCudaContextIsDestroyed;
  }
  void check() const { driver_.check(result_, "entering the context"); }

 private:
  const CudaDriver& driver_;
  const CudaResult result_;
  CudaCaptureMode capture_mode_ = kCudaCaptureRelaxed;  // then what it was before
  bool exchanged_ = false;
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

// Whether what is queued on `stream` now becomes part of a graph and does not run.
bool is_capturing(const CudaDriver& driver, CudaStream stream) {
  CudaCaptureStatus status = kCudaNotCapturing;
  driver.check(driver.cuStreamIsCapturing(stream, &status), "asking a stream about a capture");
  return status != kCudaNotCapturing;
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
    try {
      scratch_ = allocate(kScratch);
      if (std::optional<PieceKernel> kernel = PieceKernel::load(this->driver(), stream_))
        kernel_.emplace(std::move(*kernel));
      numa_node_ = find_numa_node(device);
    } catch (...) {
      release();
      throw;
    }
  }
  ~CudaDevice() override {
    const Current current(context_);
    release();
  }

  void follow(StreamHandle stream) override {
    const Current current(context_);
    current.check();
    if (is_capturing(driver(), to_stream(stream))) {
      throw Error(ErrorKind::kDevice,
                  "the current stream captures a CUDA graph, and a snapshot cannot be a part of "
                  "it: take it outside the capture");
    }
    chain(driver(), to_stream(stream), stream_);
  }

  void gate(StreamHandle stream) override {
    const Current current(context_);
    current.check();
    // What is captured does not run now, and so changes nothing.
    if (is_capturing(driver(), to_stream(stream))) return;
    chain(driver(), stream_, to_stream(stream));
  }

  void read(void* slot, const std::vector<Source>& sources) override {
    const Current current(context_);
    current.check();
    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    auto* to = static_cast<std::uint8_t*>(slot);
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < sources.size();) {
      pieces.clear();
      std::size_t length = 0;
      for (; i < sources.size() && fits(sources[i].length, length); ++i) {
        pieces.push_back({sources[i].address, scratch_ + length, sources[i].length});
        length += sources[i].length;
      }
      if (pieces.size() > 1) {
        copy_within(pieces);
        copy_out(to, scratch_, length);
      } else {
        if (pieces.empty()) pieces.push_back({sources[i].address, 0, sources[i++].length});
        length = pieces.front().length;
        copy_out(to, pieces.front().from, length);
      }
      to += length;
    }
  }

  // The mirror image of read(), but for a driver without the kernel: then copies within the device
  // would only be added to those over the bus.
  void write(const void* slot, const std::vector<Place>& places) override {
    const Current current(context_);
    current.check();
    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    const auto* from = static_cast<const std::uint8_t*>(slot);
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < places.size();) {
      pieces.clear();
      const std::size_t start = places[i].offset;
      std::size_t end = start;
      for (; kernel_ && i < places.size() && places[i].offset >= end &&
             fits(places[i].length, places[i].offset - start);
           ++i) {
        pieces.push_back(
            {scratch_ + (places[i].offset - start), places[i].address, places[i].length});
        end = places[i].offset + places[i].length;
      }
      if (pieces.size() > 1) {
        copy_in(scratch_, from + start, end - start);
        copy_within(pieces);
      } else {
        if (pieces.empty()) pieces.push_back({0, places[i].address, places[i++].length});
        copy_in(pieces.front().to, from + start, pieces.front().length);
      }
    }
  }

  std::unique_ptr<Fence> fence() override;

  void reserve_clone(std::size_t size) override {
    const Current current(context_);
    current.check();
    const std::lock_guard<std::mutex> lock(clone_mutex_);
    if (clone_ != 0 || size == 0) return;
    clone_size_ = round_up(size, kCloneUnit);
    clone_ = allocate(clone_size_);
  }

  std::optional<std::uint64_t> clone(const std::vector<Source>& sources) override {
    const Current current(context_);
    current.check();
    const std::lock_guard<std::mutex> lock(clone_mutex_);
    std::vector<Piece> pieces;
    std::size_t length = 0;
    for (const Source& source : sources) {
      pieces.push_back({source.address, clone_ + length, source.length});
      length += source.length;
    }
    if (clone_ == 0 || length > clone_size_) return std::nullopt;
    copy_within(pieces);
    return clone_;
  }

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

  std::optional<int> numa_node() const override { return numa_node_; }

  const PrimaryContext& context() const { return context_; }
  const CudaDriver& driver() const { return context_.driver(); }
  CudaStream stream() const { return stream_; }

 private:
  void copy_out(void* to, CudaAddress address, std::size_t length) {
    driver().check(driver().cuMemcpyDtoHAsync_v2(to, address, length, stream_),
                   "a copy from the device");
  }

  void copy_in(CudaAddress to, const void* from, std::size_t length) {
    driver().check(driver().cuMemcpyHtoDAsync_v2(to, from, length, stream_),
                   "a copy to the device");
  }
  void copy_within(const std::vector<Piece>& pieces) {
    std::vector<Piece> small;
    for (const Piece& piece : pieces) {
      if (kernel_ && piece.length < kShort) {
        small.push_back(piece);
      } else {
        driver().check(driver().cuMemcpyDtoDAsync_v2(piece.to, piece.from, piece.length, stream_),
                       "a copy in device memory");
      }
    }
    if (!small.empty()) kernel_->copy(small, stream_);
  }

  // Whether `length` bytes at `at` may cross through the scratch memory.
  bool fits(std::size_t length, std::size_t at) const {
    return scratch_ != 0 && length < kShort && at + length <= kScratch;
  }
  // With the context current.
  void release() {
    for (const CudaAddress memory : {scratch_, clone_}) {
      if (memory != 0) driver().cuMemFree_v2(memory);
    }
    kernel_.reset();
    driver().cuStreamDestroy_v2(stream_);
  }
  // 0 where there is none.
  CudaAddress allocate(std::size_t size) const {
    CudaAddress memory = 0;
    return driver().cuMemAlloc_v2(&memory, size) == kCudaSuccess ? memory : 0;
  }
  std::optional<int> find_numa_node(int device) const {
    char bus[32] = "";
    if (driver().cuDeviceGetPCIBusId(bus, sizeof(bus), device) != kCudaSuccess) return std::nullopt;
    return numa_node_of_pci(bus);
  }

  // Constant after construction.
  const PrimaryContext context_;
  CudaStream stream_ = nullptr;
  CudaAddress scratch_ = 0;  // 0 where there is none
  std::optional<PieceKernel> kernel_;
  std::optional<int> numa_node_;

  // The scratch memory belongs to one read or write at a time, until its copies are queued.
  std::mutex scratch_mutex_;

  std::mutex clone_mutex_;
  // Guarded by clone_mutex_.
  CudaAddress clone_ = 0;  // 0 where there is none
  std::size_t clone_size_ = 0;
};

// Keeps the device open: its stream and scratch memory are in use until then.
class CudaFence : public Fence {
 public:
  explicit CudaFence(std::shared_ptr<const CudaDevice> device) : device_(std::move(device)) {
    const Current current(device_->context());
    if (!current.ok()) return;
    try {
      event_.emplace(device_->driver());
    } catch (const Error&) {
    }
  }
  ~CudaFence() override {
    const Current current(device_->context());
    event_.reset();
  }

  void mark() noexcept override {
    const Current current(device_->context());
    recorded_ = current.ok() && event_ &&
                device_->driver().cuEventRecord(event_->get(), device_->stream()) == kCudaSuccess;
  }

  bool is_complete() override {
    const CudaDriver& driver = device_->driver();
    const Current current(device_->context());
    // That says nothing of the copies: they may go on.
    if (!current.ok() && !current.is_gone()) return false;
    current.check();
    const CudaResult result =
        recorded_ ? driver.cuEventQuery(event_->get()) : driver.cuStreamQuery(device_->stream());
    if (result == kCudaNotReady) return false;
    // Nor does a call that was refused, unless the stream has nothing more to do.
    if (result != kCudaSuccess && driver.cuStreamQuery(device_->stream()) == kCudaNotReady)
      return false;
    driver.check(result, "a copy between host and device");
    return true;
  }

 private:
  const std::shared_ptr<const CudaDevice> device_;
  std::optional<Event> event_;
  // Without a recorded event, the copies are complete when the stream is idle.
  bool recorded_ = false;
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
