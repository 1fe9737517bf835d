#include "restore.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "buffer.h"
#include "codec.h"
#include "copy.h"
#include "digest.h"
#include "error.h"
#include "file.h"
#include "in_flight.h"
#include "mapping.h"
#include "slot_pool.h"
#include "thread.h"
#include "trace.h"

namespace pysnap {

namespace {

// A piece of a chunk and where it goes.
struct Piece {
  std::size_t offset;
  std::size_t length;
  std::uint64_t address;
  Device* device;  // null: host memory
};

// Of a file in the page cache, so much is read and then digested: it is still in the second cache
// of the processor's core.
constexpr std::size_t kAtOnce = std::size_t{512} << 10;
// Of checking a chunk in turns with copying the one before.
constexpr std::size_t kTurn = 1024;
constexpr std::chrono::milliseconds kNoWait{0};
// How much of a pack that is read in place may count as resident memory of this process.
constexpr std::uint64_t kMostResident = 32u << 20;

// A pack that is read by several threads.
class OpenPack {
 public:
  // A pack that cannot be read is told only when a chunk of it is needed.
  explicit OpenPack(const PackFile& pack) {
    try {
      file_.emplace(File::open(pack.path));
      const std::uint64_t size = file_->size();
      if (size != pack.size) {
        failure_ = Error::corrupt(
            pack.path, -1,
            "it has " + std::to_string(size) + " bytes instead of " + std::to_string(pack.size));
      }
    } catch (const Error& error) {
      failure_ = error;
    }
    if (!failure_) mapping_ = Mapping::create(*file_, pack.size);
  }

  const std::string& path() const { return file_->path(); }

  // Throws why it cannot be read.
  void check() const {
    if (failure_) throw *failure_;
  }

  // Whether these bytes seem to be in the page cache, and may be looked at there.
  bool is_cached(std::uint64_t offset, std::size_t length) const {
    return mapping_ != nullptr && offset + length <= mapping_->size() &&
           mapping_->is_cached(offset, length);
  }

  // Where they are then.
  const std::uint8_t* in_place(std::uint64_t offset) const { return mapping_->data() + offset; }

  // False where the file ends before. Throws Error(kIo).
  bool read(std::uint8_t* buffer, std::size_t length, std::uint64_t offset) const {
    return file_->read_at(buffer, length, offset) == length;
  }

  // Whether bytes that were read in place may have been zeros that stood in for them.
  bool lost() const { return mapping_->lost(); }

  // `length` bytes that were read in place are not needed any more.
  void release(std::size_t length) {
    const std::uint64_t before = read_in_place_.fetch_add(length);
    if (before / kMostResident != (before + length) / kMostResident) mapping_->release();
  }

 private:
  std::optional<File> file_;
  std::optional<Error> failure_;
  std::unique_ptr<const Mapping> mapping_;
  std::atomic<std::uint64_t> read_in_place_{0};
};

// One thread's means: reads one chunk at a time and hands out its checked raw bytes. What is to be
// copied of them is copied while the next chunk is checked.
class ChunkReader {
 public:
  ChunkReader(std::deque<OpenPack>& packs, const std::vector<StoredChunk>& chunks,
              std::size_t largest, std::shared_ptr<const Zstd> zstd)
      : packs_(packs),
        chunks_(chunks),
        zstd_(std::move(zstd)),
        stored_(make_buffer(largest)),
        raw_(make_buffer(largest)),
        raw_before_(make_buffer(largest)) {}

