// A library for LD_PRELOAD between a program and the C library: sees every file operation below one
// directory, numbers it, logs it with its bytes, and makes chosen ones fail.
//
// Operations of all threads are done one after the other, so that the log has them in the order in
// which they happened. What does not go through the C library's symbols is not seen: system calls
// made directly, stores into mapped memory, and what the C library calls inside of itself (readdir
// closes its own descriptor). tests/faults/test_shim.py holds that against what pysnap calls.
//
// Controlled through the shim_ functions at the end; tests/faults/shim/__init__.py calls them.

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace {

// The order is that of KINDS in __init__.py.
enum Kind : std::int32_t {
  kOpen,
  kClose,
  kRead,
  kPread,
  kWrite,
  kPwrite,
  kFsync,
  kFdatasync,
  kFtruncate,
  kFallocate,
  kMkdir,
  kRename,
  kUnlink,
  kRmdir,
  kSymlink,
  kLink,
  kFlock,
  kMmap,
  kStat,
  kStatvfs,
  kChmod,
  kOpendir,
  kReaddir,
  kMark,
};

// The order is that of ACTIONS in __init__.py.
enum Action : std::int32_t {
  kFail,            // not done; -1 with errno
  kShort,           // half of the bytes are written, and that is said
  kZero,            // nothing is written, and that is said
  kDelay,           // done, after some microseconds
  kKillBefore,      // SIGKILL instead
  kKillAfter,       // SIGKILL when it is done
  kLie,             // not done, and reported as done
  kLieShort,        // half of the bytes are written, and reported as all
  kRetry,           // fails, and is asked again until it says it is done
  kPowerCutBefore,  // the file system loses what is not durable, then SIGKILL
  kPowerCutAfter,
};

struct Fault {
  std::int32_t kind;    // -1: any
  std::string pattern;  // of the path, as in fnmatch(3); `*` stands for slashes, too
  std::int64_t first;
  std::int64_t count;  // -1: for ever
  Action action;
  std::int64_t argument;
  std::int64_t seen;
};

// A record of the log; path, target and data follow it.
struct Record {
  std::int32_t kind;
  std::int32_t descriptor;
  std::int64_t result;
  std::int32_t error;
  std::int32_t flags;
  std::int64_t offset;
  std::int64_t length;
  std::int32_t path_size;
  std::int32_t target_size;
  std::int64_t data_size;
};

// Never destroyed: threads may work on until the process is gone.
struct State {
  std::mutex mutex;
  // Guarded by mutex.
  std::string root;
  std::vector<Fault> faults;
  std::vector<char> log;
  std::map<int, std::string> files;
  std::set<DIR*> directories;
  std::int64_t operations = 0;
  std::int64_t fired = 0;
};

State& state() {
  static State* const object = new State;
  return *object;
}

std::atomic<bool> active{false};

template <typename Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}
#define REAL(name)                                               \
  ([] {                                                          \
    static auto* const function = real<decltype(::name)>(#name); \
    return function;                                             \
  }())

std::string path_of(int descriptor) {
  char buffer[4096];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t size = REAL(readlink)(link.c_str(), buffer, sizeof buffer);
  return size < 0 ? std::string() : std::string(buffer, static_cast<std::size_t>(size));
}

std::string absolute(int directory, const char* path) {
  if (path == nullptr) return {};
  if (path[0] == '/') return path;
  if (directory != AT_FDCWD) return path_of(directory) + "/" + path;
  char buffer[4096];
  return ::getcwd(buffer, sizeof buffer) != nullptr ? std::string(buffer) + "/" + path : path;
}

// With the state's mutex held.
bool is_watched(const std::string& path) {
  const std::string& root = state().root;
  return path.compare(0, root.size(), root) == 0 &&
         (path.size() == root.size() || path[root.size()] == '/');
}

const std::string* watched_file(int descriptor) {
  const auto found = state().files.find(descriptor);
  return found == state().files.end() ? nullptr : &found->second;
}

struct Operation {
  Kind kind;
  std::string path;
  std::string target;
  int descriptor = -1;
  std::int64_t offset = -1;
  std::int64_t length = -1;
  int flags = 0;
  const void* data = nullptr;  // `length` bytes that are written
};

void put(const Operation& operation, std::int64_t result, int error) {
  const bool wrote = operation.data != nullptr && result > 0;
  const Record record{operation.kind,
                      operation.descriptor,
                      result,
                      error,
                      operation.flags,
                      operation.offset,
                      operation.length,
                      static_cast<std::int32_t>(operation.path.size()),
                      static_cast<std::int32_t>(operation.target.size()),
                      wrote ? result : 0};
  std::vector<char>& log = state().log;
  auto append = [&](const void* data, std::int64_t size) {
    const char* bytes = static_cast<const char*>(data);
    log.insert(log.end(), bytes, bytes + size);
  };
  append(&record, sizeof record);
  append(operation.path.data(), record.path_size);
  append(operation.target.data(), record.target_size);
  if (wrote) append(operation.data, record.data_size);
}

// The fault that this operation gets, if any; every fault counts the operations that it is about.
std::optional<Fault> fault_for(const Operation& operation) {
  std::optional<Fault> found;
  for (Fault& fault : state().faults) {
    if (fault.kind >= 0 && fault.kind != operation.kind) continue;
    if (::fnmatch(fault.pattern.c_str(), operation.path.c_str(), 0) != 0) continue;
    const std::int64_t number = ++fault.seen;
    if (number < fault.first) continue;
    if (fault.count >= 0 && number >= fault.first + fault.count) continue;
    if (!found) found = fault;
  }
  if (found) ++state().fired;
  return found;
}

[[noreturn]] void die() {
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}

[[noreturn]] void cut_power() {
  const int root = REAL(open)(state().root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  std::uint32_t without_flushing_the_journal = 2;
  const unsigned long shutdown = _IOR('X', 125, std::uint32_t);
  if (root < 0 || ::ioctl(root, shutdown, &without_flushing_the_journal) != 0) ::_exit(77);
  die();
}

std::size_t half(std::size_t size) {
  // Direct I/O takes whole pages.
  return size >= 8192 ? size / 2 / 4096 * 4096 : size / 2;
}

// Does one operation, with the fault that is due. `perform(length)` is the real call, of `length`
// bytes where it writes. With the mutex held; a close is done even where it fails, as Linux does.
template <typename Perform>
std::int64_t run(Operation operation, Perform perform) {
  ++state().operations;
  const std::optional<Fault> fault = fault_for(operation);
  const std::size_t length = operation.length > 0 ? static_cast<std::size_t>(operation.length) : 0;
  auto perform_and_log = [&](std::size_t size) {
    const std::int64_t result = perform(size);
    const int error = result < 0 ? errno : 0;
    if (operation.kind == kOpen) operation.descriptor = static_cast<int>(result);
    put(operation, result, error);
    errno = error;
    return result;
  };
  auto fail = [&](int error) -> std::int64_t {
    if (operation.kind == kClose) perform(length);
    put(operation, -1, error);
    errno = error;
    return -1;
  };
  if (!fault) return perform_and_log(length);
  const bool writes = operation.kind == kWrite || operation.kind == kPwrite;
  switch (fault->action) {
    case kFail:
      return fail(static_cast<int>(fault->argument));
    case kShort:
      return perform_and_log(writes && length > 1 ? half(length) : length);
    case kZero:
      return writes ? 0 : perform_and_log(length);
    case kDelay:
      ::usleep(static_cast<useconds_t>(fault->argument));
      return perform_and_log(length);
    case kKillBefore:
      die();
    case kKillAfter:
      perform(length);
      die();
    case kLie:
      return writes ? static_cast<std::int64_t>(length) : 0;
    case kLieShort:
      perform_and_log(half(length));
      return static_cast<std::int64_t>(length);
    case kRetry:
      fail(static_cast<int>(fault->argument));
      return perform_and_log(length);
    case kPowerCutBefore:
      cut_power();
    case kPowerCutAfter:
      perform(length);
      cut_power();
  }
  return perform_and_log(length);
}

std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(state().mutex); }

template <typename Perform>
std::int64_t run_on_path(Operation operation, Perform perform) {
  if (!active) return perform(0);
  const auto guard = lock();
  if (!is_watched(operation.path)) return perform(0);
  return run(std::move(operation), perform);
}

template <typename Perform>
std::int64_t run_on_file(Operation operation, Perform perform) {
  const std::size_t length = operation.length > 0 ? static_cast<std::size_t>(operation.length) : 0;
  if (!active) return perform(length);
  auto guard = lock();
  const std::string* path = watched_file(operation.descriptor);
  if (path == nullptr) {
    guard.unlock();  // it may block, as a pipe does
    return perform(length);
  }
  operation.path = *path;
  return run(std::move(operation), perform);
}

int do_open(int directory, const char* name, int flags, mode_t mode) {
  Operation operation{kOpen, absolute(directory, name), {}};
  operation.flags = flags;
  const std::string path = operation.path;
  const std::int64_t result = run_on_path(std::move(operation), [&](std::size_t) {
    return std::int64_t{REAL(openat)(directory, name, flags, mode)};
  });
  if (result >= 0 && active) {
    const auto guard = lock();
    if (is_watched(path)) state().files[static_cast<int>(result)] = path;
  }
  return static_cast<int>(result);
}

mode_t mode_of(int flags, va_list& arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

extern "C" {

#define DEFINE_OPEN(name)                          \
  int name(const char* path, int flags, ...) {     \
    va_list arguments;                             \
    va_start(arguments, flags);                    \
    const mode_t mode = mode_of(flags, arguments); \
    va_end(arguments);                             \
    return do_open(AT_FDCWD, path, flags, mode);   \
  }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

#define DEFINE_OPENAT(name)                                   \
  int name(int directory, const char* path, int flags, ...) { \
    va_list arguments;                                        \
    va_start(arguments, flags);                               \
    const mode_t mode = mode_of(flags, arguments);            \
    va_end(arguments);                                        \
    return do_open(directory, path, flags, mode);             \
  }
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

int close(int descriptor) {
  Operation operation{kClose, {}, {}, descriptor};
  const std::int64_t result = run_on_file(std::move(operation), [&](std::size_t) {
    state().files.erase(descriptor);
    return std::int64_t{REAL(close)(descriptor)};
  });
  return static_cast<int>(result);
}

ssize_t read(int descriptor, void* buffer, size_t size) {
  return run_on_file({kRead, {}, {}, descriptor, -1, static_cast<std::int64_t>(size)},
                     [&](std::size_t) { return REAL(read)(descriptor, buffer, size); });
}

ssize_t write(int descriptor, const void* data, size_t size) {
  return run_on_file({kWrite, {}, {}, descriptor, -1, static_cast<std::int64_t>(size), 0, data},
                     [&](std::size_t part) { return REAL(write)(descriptor, data, part); });
}

#define DEFINE_PREAD(name)                                                           \
  ssize_t name(int descriptor, void* buffer, size_t size, off_t offset) {            \
    return run_on_file(                                                              \
        {kPread, {}, {}, descriptor, offset, static_cast<std::int64_t>(size)},       \
        [&](std::size_t) { return REAL(pread)(descriptor, buffer, size, offset); }); \
  }
DEFINE_PREAD(pread)
DEFINE_PREAD(pread64)

#define DEFINE_PWRITE(name)                                                              \
  ssize_t name(int descriptor, const void* data, size_t size, off_t offset) {            \
    return run_on_file(                                                                  \
        {kPwrite, {}, {}, descriptor, offset, static_cast<std::int64_t>(size), 0, data}, \
        [&](std::size_t part) { return REAL(pwrite)(descriptor, data, part, offset); }); \
  }
DEFINE_PWRITE(pwrite)
DEFINE_PWRITE(pwrite64)

int fsync(int descriptor) {
  return static_cast<int>(run_on_file({kFsync, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fsync)(descriptor)};
  }));
}

int fdatasync(int descriptor) {
  return static_cast<int>(run_on_file({kFdatasync, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fdatasync)(descriptor)};
  }));
}

