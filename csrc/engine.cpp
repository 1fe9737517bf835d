#include "engine.h"

#include <algorithm>
#include <cerrno>
#include <exception>

#include "buffer.h"
#include "digest.h"
#include "thread.h"
#include "trace.h"

namespace pysnap {

namespace {

constexpr std::uint64_t kSampled = 256u << 10;
constexpr std::uint64_t kSample = 64;
// Longer than any run; keeps the arithmetic of time points in range.
constexpr std::chrono::hours kForever{24 * 365 * 100};
// A device keeps no more than this for clones.
constexpr std::uint64_t kMostCloned = std::uint64_t{64} << 20;
// Writes in flight that keep a disk busy: with one, it is idle between two.
constexpr unsigned kBusy = 2;
// A disk that answers all that is in flight at once is idle until the next write comes: the more is
// in flight, the less often. More than four do little.
constexpr unsigned kLeastWriters = 4;

// Objects of a forked child are never destroyed: their mutexes may be locked by threads that do not
// exist there.
template <typename T>
std::shared_ptr<T> owned_by_process(T* object) {
  return std::shared_ptr<T>(object, [owner = ::getpid()](T* pointer) {
    if (::getpid() == owner) delete pointer;
  });
}

struct Interruption {};

void poll(const Interrupted& interrupted) {
  if (interrupted && interrupted()) throw Interruption{};
}

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Job::Job(Engine& engine, std::vector<Extent> extents, std::vector<Span> spans, std::size_t eager)
    : engine_(engine), spans_(std::move(spans)), eager_(eager), chunks_(spans_.size()) {
  std::uint64_t covered = 0;
  for (const Span& span : spans_) {
    if (span.raw == 0 || span.raw > engine_.options_.chunk_size ||
        static_cast<std::uint8_t>(span.element) >= kElementCount ||
        span.raw % element_width(span.element) != 0) {
      throw Error(ErrorKind::kInvalid,
                  "a span of " + std::to_string(span.raw) + " bytes is no chunk");
    }
    chunk_starts_.push_back(covered);
    covered += span.raw;
  }
  if (eager_ > spans_.size()) {
    throw Error(ErrorKind::kInvalid, std::to_string(eager_) + " of " +
                                         std::to_string(spans_.size()) + " chunks cannot be eager");
  }
  const std::uint64_t eager_end = eager_ < spans_.size() ? chunk_starts_[eager_] : covered;
  std::uint64_t stream = 0;
  auto add = [&](const Extent& extent) {
    extents_.push_back(extent);
    extent_starts_.push_back(stream);
    stream += extent.length;
    if (stream <= eager_end) eager_extents_ = extents_.size();
    if (devices_.count(extent.device) == 0)
      devices_[extent.device] = engine_.staging_->device(extent.device);
  };
  for (const Extent& extent : extents) {
    // No extent is eager in part.
    const std::uint64_t first = std::min(extent.length, eager_end - std::min(stream, eager_end));
    if (first > 0) add({extent.address, first, extent.device});
    if (first < extent.length) add({extent.address + first, extent.length - first, extent.device});
  }
  if (covered != stream) {
    throw Error(ErrorKind::kInvalid, "the spans cover " + std::to_string(covered) +
                                         " bytes of a stream of " + std::to_string(stream));
  }
}

bool Job::capture(const Streams& streams, const Interrupted& interrupted) {
  engine_.check_process();
  order(devices_, streams, &Device::follow);
  // Whatever is eager may be changed by what the caller queues next.
  const bool overlaps = eager_ < spans_.size();
  const Devices uncloned = overlaps ? clone_eager() : Devices();
  if (overlaps) order(devices_, streams, &Device::gate);
  {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    copy_limit_ = eager_;
  }
  engine_.copies_.notify_all();
  const bool completed = copy_until_done(interrupted);
  if (!completed) abort();
  order(overlaps ? uncloned : devices_, streams, &Device::gate);
  if (completed) take_samples();
  {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    holding_ = false;
    copy_limit_ = spans_.size();
  }
  engine_.wake_workers();
  engine_.copies_.notify_all();
  engine_.progress_.notify_all();
  return completed;
}

bool Job::gate(const Streams& streams, const Interrupted& interrupted) {
  engine_.check_process();
  if (!copy_until_done(interrupted)) return false;
  order(devices_, streams, &Device::gate);
  return true;
}

// Has devices copy their eager extents to memory of their own. The devices that do not, whose eager
// extents are read where they are.
Devices Job::clone_eager() {
  Devices others;
  {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    if (failure_) return others;
    // The engine is not closed meanwhile.
    ++copying_;
  }
  std::list<Landing> landing;
  std::optional<Error> failure;
  try {
    landing.push_back({self_.lock(), 0, InFlight(Slot(nullptr, nullptr))});
    for (const auto& [index, device] : devices_) {
      std::vector<Source> sources;
      for (std::size_t i = 0; i < eager_extents_; ++i) {
        if (extents_[i].device == index)
          sources.push_back({extents_[i].address, extents_[i].length});
      }
      if (sources.empty()) continue;
      landing.front().flight.enter(*device);
      std::optional<std::uint64_t> at = device->clone(sources);
      if (!at) others.insert({index, device});
      for (std::size_t i = 0; at && i < eager_extents_; ++i) {
        if (extents_[i].device != index) continue;
        extents_[i].address = *at;
        *at += extents_[i].length;
      }
    }
  } catch (const std::exception& caught) {
    failure = Error::from(caught);
  }
  if (!landing.empty()) landing.front().flight.mark();
  std::lock_guard<std::mutex> lock(engine_.mutex_);
  --copying_;
  if (failure) fail(*failure);
  hand_to_lander(landing);
  engine_.progress_.notify_all();
  return others;
}

void Job::take_samples() {
  try {
    for (std::size_t chunk = eager_; chunk < spans_.size(); ++chunk)
      samples_.push_back(sample(chunk, nullptr));
  } catch (const std::exception& caught) {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    fail(Error::from(caught));
  }
}

// A copy that is in no order may read what another step wrote: the job fails.
void Job::order(const Devices& devices, const Streams& streams,
                void (Device::*order)(StreamHandle)) {
  try {
    order_streams(devices, streams, order);
  } catch (const std::exception& caught) {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    fail(Error::from(caught));
  }
}

// Copies beside the helpers until nothing is left that may be copied and nobody copies any more;
// false if interrupted.
bool Job::copy_until_done(const Interrupted& interrupted) {
  try {
    copy(interrupted, engine_.options_.disk_timeout);
  } catch (const Interruption&) {
    return false;
  }
  // Not interruptible: the helpers are in the middle of a chunk at most, and the caller may free
  // its tensors after this.
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  engine_.progress_.wait(lock, [&] { return copying_ == 0; });
  return true;
}

void Job::copy(const Interrupted& interrupted, std::chrono::milliseconds patience) {
  for (;;) {
    {
      std::lock_guard<std::mutex> lock(engine_.mutex_);
      if (!may_copy()) return;
    }
    try {
      std::optional<Slot> slot = wait_for_slot(interrupted, patience);
      if (slot) copy_next(std::move(*slot));
    } catch (const std::exception& caught) {
      std::lock_guard<std::mutex> lock(engine_.mutex_);
      fail(Error::from(caught));
    }
  }
}

// Null once there is nothing to copy any more. Throws Error(kIo, ETIMEDOUT) where for `patience` no
// chunk has got a slot.
std::optional<Slot> Job::wait_for_slot(const Interrupted& interrupted,
                                       std::chrono::milliseconds patience) {
  using Clock = std::chrono::steady_clock;
  std::optional<Slot> slot = engine_.staging_->slots().try_acquire();
  std::size_t seen = 0;
  Clock::time_point moved = Clock::now();
  while (!slot) {
    {
      std::lock_guard<std::mutex> lock(engine_.mutex_);
      if (!may_copy()) break;
      holding_ = false;
      if (next_copy_ != seen) moved = Clock::now();
      seen = next_copy_;
    }
    if (Clock::now() - moved >= patience)
      throw Error::io("waiting for the disk to take", "what fills the staging memory", ETIMEDOUT);
    engine_.wake_workers();
    slot = engine_.staging_->slots().acquire(kPoll);
    if (!slot) poll(interrupted);
  }
  return slot;
}

void Job::copy_next(Slot slot) {
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  if (!may_copy()) return;
  const std::size_t chunk = next_copy_++;
  ++copying_;
  lock.unlock();
  // Made before the copies: where memory runs out later, they are waited for all the same.
  std::list<Landing> landing;
  std::optional<Error> failure;
  try {
    const trace::Scope scope(trace::Phase::kCopy, spans_[chunk].raw);
    landing.push_back({self_.lock(), chunk, InFlight(std::move(slot))});
    InFlight& flight = landing.front().flight;
    stage(chunk, flight);
    failure = flight.failure;
    if (chunk >= eager_ && !(sample(chunk, flight.slot.data()) == samples_[chunk - eager_]))
      failure = Error::torn(chunk);
  } catch (const std::exception& caught) {
    failure = Error::from(caught);
  }
  lock.lock();
  --copying_;
  if (failure) fail(*failure);
  // Of a failed job, too: its slot may be used again only when the devices are done with it.
  hand_to_lander(landing);
  if (!landing.empty()) hand_to_workers(staged_, {chunk, std::move(landing.front().flight.slot)});
  // Whoever waits for copies, waits for all of them.
  if (copying_ == 0) engine_.progress_.notify_all();
  engine_.wake_another();
}

// Gives what devices copy to the lander; the list keeps what is there already.
void Job::hand_to_lander(std::list<Landing>& landing) {
  if (landing.empty() || landing.front().flight.fences.empty()) return;
  ++landing_;
  engine_.landing_.splice(engine_.landing_.end(), landing);
  engine_.landed_.notify_one();
}

// Gives a chunk that is there to the workers; of a job that has failed, the slot goes back.
void Job::hand_to_workers(std::deque<Staged>& queue, Staged staged) {
  if (failure_) return;
  try {
    queue.push_back(std::move(staged));
  } catch (const std::exception& caught) {
    fail(Error::from(caught));
  }
}

// Copies the chunk, or has devices copy it; a failure of a device is kept in the result, for others
// may be copying.
void Job::stage(std::size_t chunk, InFlight& flight) const {
  std::uint64_t position = chunk_starts_[chunk];
  const std::uint64_t end = position + spans_[chunk].raw;
  std::uint8_t* to = flight.slot.data();
  // The last extent that starts at or before the chunk; those of no length before it do not matter.
  std::size_t i = std::upper_bound(extent_starts_.begin(), extent_starts_.end(), position) -
                  extent_starts_.begin() - 1;
  try {
    while (position < end) {
      // A stretch of extents on one device.
      const DeviceIndex index = extents_[i].device;
      std::uint8_t* const start = to;
      std::vector<Source> sources;
      for (; position < end && extents_[i].device == index; ++i) {
        const std::uint64_t skip = position - extent_starts_[i];
        const std::uint64_t length = std::min(extents_[i].length - skip, end - position);
        if (length == 0) continue;
        sources.push_back({extents_[i].address + skip, static_cast<std::size_t>(length)});
        to += length;
        position += length;
      }
      if (sources.empty()) continue;
      Device& device = *devices_.at(index);
      flight.enter(device);
      device.read(start, sources);
    }
  } catch (const std::exception& caught) {
    flight.failure = Error::from(caught);
  }
  flight.mark();
}

// The first bytes of each host extent in a chunk, and of every kSampled bytes of it: where they
// are, or in their copy.
Digest Job::sample(std::size_t chunk, const std::uint8_t* copy) const {
  const std::uint64_t start = chunk_starts_[chunk];
  const std::uint64_t end = start + spans_[chunk].raw;
  std::vector<std::uint8_t> bytes;
  std::size_t i = std::upper_bound(extent_starts_.begin(), extent_starts_.end(), start) -
                  extent_starts_.begin() - 1;
  for (std::uint64_t position = start; position < end; ++i) {
    const Extent& extent = extents_[i];
    const std::uint64_t last = std::min(extent_starts_[i] + extent.length, end);
    for (std::uint64_t at = position; at < last && extent.device == kHost; at += kSampled) {
      const std::uint64_t address = extent.address + (at - extent_starts_[i]);
      const std::uint8_t* from =
          copy != nullptr
              ? copy + (at - start)
              : reinterpret_cast<const std::uint8_t*>(static_cast<std::uintptr_t>(address));
      bytes.insert(bytes.end(), from, from + std::min(kSample, last - at));
    }
    position = std::max(position, last);
  }
  return xxh3_128(bytes.data(), bytes.size());
}

void Job::open_pack(const std::string& path) {
  engine_.check_process();
  std::uint64_t expected = 0;
  for (const Span& span : spans_) expected += round_up(span.raw, kPageSize);
  std::shared_ptr<PackWriter> pack;
  try {
    pack = std::make_shared<PackWriter>(path, expected, engine_.options_.direct_io);
  } catch (const std::exception& caught) {
    const Error error = Error::from(caught);
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    fail(error);
    throw error;
  }
  {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    if (failure_) throw *failure_;
    pack_ = std::move(pack);
  }
  engine_.wake_workers();
  engine_.progress_.notify_all();
}

bool Job::wait_staged(std::chrono::milliseconds timeout) {
  engine_.check_process();
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  return engine_.progress_.wait_for(
      lock, timeout, [&] { return is_idle() && (failure_ || next_copy_ == spans_.size()); });
}

bool Job::wait_written(std::chrono::milliseconds timeout) {
  engine_.check_process();
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  const bool done =
      engine_.progress_.wait_for(lock, timeout, [&] { return failure_ || is_written(); });
  if (failure_) throw *failure_;
  return done;
}

WrittenPack Job::finish() {
  engine_.check_process();
  std::shared_ptr<PackWriter> pack;
  {
    std::unique_lock<std::mutex> lock(engine_.mutex_);
    if (!failure_ && !is_written())
      throw Error(ErrorKind::kInvalid, "finish() before every chunk is written");
    pack = std::move(pack_);
    if (failure_) {
      end(lock);
      throw *failure_;
    }
  }
  // The engine takes the next job only when this one's pack is durable: its writes would delay the
  // sync.
  try {
    const std::uint64_t size = pack->finish();
    std::unique_lock<std::mutex> lock(engine_.mutex_);
    end(lock);
    return {std::move(chunks_), size};
  } catch (const std::exception& caught) {
    const Error error = Error::from(caught);
    std::unique_lock<std::mutex> lock(engine_.mutex_);
    fail(error);
    end(lock);
    throw error;
  }
}

void Job::abort() {
  engine_.check_process();
  // Closed after the lock is given back: closing a file that was deleted frees its space, which may
  // take long.
  std::shared_ptr<PackWriter> pack;
  std::unique_lock<std::mutex> lock(engine_.mutex_);
  fail(aborted_);
  pack = std::move(pack_);
  end(lock);
}

// Past the page cache, a write takes next to no time of the processors.
bool Job::may_write() const { return pack_ != nullptr && pack_->is_direct() && is_next_raw(); }

bool Job::may_work() const {
  if (pack_ == nullptr) return false;
  return may_digest() || (!staged_.empty() && !may_write() && (!holding_ || is_next_raw()));
}

bool Job::may_digest() const { return !holding_ && !written_ahead_.empty(); }

bool Job::is_next_raw() const {
  return !staged_.empty() && engine_.writes_raw(spans_[staged_.front().chunk].element);
}

Job::Staged Job::take(std::deque<Staged>& queue) {
  Staged staged = std::move(queue.front());
  queue.pop_front();
  return staged;
}

// What a worker does next: a chunk is written, as long as that keeps the disk busy, else one that
// was written is digested.
void Job::work(std::unique_lock<std::mutex>& lock, Encoder& encoder) {
  const bool is_busy = staged_.empty() || may_write() || writing_ >= kBusy;
  if (may_digest() && is_busy) return digest(lock);
  if (!holding_ && engine_.encodes(spans_[staged_.front().chunk].element))
    return encode(lock, encoder);
  write_raw(lock, engine_.options_.workers);
}

// One of `threads` that do that.
void Job::write_raw(std::unique_lock<std::mutex>& lock, unsigned threads) {
  Staged staged = take(staged_);
  const Span& span = spans_[staged.chunk];
  // What is written beside the copy says nothing of what comes after it.
  const bool is_usual = !holding_;
  double seconds = 0;
  ++writing_;
  const bool done = unlocked(lock, [&](PackWriter& pack) {
    const trace::Scope scope(trace::Phase::kWrite, span.raw);
    const Stopwatch watch;
    staged.offset = pack.append(staged.slot.data(), span.raw);
    seconds = watch.seconds();
  });
  --writing_;
  if (!done) return;
  if (is_usual) engine_.choice_.learn_raw(span.element, span.raw, seconds, threads);
  hand_to_workers(written_ahead_, std::move(staged));
}

void Job::encode(std::unique_lock<std::mutex>& lock, Encoder& encoder) {
  Staged staged = take(staged_);
  const Span& span = spans_[staged.chunk];
  StoredChunk chunk{0, span.raw, span.raw, span.element, Encoding::kRaw, 0, {}};
  double encoding = 0;
  double seconds = 0;
  ++writing_;
  const bool done = unlocked(lock, [&](PackWriter& pack) {
    encoder.make_ready(engine_.options_);
    std::uint8_t* data = staged.slot.data();
    trace::Scope scope(trace::Phase::kEncode, span.raw);
    chunk.digest = xxh3_128(data, span.raw);
    const Stopwatch watch;
    // Raw, where it does not get smaller.
    if (const std::size_t size =
            encoder.planes->encode(span.element, data, span.raw, encoder.out.get())) {
      data = encoder.out.get();
      chunk.stored = static_cast<std::uint32_t>(size);
      chunk.encoding = Encoding::kPlanes;
    }
    encoding = watch.seconds();
    scope.next(trace::Phase::kWrite, chunk.stored);
    chunk.offset = pack.append(data, chunk.stored);
    seconds = watch.seconds();
    staged.slot = Slot(nullptr, nullptr);
  });
  --writing_;
  if (!done) return;
  engine_.choice_.learn_encoded(span.element, span.raw, seconds, encoding);
  note_written(staged.chunk, chunk);
}

void Job::digest(std::unique_lock<std::mutex>& lock) {
  Staged staged = take(written_ahead_);
  const Span& span = spans_[staged.chunk];
  StoredChunk chunk{0, span.raw, span.raw, span.element, Encoding::kRaw, *staged.offset, {}};
  const bool done = unlocked(lock, [&](PackWriter&) {
    const trace::Scope scope(trace::Phase::kEncode, span.raw);
    chunk.digest = xxh3_128(staged.slot.data(), span.raw);
    staged.slot = Slot(nullptr, nullptr);
  });
  if (done) note_written(staged.chunk, chunk);
}

// Runs `task` without the lock; false, and the job has failed, if it throws.
template <typename Task>
bool Job::unlocked(std::unique_lock<std::mutex>& lock, const Task& task) {
  std::shared_ptr<PackWriter> pack = pack_;
  lock.unlock();
  std::optional<Error> failure;
  try {
    task(*pack);
  } catch (const std::exception& caught) {
    failure = Error::from(caught);
  }
  // Closing a file that was deleted meanwhile frees its space, which may take long.
  pack.reset();
  lock.lock();
  if (failure) fail(*failure);
  return !failure;
}

void Job::note_written(std::size_t index, const StoredChunk& chunk) {
  chunks_[index] = chunk;
  if (++written_ == spans_.size()) engine_.progress_.notify_all();
}

// The first failure is the one that is told.
void Job::fail(const Error& error) {
  if (!failure_) failure_ = error;
  staged_.clear();
  written_ahead_.clear();
  engine_.progress_.notify_all();
}

// The caller may free its tensors after this, and the engine takes the next job.
void Job::end(std::unique_lock<std::mutex>& lock) {
  engine_.progress_.wait(lock, [&] { return copying_ == 0; });
  engine_.progress_.wait_for(lock, engine_.options_.device_timeout, [&] { return is_idle(); });
  if (engine_.active_.get() == this) engine_.active_.reset();
}

std::shared_ptr<Engine> Engine::create(EngineOptions options) {
  if (options.chunk_size == 0 || options.chunk_size > kLargestChunk ||
      options.chunk_size % kPageSize != 0) {
    throw Error(ErrorKind::kInvalid, "the chunk size must be a multiple of " +
                                         std::to_string(kPageSize) + " bytes, at most " +
                                         std::to_string(kLargestChunk));
  }
  if (options.slots < 2 || options.workers < 1 || options.copy_threads < 1) {
    throw Error(ErrorKind::kInvalid,
                "an engine needs two slots, a worker and a copying thread at least");
  }
  std::shared_ptr<Engine> engine = owned_by_process(new Engine(std::move(options)));
  engine->start();
  return engine;
}

Engine::Engine(EngineOptions options)
    : options_(std::move(options)),
      writers_(std::max(kLeastWriters, options_.workers)),
      owner_(::getpid()),
      staging_(std::make_shared<Staging>(options_.chunk_size, options_.slots)),
      choice_(options_.workers) {}

Engine::~Engine() { close(); }

void Engine::check_process() const {
  if (::getpid() != owner_) {
    throw Error(ErrorKind::kClosed,
                "this engine belongs to the process that created it, not to a forked child");
  }
}

void Engine::start() {
  const unsigned helpers = std::max(1u, options_.copy_threads - 1);
  threads_.reserve(std::size_t{options_.workers} + writers_ + helpers);
  for (unsigned i = 0; i < options_.workers; ++i) {
    threads_.push_back(start_thread("pysnap-work", [this] { work(); }, options_.nice));
  }
  for (unsigned i = 0; i < writers_; ++i) {
    threads_.push_back(start_thread("pysnap-write", [this] { write(); }));
  }
  lander_ = start_thread("pysnap-land", [this] { land(); });
  // One helper at least: without it, what is copied lazily would wait for the gate.
  for (unsigned i = 0; i < helpers; ++i) {
    threads_.push_back(start_thread("pysnap-copy", [this] { help_copy(); }));
  }
}

void Engine::reserve(std::uint64_t bytes, const std::vector<DeviceIndex>& devices,
                     std::uint64_t eager) {
  check_process();
  for (DeviceIndex index : devices) {
    const std::shared_ptr<Device> opened = staging_->device(index);
    if (eager <= kMostCloned) opened->reserve_clone(static_cast<std::size_t>(eager));
  }
  staging_->slots().reserve(static_cast<std::size_t>(bytes / options_.chunk_size + 1));
}

void Engine::wait_reserved() {
  check_process();
  staging_->slots().wait_reserved();
}

std::string Engine::why_pageable() const {
  check_process();
  return staging_->slots().why_pageable();
}

std::shared_ptr<Staging> Engine::staging() {
  check_process();
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) throw Error(ErrorKind::kClosed, "the engine is closed");
  return staging_;
}

std::shared_ptr<Job> Engine::begin(std::vector<Extent> extents, std::vector<Span> spans,
                                   std::size_t eager) {
  check_process();
  std::shared_ptr<Job> job =
      owned_by_process(new Job(*this, std::move(extents), std::move(spans), eager));
  job->self_ = job;
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) throw Error(ErrorKind::kClosed, "the engine is closed");
  if (active_ != nullptr) throw Error(ErrorKind::kInvalid, "another snapshot is in flight");
  active_ = job;
  return job;
}

