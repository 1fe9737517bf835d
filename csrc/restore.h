// restore.h: the way back: packs -> checked, decoded chunks -> tensors.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "engine.h"
#include "pack.h"
#include "staging.h"
#include "zstd.h"

namespace pysnap {

struct PackFile {
  std::string path;
  std::uint64_t size;  // what the manifest says
};

// Bytes of the stream and where they go. Targets may overlap in the stream (tied tensors), and in
// memory where they share those very bytes.
struct Target {
  std::uint64_t offset;
  std::uint64_t address;
  std::uint64_t length;
  DeviceIndex device;
};

// A chunk that could not be read, and why; the errno where the system refused, else 0.
struct Damage {
  std::size_t chunk;
  std::string what;
  int error_number;
};

// Reads the chunks that hold bytes of a target, checks each against its digest, and only then
// copies its bytes into the targets, while the next chunk is checked. Raw chunks for host memory
// that are in the page cache are checked and copied in place. `chunks` are in the order of the
// stream. Uses `threads` threads, the caller among them, at its priority, and the memory of 3
// chunks and a decoder each at most. Chunks for devices go through two slots of `staging` a thread;
// where that is null or has not as many, or too small ones, through memory of its own. Throws the
// first failure: Error(kCorrupt) with the chunk (none for a pack of another length), Error(kIo),
// Error(kDevice), or Error(kInvalid) for a chunk table or targets that cannot be; targets may then
// be partly written. False if `interrupted` ended it.
//
// Targets on devices are written after all that their `streams` have queued (each device must be
// named), and are whole when this returns true, for any stream. If it ends otherwise, no copy goes
// on, unless a device takes longer than `device_timeout` to end it.
bool restore(const std::vector<PackFile>& packs, const std::vector<StoredChunk>& chunks,
             const std::vector<Target>& targets, unsigned threads, std::shared_ptr<const Zstd> zstd,
             const Streams& streams, std::shared_ptr<Staging> staging,
             const Interrupted& interrupted,
             std::chrono::milliseconds device_timeout = kDeviceTimeout);

// Reads and checks every chunk, and goes on after damage; of a pack that is missing or has another
// length, every chunk is damaged. Throws only what is no damage: Error(kInvalid) for a table that
// cannot be or a missing libzstd, std::bad_alloc. What it found so far if `interrupted` ended it.
std::vector<Damage> verify(const std::vector<PackFile>& packs,
                           const std::vector<StoredChunk>& chunks, unsigned threads,
                           std::shared_ptr<const Zstd> zstd, const Interrupted& interrupted);

}  // namespace pysnap