#define DEFINE_FTRUNCATE(name)                                                                     \
  int name(int descriptor, off_t size) __THROW {                                                   \
    return static_cast<int>(run_on_file({kFtruncate, {}, {}, descriptor, size}, [&](std::size_t) { \
      return std::int64_t{REAL(ftruncate)(descriptor, size)};                                      \
    }));                                                                                           \
  }
DEFINE_FTRUNCATE(ftruncate)
DEFINE_FTRUNCATE(ftruncate64)

#define DEFINE_FALLOCATE(name)                                                          \
  int name(int descriptor, int mode, off_t offset, off_t length) {                      \
    return static_cast<int>(run_on_file(                                                \
        {kFallocate, {}, {}, descriptor, offset + length, -1, mode}, [&](std::size_t) { \
          return std::int64_t{REAL(fallocate)(descriptor, mode, offset, length)};       \
        }));                                                                            \
  }
DEFINE_FALLOCATE(fallocate)
DEFINE_FALLOCATE(fallocate64)

int flock(int descriptor, int how) __THROW {
  return static_cast<int>(run_on_file({kFlock, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(flock)(descriptor, how)};
  }));
}

#define DEFINE_MMAP(name)                                                                         \
  void* name(void* address, size_t size, int protection, int flags, int descriptor, off_t offset) \
      __THROW {                                                                                   \
    return reinterpret_cast<void*>(                                                               \
        run_on_file({kMmap, {}, {}, descriptor, offset}, [&](std::size_t) {                       \
          return reinterpret_cast<std::int64_t>(                                                  \
              REAL(mmap)(address, size, protection, flags, descriptor, offset));                  \
        }));                                                                                      \
  }
