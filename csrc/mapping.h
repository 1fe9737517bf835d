// mapping.h: a file that is read in place, from the page cache, without SIGBUS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "file.h"

namespace pysnap {

class GuardedRange;

// A read-only mapping of a file's first `size` bytes, which unmaps itself. Any number of threads
// may read it.
//
// Reading a page that the file no longer has, or that the disk cannot give, raises SIGBUS, which
// kills. While a mapping lives, a handler answers such a fault inside it with zeros, and lost() is
// true from then on: whoever reads asks afterwards. Faults elsewhere go to the handler that was
// there before. A thread that reads must not have SIGBUS blocked.
class Mapping {
 public:
  // Null where the file cannot be mapped, or too many files are: read it by read_at then.
  static std::unique_ptr<Mapping> create(const File& file, std::size_t size);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Whether these bytes seem to be in the page cache: the kernel is asked about a few of their
  // pages. Page-aligned `offset`.
  bool is_cached(std::size_t offset, std::size_t length) const;
  // Takes the pages out of this process's resident memory; they stay in the page cache. Whoever
  // reads meanwhile is not disturbed.
  void release() const;
  // Whether zeros have stood in for bytes that could not be read.
  bool lost() const;

 private:
  Mapping(std::uint8_t* data, std::size_t size, GuardedRange* guard)
      : data_(data), size_(size), guard_(guard) {}

  std::uint8_t* const data_;
  const std::size_t size_;
  GuardedRange* const guard_;
};

}  // namespace pysnap
