#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "error.h"

namespace pysnap {

namespace {

// A state is nobody else's business.
constexpr mode_t kMode = 0600;
constexpr int kCreateFlags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;

// What a system call returns that is made again as long as a signal interrupts it.
template <typename Call>
auto retrying(const Call& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

int open_retrying(const std::string& path, int flags) {
  return retrying([&] { return ::open(path.c_str(), flags, kMode); });
}

}  // namespace

File File::create(const std::string& path, bool direct) {
  if (direct) {
    int descriptor = open_retrying(path, kCreateFlags | O_DIRECT);
    if (descriptor >= 0) return created(descriptor, path, true);
    // EINVAL: no direct I/O here. Some kernels create the file before they find that out.
    if (errno != EINVAL) throw Error::io("creating", path, errno);
    ::unlink(path.c_str());
  }
  int descriptor = open_retrying(path, kCreateFlags);
  if (descriptor < 0) throw Error::io("creating", path, errno);
  return created(descriptor, path, false);
}

File File::created(int descriptor, const std::string& path, bool direct) {
  File file(descriptor, path, direct);
  // A umask that takes more away would lock the owner out, too.
  if (::fchmod(descriptor, kMode) != 0) throw Error::io("setting the mode of", path, errno);
  return file;
}

File File::open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO that somebody planted must not hang.
  int descriptor = open_retrying(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) throw Error::io("opening", path, errno);
  File file(descriptor, path);
  struct stat status;
  if (::fstat(descriptor, &status) != 0) throw Error::io("reading the status of", path, errno);
  if (!S_ISREG(status.st_mode)) throw Error::io("opening", path, EINVAL);
  return file;
}

void File::write_whole(const std::string& path, const void* data, std::size_t size) {
  File file = create(path, false);
  file.write_at(data, size, 0);
  if (retrying([&] { return ::fsync(file.descriptor_); }) != 0)
    throw Error::io("syncing", path, errno);
  file.close();
}

void File::sync_directory(const std::string& path) {
  const int descriptor = open_retrying(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) throw Error::io("opening directory", path, errno);
  File directory(descriptor, path);
  if (retrying([&] { return ::fsync(descriptor); }) != 0)
    throw Error::io("syncing directory", path, errno);
  directory.close();
}

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      path_(std::move(other.path_)),
      direct_(other.direct_) {}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::uint64_t File::size() const {
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) throw Error::io("reading the status of", path_, errno);
  return static_cast<std::uint64_t>(status.st_size);
}

void File::reserve(std::uint64_t bytes) {
  if (bytes == 0) return;
  const auto length = static_cast<off_t>(bytes);
  if (retrying([&] { return ::fallocate(descriptor_, 0, 0, length); }) == 0) return;
  if (errno != EOPNOTSUPP && errno != ENOSYS) {
    throw Error::io("reserving " + std::to_string(bytes) + " bytes for", path_, errno);
  }
  struct statvfs status;
  if (::fstatvfs(descriptor_, &status) != 0)
    throw Error::io("reading the free space for", path_, errno);
  if (status.f_bavail * std::uint64_t{status.f_frsize} < bytes) {
    throw Error::io("reserving " + std::to_string(bytes) + " bytes for", path_, ENOSPC);
  }
  truncate(bytes);
}

void File::write_at(const void* data, std::size_t size, std::uint64_t offset) const {
  const char* next = static_cast<const char*>(data);
  bool left_direct = false;
  while (size > 0) {
    const auto at = static_cast<off_t>(offset);
    const ssize_t written = retrying([&] { return ::pwrite(descriptor_, next, size, at); });
    if (written < 0) {
      if (errno == EINVAL && !left_direct) {
        left_direct = true;
        leave_direct();
        continue;
      }
      throw Error::io("writing", path_, errno);
    }
    // A write that takes nothing would be repeated for ever.
    if (written == 0) throw Error::io("writing", path_, EIO);
    next += written;
    offset += static_cast<std::uint64_t>(written);
    size -= static_cast<std::size_t>(written);
  }
}

void File::leave_direct() const {
  const int flags = ::fcntl(descriptor_, F_GETFL);
  if (flags >= 0) ::fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT);
}

std::size_t File::read_at(void* data, std::size_t size, std::uint64_t offset) const {
  char* next = static_cast<char*>(data);
  std::size_t done = 0;
  while (done < size) {
    const auto at = static_cast<off_t>(offset + done);
    const ssize_t count =
        retrying([&] { return ::pread(descriptor_, next + done, size - done, at); });
    if (count < 0) throw Error::io("reading", path_, errno);
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  return done;
}

void* File::map(std::size_t size) const noexcept {
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor_, 0);
  return data == MAP_FAILED ? nullptr : data;
}

void File::truncate(std::uint64_t size) {
  const auto length = static_cast<off_t>(size);
  if (retrying([&] { return ::ftruncate(descriptor_, length); }) != 0)
    throw Error::io("setting the length of", path_, errno);
}

void File::sync() {
  if (retrying([&] { return ::fdatasync(descriptor_); }) != 0)
    throw Error::io("syncing", path_, errno);
}

void File::close() {
  // Linux releases the descriptor even when close() fails, so it is never closed twice.
  if (::close(std::exchange(descriptor_, -1)) != 0) throw Error::io("closing", path_, errno);
}

}  // namespace pysnap
