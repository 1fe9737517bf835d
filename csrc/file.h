// file.h: the only door of the C++ half to the file system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace pysnap {

// Offsets, lengths and addresses of direct I/O are multiples of this.
constexpr std::size_t kPageSize = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One open regular file; move-only, closes itself. read_at and write_at may be called by several
// threads at once; everything else by one thread at a time. Every failure throws Error(kIo) with
// errno and path.
class File {
 public:
  // Creates a file that must not exist (0600, whatever the umask). With `direct` it bypasses the
  // page cache where the file system can.
  static File create(const std::string& path, bool direct);
  // Opens for reading. Symbolic links and anything but a regular file are refused.
  static File open(const std::string& path);
  // Creates a file that must not exist, whole and durable (fsync). A failure is final, as in
  // sync().
  static void write_whole(const std::string& path, const void* data, std::size_t size);
  // Makes the names in a directory durable (fsync); a link to it is followed.
  static void sync_directory(const std::string& path);

  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  ~File();

  const std::string& path() const { return path_; }
  // Whether it was created past the page cache.
  bool is_direct() const { return direct_; }
  std::uint64_t size() const;

  // Makes room for `bytes` and sets the length, so that a full disk is found now. Where the file
  // system cannot reserve, the free space is compared instead.
  void reserve(std::uint64_t bytes);
  // Writes all of it: short writes are continued, EINTR is retried. A direct file needs
  // page-aligned arguments.
  void write_at(const void* data, std::size_t size, std::uint64_t offset) const;
  // Returns the number of bytes read: less than `size` only where the file ends.
  std::size_t read_at(void* data, std::size_t size, std::uint64_t offset) const;
  // The first `size` bytes, mapped for reading until munmap(); null where the system refuses.
  void* map(std::size_t size) const noexcept;
  void truncate(std::uint64_t size);
  // fdatasync, again where it was interrupted. Every other failure is final: the pages may be gone,
  // a second call would lie.
  void sync();
  // Closes and reports what close() says; the destructor closes silently.
  void close();

 private:
  static File created(int descriptor, const std::string& path, bool direct);
  File(int descriptor, std::string path, bool direct = false)
      : descriptor_(descriptor), path_(std::move(path)), direct_(direct) {}
  // For a device that wants more than page alignment: goes on through the page cache. Several
  // threads may find that out at once.
  void leave_direct() const;

  int descriptor_;
  std::string path_;
  bool direct_;
};

}  // namespace pysnap
