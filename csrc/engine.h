// engine.h: the way of the bytes when a snapshot is taken: extents -> slots -> encoded chunks ->
// pack.
//
//   std::shared_ptr<Job> job = engine->begin(extents, spans, eager);
//   another thread:  job->open_pack(path); job->wait_written(...); job->finish();
//   the caller:      job->capture(streams, interrupted);  ... training ...  job->gate(stream);
//
// Threads: `copy_threads` - 1 helpers (one at least) copy beside the caller; one waits for the
// copies of devices; `workers` low-priority threads digest and encode, and write what they encode;
// writers, four or as many, which take next to no time of the processors, write past the page cache
// what is not encoded. None of them knows Python.
//
// CUDA is opened when the first of its extents is seen (or by reserve), and not before.
#pragma once

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "choice.h"
#include "device.h"
#include "digest.h"
#include "error.h"
#include "in_flight.h"
#include "pack.h"
#include "slot_pool.h"
#include "staging.h"
#include "zstd.h"

namespace pysnap {

// Which chunks are encoded: none; all, quickly; all, for the smallest files; those that go to a
// disk which is much slower than the encoder (see Choice).
enum class Codec { kNone, kFast, kSmall, kAuto };

struct EngineOptions {
  std::size_t chunk_size = 4u << 20;  // also the size of a slot; a multiple of kPageSize
  std::size_t slots = 64;             // bound of the staging memory; at least 2
  unsigned workers = 2;
  unsigned copy_threads = 2;
  int nice = 10;          // of the workers
  bool direct_io = true;  // where the file system can
  Codec codec = Codec::kNone;
  std::shared_ptr<const Zstd> zstd;  // null: only what needs none is used
  std::chrono::milliseconds device_timeout = kDeviceTimeout;
  // How long a caller waits for a slot while nothing moves: a disk that is dead must not stop it.
  std::chrono::milliseconds disk_timeout{60'000};
};

// One chunk of the stream before it is written.
struct Span {
  std::uint32_t raw;
  Element element;
};

// What finish() returns.
struct WrittenPack {
  std::vector<StoredChunk> chunks;  // in the order of the stream
  std::uint64_t size;               // length of the file
};

// Polled while the caller waits; true ends the wait and aborts the job (Ctrl-C).
using Interrupted = std::function<bool()>;
// How long a wait lasts before it looks whether it was interrupted.
constexpr std::chrono::milliseconds kPoll{100};

class Engine;
class Job;

// What a worker encodes with; made when it first does.
struct Encoder {
  std::optional<PlanesEncoder> planes;
  Buffer out;

  void make_ready(const EngineOptions& options);
};

// A chunk that devices copy to its slot, or eager chunks that they clone, without one. It stays
// where it is while the lander looks at its fences.
struct Landing {
  std::shared_ptr<Job> job;
  std::size_t chunk;
  InFlight flight;
};

// One capture on its way to disk. Made by Engine::begin; must not outlive its engine. Any method
// may be called by any thread, unless it says otherwise. A failure (of a copy, a write, the disk)
// is kept and thrown by wait_written and finish; it never leaves capture or gate, so that training
// goes on.
//
// A device's bytes are read in the order of its streams, and the caller's CPU does not wait for
// that: the copies are queued behind what `streams` have queued before capture(), and what the
// caller queues on `streams` after capture() (for eager chunks) or gate() (for all) comes after
// them. Where only a part is eager, that part is first copied within the device, into memory that
// reserve() has there: then the caller's streams wait for that and not for the bus. So the caller
// may queue work that changes a tensor then, but must neither free the tensor,
// nor change it by the CPU or on another stream, before wait_staged(). `streams` names the caller's
// current stream of every device that an extent is on; a job whose device is not named fails.
class Job {
 public:
  // Copies the eager chunks; returns when their bytes on the host have been read, and the copies of
  // those on devices are queued and ordered, or the job has failed. The lazy ones are then copied
  // in the background. Blocks for the copies of host memory, and for slots where the state is
  // larger than the staging memory: if no chunk gets one for `disk_timeout`, the job fails with
  // ETIMEDOUT. Called once, by one thread; false if `interrupted` ended it.
  // Of lazy chunks on the host a few bytes are noted: one that has others when it is copied fails
  // the job with Error(kTorn), which finds whoever writes a whole tensor.
  bool capture(const Streams& streams, const Interrupted& interrupted);

