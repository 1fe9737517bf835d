#include "restore.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "buffer.h"
#include "codec.h"
#include "digest.h"
#include "error.h"
#include "file.h"
#include "thread.h"

namespace pysnap {

namespace {

// A piece of a chunk and where it goes.
struct Piece {
  std::size_t offset;
  std::size_t length;
  std::uint64_t address;
  Device* device;
};

// A pack, or why it cannot be read: told only when a chunk of it is needed.
struct OpenPack {
  std::optional<File> file;
  std::optional<Error> failure;
};

// One thread's means: reads one chunk at a time and hands out its checked raw bytes.
class ChunkReader {
 public:
  ChunkReader(const std::vector<OpenPack>& packs, const std::vector<StoredChunk>& chunks,
              std::size_t largest, std::shared_ptr<const Zstd> zstd)
      : packs_(packs),
        chunks_(chunks),
        decoder_(std::move(zstd)),
        stored_(make_buffer(largest)),
        raw_(make_buffer(largest)) {}

  // Valid until the next call. Throws Error(kCorrupt) or Error(kIo).
  const std::uint8_t* read(std::size_t index) {
    const StoredChunk& chunk = chunks_[index];
    if (packs_[chunk.pack].failure) throw *packs_[chunk.pack].failure;
    const File& pack = *packs_[chunk.pack].file;
    auto damage = [&](const char* what) {
      return Error::corrupt(pack.path(), static_cast<std::int64_t>(index), what);
    };
    const std::size_t padded = round_up(chunk.stored, kPageSize);
    if (pack.read_at(stored_.get(), padded, chunk.offset) != padded)
      throw damage("the file ends before it");
    if (std::any_of(stored_.get() + chunk.stored, stored_.get() + padded,
                    [](std::uint8_t byte) { return byte != 0; })) {
      throw damage("the bytes behind it are not zero");
    }
    const std::uint8_t* raw = stored_.get();
    if (chunk.encoding == Encoding::kPlanes) {
      if (!decoder_.decode(chunk.element, stored_.get(), chunk.stored, raw_.get(), chunk.raw))
        throw damage("it cannot be decoded");
      raw = raw_.get();
    }
    if (xxh3_128(raw, chunk.raw) != chunk.digest)
      throw damage("its bytes do not match their digest");
    return raw;
  }

 private:
  const std::vector<OpenPack>& packs_;
  const std::vector<StoredChunk>& chunks_;
  PlanesDecoder decoder_;
  Buffer stored_;
  Buffer raw_;
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

std::vector<OpenPack> open_packs(const std::vector<PackFile>& packs) {
  std::vector<OpenPack> opened;
  for (const PackFile& pack : packs) {
    OpenPack& open = opened.emplace_back();
    try {
      open.file.emplace(File::open(pack.path));
      const std::uint64_t size = open.file->size();
      if (size != pack.size) {
        open.failure = Error::corrupt(
            pack.path, -1,
            "it has " + std::to_string(size) + " bytes instead of " + std::to_string(pack.size));
      }
    } catch (const Error& error) {
      open.failure = error;
    }
  }
  return opened;
}

std::size_t largest_chunk(const std::vector<StoredChunk>& chunks) {
  std::size_t largest = 0;
  for (const StoredChunk& chunk : chunks) largest = std::max<std::size_t>(largest, chunk.raw);
  return largest;
}

// Calls handle(reader, i) for every i below `count` on several threads, until one call returns
// false. Exceptions of the first failing thread are thrown here. False if interrupted.
bool for_each_chunk(std::size_t count, unsigned threads,
                    const std::function<ChunkReader()>& make_reader,
                    const std::function<bool(ChunkReader&, std::size_t)>& handle,
                    const Interrupted& interrupted) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::exception_ptr failure;
  bool completed = true;
  auto run = [&](bool caller) {
    try {
      ChunkReader reader = make_reader();
      while (!stop) {
        const std::size_t i = next++;
        if (i >= count) return;
        if (caller && interrupted && interrupted()) {
          completed = false;
          stop = true;
          return;
        }
        if (!handle(reader, i)) stop = true;
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
  run(true);
  for (std::thread& helper : helpers) helper.join();
  if (failure != nullptr) std::rethrow_exception(failure);
  return completed;
}

}  // namespace

bool restore(const std::vector<PackFile>& packs, const std::vector<StoredChunk>& chunks,
             const std::vector<Target>& targets, unsigned threads, std::shared_ptr<const Zstd> zstd,
             const Interrupted& interrupted) {
  const std::uint64_t stream = check_table(packs, chunks);
  std::vector<std::uint64_t> starts;
  std::uint64_t start = 0;
  for (const StoredChunk& chunk : chunks) {
    starts.push_back(start);
    start += chunk.raw;
  }
  std::map<DeviceIndex, std::shared_ptr<Device>> devices;
  std::vector<std::vector<Piece>> pieces(chunks.size());
  for (const Target& target : targets) {
    if (target.offset > stream || target.length > stream - target.offset) {
      throw Error(ErrorKind::kInvalid, "a target reaches past the end of the stream");
    }
    if (target.length == 0) continue;
    std::shared_ptr<Device>& device = devices[target.device];
    if (device == nullptr) device = open_device(target.device);
    std::size_t i =
        static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), target.offset) -
                                 starts.begin()) -
        1;
    for (std::uint64_t done = 0; done < target.length; ++i) {
      const std::uint64_t skip = target.offset + done - starts[i];
      const std::uint64_t length =
          std::min<std::uint64_t>(chunks[i].raw - skip, target.length - done);
      pieces[i].push_back({skip, length, target.address + done, device.get()});
      done += length;
    }
  }
  std::vector<std::size_t> needed;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (!pieces[i].empty()) needed.push_back(i);
  }
  const std::vector<OpenPack> opened = open_packs(packs);
  const std::size_t largest = largest_chunk(chunks);
  return for_each_chunk(
      needed.size(), threads, [&] { return ChunkReader(opened, chunks, largest, zstd); },
      [&](ChunkReader& reader, std::size_t i) {
        const std::uint8_t* raw = reader.read(needed[i]);
        for (const Piece& piece : pieces[needed[i]])
          piece.device->write(piece.address, raw + piece.offset, piece.length);
        for (const auto& [index, device] : devices) {
          if (std::unique_ptr<Fence> fence = device->fence()) fence->wait();
        }
        return true;
      },
      interrupted);
}

std::vector<Damage> verify(const std::vector<PackFile>& packs,
                           const std::vector<StoredChunk>& chunks, unsigned threads,
                           std::shared_ptr<const Zstd> zstd, const Interrupted& interrupted) {
  check_table(packs, chunks);
  const std::vector<OpenPack> opened = open_packs(packs);
  const std::size_t largest = largest_chunk(chunks);
  std::mutex mutex;
  std::vector<Damage> damages;
  for_each_chunk(
      chunks.size(), threads, [&] { return ChunkReader(opened, chunks, largest, zstd); },
      [&](ChunkReader& reader, std::size_t i) {
        try {
          reader.read(i);
        } catch (const Error& error) {
          if (error.kind() == ErrorKind::kInvalid) throw;
          std::lock_guard<std::mutex> lock(mutex);
          damages.push_back({i, error.what()});
        }
        return true;
      },
      interrupted);
  std::sort(damages.begin(), damages.end(),
            [](const Damage& a, const Damage& b) { return a.chunk < b.chunk; });
  return damages;
}

}  // namespace pysnap