  // Calls use(raw bytes, copies) once the bytes are checked; they stay for what it adds to the
  // copies, until finish() or the end of the next read(), in memory of this reader or in the page
  // cache. With a `slot`, which has room for any chunk, they are left in there, and what use() adds
  // is copied when read() returns. Throws Error(kCorrupt), also for the chunk before, or
  // Error(kIo).
  template <typename Use>
  void read(std::size_t index, std::uint8_t* slot, Use use) {
    const StoredChunk& chunk = chunks_[index];
    trace::Scope scope(trace::Phase::kRead, chunk.raw);
    OpenPack& pack = packs_[chunk.pack];
    pack.check();
    std::swap(raw_, raw_before_);
    std::uint8_t* const own = slot != nullptr ? slot : raw_.get();
    const bool encoded = chunk.encoding == Encoding::kPlanes;
    const bool cached = !encoded && pack.is_cached(chunk.offset, padded(chunk));
    const bool stays = cached && slot == nullptr;
    // The disk may take so long that pages of the one before, which was checked, are read anew.
    if (!stays && in_place_) finish();
    const std::uint8_t* raw = own;
    Digest digest;
    if (encoded) {
      // Not from where it is: the bytes of a file may change under the decoder.
      read_file(index, stored_.get(), padded(chunk), [](std::size_t) {});
      decode(index, own);
      digest = digest_of(raw, chunk.raw);
    } else if (stays) {
      raw = pack.in_place(chunk.offset);
      check_padding(index, raw);
      digest = digest_of(raw, chunk.raw);
    } else {
      GrowingDigest growing(own, chunk.raw);
      read_file(index, own, cached ? kAtOnce : padded(chunk),
                [&growing](std::size_t there) { growing.advance(there); });
      digest = growing.finish();
    }
    finish();
    if (digest != chunk.digest) throw damage(index, "its bytes do not match their digest");
    if (raw != own) in_place_ = index;
    scope.next(trace::Phase::kPut, chunk.raw);
    use(raw, copies_);
    if (slot != nullptr) finish();
  }

  // Makes the copies that are left. Throws Error(kCorrupt).
  void finish() {
    copies_.finish();
    if (!in_place_) return;
    const std::size_t index = *std::exchange(in_place_, std::nullopt);
    OpenPack& pack = packs_[chunks_[index].pack];
    if (pack.lost()) throw damage(index, "the file was cut short, or could not be read, meanwhile");
    pack.release(padded(chunks_[index]));
  }

 private:
  static std::size_t padded(const StoredChunk& chunk) { return round_up(chunk.stored, kPageSize); }

  // Reads a chunk as it is stored, so much at once; `there` is told each time how much has come.
  template <typename There>
  void read_file(std::size_t index, std::uint8_t* buffer, std::size_t at_once, There there) {
    const StoredChunk& chunk = chunks_[index];
    const std::size_t end = padded(chunk);
    for (std::size_t at = 0; at < end; at += at_once) {
      const std::size_t length = std::min(at_once, end - at);
      if (!packs_[chunk.pack].read(buffer + at, length, chunk.offset + at))
        throw damage(index, "the file ends before it");
      there(at + length);
    }
    check_padding(index, buffer);
  }

  void check_padding(std::size_t index, const std::uint8_t* stored) const {
    const StoredChunk& chunk = chunks_[index];
    if (std::any_of(stored + chunk.stored, stored + padded(chunk),
                    [](std::uint8_t byte) { return byte != 0; })) {
      throw damage(index, "the bytes behind it are not zero");
    }
  }

  // What is in stored_.
  void decode(std::size_t index, std::uint8_t* raw) {
    const StoredChunk& chunk = chunks_[index];
    // It has tables and memory of its own, which raw chunks do without.
    if (!decoder_) decoder_.emplace(zstd_);
    if (!decoder_->decode(chunk.element, stored_.get(), chunk.stored, raw, chunk.raw))
      throw damage(index, "it cannot be decoded");
  }

  // In turns with the copies of the chunk before.
  Digest digest_of(const std::uint8_t* raw, std::size_t size) {
    GrowingDigest digest(raw, size);
    for (std::size_t at = kTurn; at < size && !copies_.empty(); at += kTurn) {
      digest.advance(at);
      copies_.take_turn();
    }
    return digest.finish();
  }

  Error damage(std::size_t index, const char* what) const {
    return Error::corrupt(packs_[chunks_[index].pack].path(), static_cast<std::int64_t>(index),
                          what);
  }