  // May not be passed before every byte has been read: on the host it copies what is left and
  // waits, on a device it makes `streams` wait. The caller waits only for device copies that could
  // not be queued before because slots ran out, as in capture(). False if `interrupted` ended the
  // wait; the job goes on.
  bool gate(const Streams& streams, const Interrupted& interrupted);

  // Creates the pack and reserves its space; from now on chunks are written. Called once. Throws
  // Error, which is then the failure of the job.
  void open_pack(const std::string& path);

  // True once no tensor is read any more: every byte is in staging memory, or the job has failed
  // and no copy is under way, on any device. False after `timeout`.
  bool wait_staged(std::chrono::milliseconds timeout);
  // True once every chunk is in the pack; false after `timeout`. Throws the failure of the job.
  bool wait_written(std::chrono::milliseconds timeout);
  // Makes the pack durable. Blocks for the disk. Throws the failure of the job, or Error(kInvalid)
  // while chunks are still to be written; in every other case the job has ended, as after abort().
  WrittenPack finish();
  // Gives up: no tensor is read any more, nothing new is written. Blocks for the chunks being
  // copied, not for a write in flight. Ends the job. Copies of a device that take longer than
  // `device_timeout` go on; their slots are not used again before they are over.
  void abort();

 private:
  friend class Engine;
  struct Staged {
    std::size_t chunk;
    Slot slot;
    // Where its raw bytes are in the pack, once they are written: ahead of their digest, for which
    // the disk does not wait.
    std::optional<std::uint64_t> offset = std::nullopt;
  };

  Job(Engine& engine, std::vector<Extent> extents, std::vector<Span> spans, std::size_t eager);
  bool copy_until_done(const Interrupted& interrupted);
  void copy(const Interrupted& interrupted, std::chrono::milliseconds patience);
  std::optional<Slot> wait_for_slot(const Interrupted& interrupted,
                                    std::chrono::milliseconds patience);
  void copy_next(Slot slot);
  void stage(std::size_t chunk, InFlight& flight) const;
  Digest sample(std::size_t chunk, const std::uint8_t* copy) const;
  Devices clone_eager();
  void take_samples();
  void order(const Devices& devices, const Streams& streams, void (Device::*order)(StreamHandle));
  // With engine_.mutex_ held:
  bool may_copy() const { return !failure_ && next_copy_ < copy_limit_; }
  bool is_idle() const { return copying_ == 0 && landing_ == 0; }
  bool is_written() const { return pack_ != nullptr && written_ == spans_.size(); }
  bool may_write() const;
  bool may_work() const;
  bool may_digest() const;
  bool is_next_raw() const;
  void work(std::unique_lock<std::mutex>& lock, Encoder& encoder);
  void write_raw(std::unique_lock<std::mutex>& lock, unsigned threads);
  void encode(std::unique_lock<std::mutex>& lock, Encoder& encoder);
  void digest(std::unique_lock<std::mutex>& lock);
  template <typename Task>
  bool unlocked(std::unique_lock<std::mutex>& lock, const Task& task);
  void note_written(std::size_t index, const StoredChunk& chunk);
  static Staged take(std::deque<Staged>& queue);
  void hand_to_lander(std::list<Landing>& landing);
  void hand_to_workers(std::deque<Staged>& queue, Staged staged);
  void fail(const Error& error);
  void end(std::unique_lock<std::mutex>& lock);

  // Constant after construction.
  Engine& engine_;
  const std::vector<Span> spans_;
  const std::size_t eager_;
  std::size_t eager_extents_ = 0;
  std::vector<std::uint64_t> extent_starts_;  // offsets in the stream
  std::vector<std::uint64_t> chunk_starts_;
  Devices devices_;
  // Made ahead: to give up needs no memory.
  const Error aborted_{ErrorKind::kClosed, "the snapshot was aborted"};
  // Set by begin. Not std::enable_shared_from_this: the module would then use this owner and not
  // its own, which aborts a job that Python drops.
  std::weak_ptr<Job> self_;

