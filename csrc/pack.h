// pack.h: the file of encoded chunks; docs/format.md section 2 is the specification.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "codec.h"
#include "digest.h"
#include "file.h"

namespace pysnap {

// Bound of a chunk's raw bytes in any snapshot; a reader allocates no more than a few of it.
constexpr std::uint32_t kLargestChunk = 64u << 20;

// Where a chunk lies and what it is: a row of the manifest's chunk table.
struct StoredChunk {
  std::uint32_t pack;
  std::uint32_t raw;
  std::uint32_t stored;
  Element element;
  Encoding encoding;
  std::uint64_t offset;
  Digest digest;
};

// Writes one pack. append() may be called by several threads at once; a failure throws Error(kIo),
// after which the pack is abandoned.
class PackWriter {
 public:
  // Creates the file and reserves `expected` bytes.
  PackWriter(const std::string& path, std::uint64_t expected, bool direct);

  // Whether it was created to be written past the page cache.
  bool is_direct() const { return file_.is_direct(); }
  // Writes `stored` bytes at the next free page and returns its offset. `data` is page-aligned and
  // has room up to the next multiple of kPageSize, which is overwritten with zeros.
  std::uint64_t append(std::uint8_t* data, std::size_t stored);
  // Cuts the file to what was written, makes it durable and closes it; returns its length.
  std::uint64_t finish();

 private:
  File file_;
  std::atomic<std::uint64_t> end_{0};
};

}  // namespace pysnap