  std::deque<OpenPack>& packs_;
  const std::vector<StoredChunk>& chunks_;
  const std::shared_ptr<const Zstd> zstd_;
  std::optional<PlanesDecoder> decoder_;
  Buffer stored_;
  Buffer raw_;
  Buffer raw_before_;
  PendingCopies copies_;                 // of the chunk before
  std::optional<std::size_t> in_place_;  // that chunk, where it is read in the page cache
};

// The chunk table comes from a file: nothing in it is believed before it is checked here.
std::uint64_t check_table(const std::vector<PackFile>& packs,
                          const std::vector<StoredChunk>& chunks) {
  std::uint64_t stream = 0;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    const StoredChunk& chunk = chunks[i];
    const bool valid = chunk.pack < packs.size() && chunk.raw > 0 && chunk.raw <= kLargestChunk &&
                       chunk.stored > 0 && chunk.stored <= chunk.raw &&
                       static_cast<std::uint8_t>(chunk.element) < kElementCount &&
                       static_cast<std::uint8_t>(chunk.encoding) <= 1 &&
                       chunk.raw % element_width(chunk.element) == 0 &&
                       (chunk.encoding == Encoding::kRaw) == (chunk.stored == chunk.raw) &&
                       chunk.offset % kPageSize == 0 && chunk.offset <= packs[chunk.pack].size &&
                       chunk.stored <= packs[chunk.pack].size - chunk.offset;
    if (!valid)
      throw Error(ErrorKind::kInvalid,
                  "row " + std::to_string(i) + " of the chunk table is not valid");
    stream += chunk.raw;
  }
  return stream;
}

// Takes checked chunks to devices, out of pinned slots, while the next ones are read.
class Uploads {
 public:
  // Takes no more than `most` of the slots, which must outlive it: one for each thread, and as many
  // that are copied from.
  Uploads(SlotPool& slots, std::size_t most, std::chrono::milliseconds device_timeout)
      : slots_(slots), most_(most), device_timeout_(device_timeout) {}
  Uploads(const Uploads&) = delete;
  Uploads& operator=(const Uploads&) = delete;
  // What failed or was interrupted must not leave copies that read memory which is gone.
  ~Uploads() {
    const auto deadline = std::chrono::steady_clock::now() + device_timeout_;
    for (std::list<InFlight> flight = oldest(); !flight.empty(); flight = oldest()) {
      try {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
            deadline - std::chrono::steady_clock::now());
        if (!flight.front().wait(left)) abandon(std::move(flight.front()));
      } catch (const Error&) {
        // The failure before it is the one that is told.
      }
    }
  }

  // Null if `stopped` ended the wait. Throws Error(kDevice) for a chunk before.
  std::optional<Slot> wait_for_slot(const Interrupted& stopped) {
    for (;;) {
      // One that was used a moment ago is still in the caches.
      std::list<InFlight> flight = oldest();
      if (!flight.empty() && flight.front().wait(kNoWait)) return std::move(flight.front().slot);
      std::optional<Slot> slot = take(kNoWait);
      if (slot) {
        put_back(flight);
        return slot;
      }
      if (!flight.empty()) {
        if (!wait(flight, stopped)) return std::nullopt;
        return std::move(flight.front().slot);
      }
      // Other threads have all of them in their hands, or the pool still grows.
      slot = take(kPoll);
      if (slot || stopped()) return slot;
    }
  }

  // Queues the copies of what is in `slot` to those of the places that are on devices. Throws
  // Error(kDevice).
  void start(Slot slot, const std::vector<Piece>& pieces) {
    std::map<Device*, std::vector<Place>> uploads;
    for (const Piece& piece : pieces) {
      if (piece.device != nullptr)
        uploads[piece.device].push_back({piece.address, piece.offset, piece.length});
    }
    // Made before the copies: where memory runs out later, they are waited for all the same.
    std::list<InFlight> flight;
    flight.emplace_back(std::move(slot));
    std::exception_ptr failure;
    try {
      for (const auto& [device, places] : uploads) {
        flight.front().enter(*device);
        device->write(flight.front().slot.data(), places);
      }
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    flight.front().mark();
    keep(flight);
    if (failure) std::rethrow_exception(failure);
  }

  // Returns when every copy has ended; false if `interrupted`. Throws Error(kDevice).
  bool finish(const Interrupted& interrupted) {
    for (std::list<InFlight> flight = oldest(); !flight.empty(); flight = oldest()) {
      if (!wait(flight, interrupted)) return false;
    }
    return true;
  }

 private:
  bool wait(std::list<InFlight>& flight, const Interrupted& stopped) {
    while (!flight.front().wait(kPoll)) {
      if (!stopped || !stopped()) continue;
      keep(flight);
      return false;
    }
    return true;
  }

  // One more of the pool's slots, if `most_` are not taken yet and it has one, or gets one in time.
  std::optional<Slot> take(std::chrono::milliseconds patience) {
    std::optional<Slot> slot;
    if (taken_++ < most_)
      slot = patience == kNoWait ? slots_.try_acquire() : slots_.acquire(patience);
    if (!slot) --taken_;
    return slot;
  }

  // A list of one, or of none.
  std::list<InFlight> oldest() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::list<InFlight> flight;
    if (!in_flight_.empty()) flight.splice(flight.end(), in_flight_, in_flight_.begin());
    return flight;
  }