DEFINE_MMAP(mmap)
DEFINE_MMAP(mmap64)

int fchmod(int descriptor, mode_t mode) __THROW {
  return static_cast<int>(run_on_file({kChmod, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fchmod)(descriptor, mode)};
  }));
}

int chmod(const char* path, mode_t mode) __THROW {
  return static_cast<int>(run_on_path({kChmod, absolute(AT_FDCWD, path), {}}, [&](std::size_t) {
    return std::int64_t{REAL(chmod)(path, mode)};
  }));
}

int mkdir(const char* path, mode_t mode) __THROW {
  return static_cast<int>(run_on_path({kMkdir, absolute(AT_FDCWD, path), {}}, [&](std::size_t) {
    return std::int64_t{REAL(mkdir)(path, mode)};
  }));
}

int mkdirat(int directory, const char* path, mode_t mode) __THROW {
  return static_cast<int>(run_on_path({kMkdir, absolute(directory, path), {}}, [&](std::size_t) {
    return std::int64_t{REAL(mkdirat)(directory, path, mode)};
  }));
}

int renameat2(int from, const char* source, int to, const char* target, unsigned flags) __THROW {
  return static_cast<int>(run_on_path(
      {kRename, absolute(from, source), absolute(to, target)},
      [&](std::size_t) { return std::int64_t{REAL(renameat2)(from, source, to, target, flags)}; }));
}