void Engine::close() {
  check_process();
  std::shared_ptr<Job> job;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    job = std::move(active_);
    active_.reset();
    if (job != nullptr) job->fail(closed_);
  }
  wake_workers();
  copies_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    // The caller may be in the middle of a chunk.
    if (job != nullptr) progress_.wait(lock, [&] { return job->copying_ == 0; });
    last_landing_ = std::chrono::steady_clock::now() + options_.device_timeout;
  }
  landed_.notify_all();
  if (lander_.joinable()) lander_.join();
  staging_->close();
}

// Waits for what devices copy, the oldest first, and hands it to the workers; of a job that has
// failed, the slot goes back.
void Engine::land() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    landed_.wait(lock, [&] { return last_landing_ || !landing_.empty(); });
    if (landing_.empty()) return;
    InFlight& oldest = landing_.front().flight;
    lock.unlock();
    bool over = true;
    std::optional<Error> failure;
    try {
      const trace::Scope scope(trace::Phase::kLand);
      over = oldest.wait(kPoll);
    } catch (const Error& error) {
      failure = error;
    }
    lock.lock();
    if (!over && (!last_landing_ || std::chrono::steady_clock::now() < *last_landing_)) continue;
    std::list<Landing> landed;
    landed.splice(landed.end(), landing_, landing_.begin());
    Landing& landing = landed.front();
    Job& job = *landing.job;
    --job.landing_;
    if (failure) job.fail(*failure);
    // A clone has no slot.
    if (over && landing.flight.slot.data() != nullptr)
      job.hand_to_workers(job.staged_, {landing.chunk, std::move(landing.flight.slot)});
    progress_.notify_all();
    wake_another();
    lock.unlock();
    if (!over) abandon(std::move(landing.flight));
    landed.clear();
    lock.lock();
  }
}