  void keep(std::list<InFlight>& flight) {
    std::lock_guard<std::mutex> lock(mutex_);
    in_flight_.splice(in_flight_.end(), flight);
  }

  // What oldest() gave.
  void put_back(std::list<InFlight>& flight) {
    std::lock_guard<std::mutex> lock(mutex_);
    in_flight_.splice(in_flight_.begin(), flight);
  }

  SlotPool& slots_;
  const std::size_t most_;
  const std::chrono::milliseconds device_timeout_;
  std::atomic<std::size_t> taken_{0};

  std::mutex mutex_;
  std::list<InFlight> in_flight_;
};

// `given`, or other staging memory where that has not as many slots of this size, or no longer.
std::shared_ptr<Staging> suitable(const std::shared_ptr<Staging>& given, std::size_t slot_size,
                                  std::size_t slots) {
  if (given != nullptr && given->slots().slot_size() >= slot_size &&
      given->slots().usable_slots() >= slots)
    return given;
  return std::make_shared<Staging>(slot_size, slots);
}

std::deque<OpenPack> open_packs(const std::vector<PackFile>& packs) {
  std::deque<OpenPack> opened;
  for (const PackFile& pack : packs) opened.emplace_back(pack);
  return opened;
}

std::size_t largest_chunk(const std::vector<StoredChunk>& chunks) {
  std::size_t largest = 0;
  for (const StoredChunk& chunk : chunks) largest = std::max<std::size_t>(largest, chunk.raw);
  return largest;
}

// Calls handle(reader, i, stopped) for every i below `count` on several threads, until one call
// returns false; one that waits looks whether it is stopped. Exceptions of the first failing thread
// are thrown here. False if interrupted.
bool for_each_chunk(
    std::size_t count, unsigned threads, const std::function<ChunkReader()>& make_reader,
    const std::function<bool(ChunkReader&, std::size_t, const Interrupted&)>& handle,
    const Interrupted& interrupted) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::exception_ptr failure;
  bool completed = true;
  auto run = [&](bool caller) {
    try {
      const Interrupted stopped = [&, caller] {
        if (caller && interrupted && !stop && interrupted()) {
          completed = false;
          stop = true;
        }
        return stop.load();
      };
      ChunkReader reader = make_reader();
      while (!stop) {
        const std::size_t i = next++;
        if (i >= count) {
          reader.finish();
          return;
        }
        if (stopped()) return;
        if (!handle(reader, i, stopped)) stop = true;
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
      stop = true;
    }
  };
  std::vector<std::thread> helpers;
  const std::size_t wanted = std::min<std::size_t>(threads, count);
  helpers.reserve(wanted);
  try {
    for (std::size_t i = 1; i < wanted; ++i)
      helpers.push_back(start_thread("pysnap-read", [&] { run(false); }));
  } catch (const std::exception&) {
    // Fewer threads are slower, nothing else.
  }
  {
    const UnblockedSigbus unblocked;
    run(true);
  }
  for (std::thread& helper : helpers) helper.join();
  if (failure != nullptr) std::rethrow_exception(failure);
  return completed;
}

}  // namespace