  // Written by capture() before chunks may be copied: the eager ones may move.
  std::vector<Extent> extents_;
  // Written by capture() before lazy chunks may be copied.
  std::vector<Digest> samples_;

  // Guarded by engine_.mutex_.
  std::size_t next_copy_ = 0;   // chunks below it have been given to a copying thread
  std::size_t copy_limit_ = 0;  // chunks below it may be copied now
  std::size_t copying_ = 0;     // chunks that a thread is copying
  std::size_t landing_ = 0;     // chunks that devices are copying
  std::size_t written_ = 0;
  // While the caller copies, it has the processors, as long as there are slots: chunks are only
  // written.
  bool holding_ = true;
  unsigned writing_ = 0;  // threads that are at it
  std::deque<Staged> staged_;
  std::deque<Staged> written_ahead_;  // digests are missing
  std::shared_ptr<PackWriter> pack_;
  std::vector<StoredChunk> chunks_;
  std::optional<Error> failure_;
};

// Owns the threads and the staging memory. One job at a time. In a forked child every method throws
// Error(kClosed) and destruction does nothing, as the threads do not exist there.
class Engine {
 public:
  // Starts the threads. Throws Error(kInvalid) for options that cannot be, Error(kIo) where threads
  // are refused.
  static std::shared_ptr<Engine> create(EngineOptions options);
  ~Engine();

  // Has staging memory for `bytes` (bounded by the slots) mapped and touched in the background, and
  // registered where one of `devices` is a CUDA device. Opens `devices`, and has memory made on
  // them for clones of `eager` bytes, unless that is too much to keep; throws as open_device.
  void reserve(std::uint64_t bytes, const std::vector<DeviceIndex>& devices = {},
               std::uint64_t eager = 0);
  // Blocks until that is done.
  void wait_reserved();
  // Why copies of CUDA devices are slower than need be and block the caller; empty if they are not.
  std::string why_pageable() const;
  // For a restore; not while a job is in flight, which would wait for it, nor beside close().
  std::shared_ptr<Staging> staging();

  // `extents` laid end to end are the stream, `spans` cut it into chunks; the first `eager` chunks
  // are copied by capture(), the others later. No I/O, no copy. Throws Error(kInvalid) for
  // arguments that do not fit, or while another job is in flight; and as open_device.
  std::shared_ptr<Job> begin(std::vector<Extent> extents, std::vector<Span> spans,
                             std::size_t eager);

  // Aborts the job in flight and joins the threads; blocks for a write in flight, and for copies of
  // devices up to `device_timeout`: staging memory that is still copied to then is never given
  // back. Safe to repeat.
  void close();

 private:
  friend class Job;
  explicit Engine(EngineOptions options);
  void check_process() const;
  void start();
  void write();
  void work();
  void wake_workers();
  void wake_another();
  void help_copy();
  void land();
  bool encodes(Element element);
  bool writes_raw(Element element) const;

  // Constant after construction.
  const EngineOptions options_;
  const unsigned writers_;
  const pid_t owner_;
  const Error closed_{ErrorKind::kClosed, "the engine was closed before the snapshot was written"};
  const std::shared_ptr<Staging> staging_;

  std::mutex mutex_;
  // Guarded by mutex_.
  std::condition_variable writes_;    // something for a writer, or closing
  std::condition_variable work_;      // something for a worker, or closing
  std::condition_variable copies_;    // something to copy, or closing
  std::condition_variable landed_;    // devices copy a chunk, or nothing more will land
  std::condition_variable progress_;  // a chunk was staged or written, or a job failed
  std::shared_ptr<Job> active_;
  Choice choice_;
  std::list<Landing> landing_;
  bool closing_ = false;
  // When the lander ends, whatever still flies; nothing is added from then on.
  std::optional<std::chrono::steady_clock::time_point> last_landing_;

  // Touched by create and close alone.
  std::vector<std::thread> threads_;
  std::thread lander_;
};

}  // namespace pysnap