void Engine::help_copy() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    copies_.wait(lock, [&] { return closing_ || (active_ != nullptr && active_->may_copy()); });
    if (closing_) return;
    std::shared_ptr<Job> job = active_;
    lock.unlock();
    // Nobody waits for it.
    job->copy(nullptr, kForever);
    job.reset();
    lock.lock();
  }
}

void Engine::write() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    writes_.wait(lock, [&] { return closing_ || (active_ != nullptr && active_->may_write()); });
    if (closing_) return;
    const std::shared_ptr<Job> job = active_;
    job->write_raw(lock, writers_);
    wake_another();
  }
}

void Engine::work() {
  Encoder encoder;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return closing_ || (active_ != nullptr && active_->may_work()); });
    if (closing_) return;
    const std::shared_ptr<Job> job = active_;
    job->work(lock, encoder);
    wake_another();
  }
}

void Engine::wake_workers() {
  writes_.notify_all();
  work_.notify_all();
}

// One that has something to do now; mutex_ is held. A thread that is woken for nothing takes the
// processor from those that copy.
void Engine::wake_another() {
  if (active_ == nullptr) return;
  if (active_->may_write()) writes_.notify_one();
  if (active_->may_work()) work_.notify_one();
}

void Encoder::make_ready(const EngineOptions& options) {
  if (planes) return;
  out = make_buffer(options.chunk_size);
  planes.emplace(options.zstd, options.codec == Codec::kSmall ? Effort::kSmall : Effort::kFast);
}

// With mutex_ held.
bool Engine::encodes(Element element) {
  if (options_.codec == Codec::kAuto) return choice_.encodes(element);
  return options_.codec != Codec::kNone;
}

// With mutex_ held. False where it is not certain.
bool Engine::writes_raw(Element element) const {
  if (options_.codec == Codec::kAuto) return choice_.is_raw(element);
  return options_.codec == Codec::kNone;
}

}  // namespace pysnap