bool restore(const std::vector<PackFile>& packs, const std::vector<StoredChunk>& chunks,
             const std::vector<Target>& targets, unsigned threads, std::shared_ptr<const Zstd> zstd,
             const Streams& streams, std::shared_ptr<Staging> staging,
             const Interrupted& interrupted, std::chrono::milliseconds device_timeout) {
  const std::uint64_t stream = check_table(packs, chunks);
  std::vector<std::uint64_t> starts;
  std::uint64_t start = 0;
  for (const StoredChunk& chunk : chunks) {
    starts.push_back(start);
    start += chunk.raw;
  }
  const std::size_t largest = largest_chunk(chunks);
  const bool to_devices = std::any_of(targets.begin(), targets.end(), [](const Target& target) {
    return target.device != kHost && target.length > 0;
  });
  const std::size_t most_slots = 2 * std::size_t{std::max(1U, threads)};
  if (to_devices) staging = suitable(staging, round_up(largest, kPageSize), most_slots);
  Devices devices;
  std::vector<std::vector<Piece>> pieces(chunks.size());
  for (const Target& target : targets) {
    if (target.offset > stream || target.length > stream - target.offset) {
      throw Error(ErrorKind::kInvalid, "a target reaches past the end of the stream");
    }
    if (target.length == 0) continue;
    Device* device = nullptr;
    if (target.device != kHost) {
      std::shared_ptr<Device>& opened = devices[target.device];
      if (opened == nullptr) opened = staging->device(target.device);
      device = opened.get();
    }
    std::size_t i =
        static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), target.offset) -
                                 starts.begin()) -
        1;
    for (std::uint64_t done = 0; done < target.length; ++i) {
      const std::uint64_t skip = target.offset + done - starts[i];
      const std::uint64_t length =
          std::min<std::uint64_t>(chunks[i].raw - skip, target.length - done);
      pieces[i].push_back({skip, length, target.address + done, device});
      done += length;
    }
  }
  std::vector<std::size_t> needed;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (!pieces[i].empty()) needed.push_back(i);
  }
  std::deque<OpenPack> opened = open_packs(packs);
  order_streams(devices, streams, &Device::follow);
  std::optional<Uploads> uploads;
  if (to_devices) {
    staging->slots().reserve(std::min(needed.size(), most_slots));
    uploads.emplace(staging->slots(), most_slots, device_timeout);
  }
  const auto handle = [&](ChunkReader& reader, std::size_t i, const Interrupted& stopped) {
    const std::size_t chunk = needed[i];
    const auto copy_to_host = [&](const std::uint8_t* raw, PendingCopies& copies) {
      for (const Piece& piece : pieces[chunk]) {
        if (piece.device == nullptr)
          copies.add(reinterpret_cast<void*>(static_cast<std::uintptr_t>(piece.address)),
                     raw + piece.offset, piece.length);
      }
    };
    if (std::all_of(pieces[chunk].begin(), pieces[chunk].end(),
                    [](const Piece& piece) { return piece.device == nullptr; })) {
      reader.read(chunk, nullptr, copy_to_host);
      return true;
    }
    std::optional<Slot> slot = uploads->wait_for_slot(stopped);
    if (!slot) return false;
    reader.read(chunk, slot->data(), copy_to_host);
    uploads->start(std::move(*slot), pieces[chunk]);
    return true;
  };
  return for_each_chunk(
             needed.size(), threads, [&] { return ChunkReader(opened, chunks, largest, zstd); },
             handle, interrupted) &&
         (!uploads || uploads->finish(interrupted));
}

std::vector<Damage> verify(const std::vector<PackFile>& packs,
                           const std::vector<StoredChunk>& chunks, unsigned threads,
                           std::shared_ptr<const Zstd> zstd, const Interrupted& interrupted) {
  check_table(packs, chunks);
  std::deque<OpenPack> opened = open_packs(packs);
  const std::size_t largest = largest_chunk(chunks);
  std::mutex mutex;
  std::vector<Damage> damages;
  for_each_chunk(
      chunks.size(), threads, [&] { return ChunkReader(opened, chunks, largest, zstd); },
      [&](ChunkReader& reader, std::size_t i, const Interrupted&) {
        try {
          reader.read(i, nullptr, [](const std::uint8_t*, PendingCopies&) {});
          reader.finish();
        } catch (const Error& error) {
          if (error.kind() == ErrorKind::kInvalid) throw;
          std::lock_guard<std::mutex> lock(mutex);
          damages.push_back({i, error.what(), error.error_number()});
        }
        return true;
      },
      interrupted);
  std::sort(damages.begin(), damages.end(),
            [](const Damage& a, const Damage& b) { return a.chunk < b.chunk; });
  return damages;
}

}  // namespace pysnap