int renameat(int from, const char* source, int to, const char* target) __THROW {
  return renameat2(from, source, to, target, 0);
}

int rename(const char* source, const char* target) __THROW {
  return renameat2(AT_FDCWD, source, AT_FDCWD, target, 0);
}

int unlinkat(int directory, const char* path, int flags) __THROW {
  const Kind kind = (flags & AT_REMOVEDIR) != 0 ? kRmdir : kUnlink;
  return static_cast<int>(run_on_path({kind, absolute(directory, path), {}}, [&](std::size_t) {
    return std::int64_t{REAL(unlinkat)(directory, path, flags)};
  }));
}

int unlink(const char* path) __THROW { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char* path) __THROW { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int symlinkat(const char* text, int directory, const char* path) __THROW {
  return static_cast<int>(run_on_path(
      {kSymlink, absolute(directory, path), text},
      [&](std::size_t) { return std::int64_t{REAL(symlinkat)(text, directory, path)}; }));
}

int symlink(const char* text, const char* path) __THROW { return symlinkat(text, AT_FDCWD, path); }

int linkat(int from, const char* source, int to, const char* target, int flags) __THROW {
  return static_cast<int>(run_on_path(
      {kLink, absolute(from, source), absolute(to, target)},
      [&](std::size_t) { return std::int64_t{REAL(linkat)(from, source, to, target, flags)}; }));
}

int link(const char* source, const char* target) __THROW {
  return linkat(AT_FDCWD, source, AT_FDCWD, target, 0);
}

#define DEFINE_STAT(name)                                                                         \
  int name(const char* path, struct stat* status) __THROW {                                       \
    return static_cast<int>(run_on_path({kStat, absolute(AT_FDCWD, path), {}}, [&](std::size_t) { \
      return std::int64_t{REAL(name)(path, status)};                                              \
    }));                                                                                          \
  }
DEFINE_STAT(lstat)

#undef DEFINE_STAT
#define DEFINE_STAT64(name)                                                                       \
  int name(const char* path, struct stat64* status) __THROW {                                     \
    return static_cast<int>(run_on_path({kStat, absolute(AT_FDCWD, path), {}}, [&](std::size_t) { \
      return std::int64_t{REAL(name)(path, status)};                                              \
    }));                                                                                          \
  }
DEFINE_STAT64(lstat64)
DEFINE_STAT64(stat64)

int fstatat64(int directory, const char* path, struct stat64* status, int flags) __THROW {
  return static_cast<int>(run_on_path({kStat, absolute(directory, path), {}}, [&](std::size_t) {
    return std::int64_t{REAL(fstatat64)(directory, path, status, flags)};
  }));
}

int fstat(int descriptor, struct stat* status) __THROW {
  return static_cast<int>(run_on_file({kStat, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fstat)(descriptor, status)};
  }));
}

int fstat64(int descriptor, struct stat64* status) __THROW {
  return static_cast<int>(run_on_file({kStat, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fstat64)(descriptor, status)};
  }));
}

int fstatvfs(int descriptor, struct statvfs* status) __THROW {
  return static_cast<int>(run_on_file({kStatvfs, {}, {}, descriptor}, [&](std::size_t) {
    return std::int64_t{REAL(fstatvfs)(descriptor, status)};
  }));
}

DIR* opendir(const char* path) {
  DIR* directory = nullptr;
  run_on_path({kOpendir, absolute(AT_FDCWD, path), {}}, [&](std::size_t) {
    directory = REAL(opendir)(path);
    if (directory != nullptr && active && is_watched(absolute(AT_FDCWD, path)))
      state().directories.insert(directory);
    return std::int64_t{directory == nullptr ? -1 : 0};
  });
  return directory;
}

DIR* fdopendir(int descriptor) {
  DIR* directory = nullptr;
  run_on_path({kOpendir, active ? path_of(descriptor) : std::string(), {}}, [&](std::size_t) {
    directory = REAL(fdopendir)(descriptor);
    if (directory != nullptr && active && is_watched(path_of(descriptor)))
      state().directories.insert(directory);
    return std::int64_t{directory == nullptr ? -1 : 0};
  });
  return directory;
}

int closedir(DIR* directory) {
  if (active) {
    const auto guard = lock();
    state().directories.erase(directory);
  }
  return REAL(closedir)(directory);
}

struct dirent64* readdir64(DIR* directory) {
  if (!active) return REAL(readdir64)(directory);
  const auto guard = lock();
  if (state().directories.count(directory) == 0) return REAL(readdir64)(directory);
  struct dirent64* entry = nullptr;
  Operation operation{kReaddir, path_of(::dirfd(directory)), {}};
  const int before = errno;
  run(std::move(operation), [&](std::size_t) {
    errno = 0;
    entry = REAL(readdir64)(directory);
    return std::int64_t{entry == nullptr && errno != 0 ? -1 : 0};
  });
  if (entry != nullptr) errno = before;
  return entry;
}

// Begins to watch everything below `root`, with operation number 1, no faults and an empty log.
void shim_start(const char* root) {
  const auto guard = lock();
  State& now = state();
  now.root = root;
  now.faults.clear();
  now.log.clear();
  now.files.clear();
  now.directories.clear();
  now.operations = now.fired = 0;
  active = true;
}

void shim_stop() { active = false; }

// Of the operations of `kind` (-1: any) on paths that match `pattern`, those from number `first`,
// `count` of them (-1: for ever), get `action`.
void shim_fault(std::int32_t kind, const char* pattern, std::int64_t first, std::int64_t count,
                std::int32_t action, std::int64_t argument) {
  const auto guard = lock();
  state().faults.push_back({kind, pattern, first, count, static_cast<Action>(action), argument, 0});
}

void shim_clear_faults() {
  const auto guard = lock();
  state().faults.clear();
}

std::int64_t shim_operations() {
  const auto guard = lock();
  return state().operations;
}

// How many operations got a fault.
std::int64_t shim_fired() {
  const auto guard = lock();
  return state().fired;
}

// Puts a note of the harness between the operations.
void shim_mark(const char* text) {
  const auto guard = lock();
  put({kMark, text, {}}, 0, 0);
}

// Copies the log into `buffer` if it has room for it; returns its size.
std::int64_t shim_log(char* buffer, std::int64_t room) {
  const auto guard = lock();
  const std::vector<char>& log = state().log;
  const std::int64_t size = static_cast<std::int64_t>(log.size());
  if (size <= room) std::copy(log.begin(), log.end(), buffer);
  return size;
}

}  // extern "C"
