#include "mapping.h"

#include <pthread.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>

namespace pysnap {

// A mapping as the signal handler sees it. Written by whoever holds the place, read by the handler.
class GuardedRange {
 public:
  std::atomic<std::uintptr_t> start{0};  // 0: the place is free
  std::atomic<std::uintptr_t> end{0};
  std::atomic<bool> lost{false};
};

namespace {

constexpr std::size_t kMostMappings = 64;
// To ask about every page costs a fifth of reading them.
constexpr std::size_t kAskedPages = 4;

std::array<GuardedRange, kMostMappings> ranges;

std::mutex handler_mutex;
// Guarded by handler_mutex; `previous` does not change while the handler is installed.
std::size_t users = 0;
struct sigaction previous;

GuardedRange* range_of(std::uintptr_t address) {
  for (GuardedRange& range : ranges) {
    const std::uintptr_t start = range.start;
    if (start != 0 && start <= address && address < range.end) return &range;
  }
  return nullptr;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // The instruction is repeated on return, and then the system acts.
    ::sigaction(signal, &previous, nullptr);
  }
}

// Runs in the thread that read; only system calls and lock-free atomics.
void handle(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  GuardedRange* range = range_of(address);
  if (range != nullptr) {
    range->lost = true;
    void* page = reinterpret_cast<void*>(address / kPageSize * kPageSize);
    if (::mmap(page, kPageSize, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
        MAP_FAILED)
      range = nullptr;
  }
  if (range == nullptr) pass_on(signal, info, context);
  errno = saved_errno;
}

void install_handler() {
  std::lock_guard<std::mutex> lock(handler_mutex);
  if (users++ > 0) return;
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, &previous);
}

void remove_handler() {
  std::lock_guard<std::mutex> lock(handler_mutex);
  if (--users > 0) return;
  // Somebody may have put a handler on top of ours meanwhile; it stays.
  struct sigaction now{};
  ::sigaction(SIGBUS, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == handle)
    ::sigaction(SIGBUS, &previous, nullptr);
}

GuardedRange* take_range(std::uintptr_t start, std::size_t size) {
  std::lock_guard<std::mutex> lock(handler_mutex);
  for (GuardedRange& range : ranges) {
    if (range.start != 0) continue;
    range.lost = false;
    range.end = start + size;
    range.start = start;
    return &range;
  }
  return nullptr;
}

}  // namespace

std::unique_ptr<Mapping> Mapping::create(const File& file, std::size_t size) {
  void* data = file.map(size);
  if (data == nullptr) return nullptr;
  GuardedRange* guard = take_range(reinterpret_cast<std::uintptr_t>(data), size);
  if (guard == nullptr) {
    ::munmap(data, size);
    return nullptr;
  }
  install_handler();
  return std::unique_ptr<Mapping>(new Mapping(static_cast<std::uint8_t*>(data), size, guard));
}

Mapping::~Mapping() {
  // The place is given back first: once unmapped, the addresses may be somebody else's.
  guard_->start = 0;
  ::munmap(data_, size_);
  remove_handler();
}

bool Mapping::is_cached(std::size_t offset, std::size_t length) const {
  const std::size_t last = (length - 1) / kPageSize;
  for (std::size_t i = 0; i <= kAskedPages; ++i) {
    unsigned char state = 0;
    const std::size_t page = last * i / kAskedPages;
    if (::mincore(data_ + offset + page * kPageSize, kPageSize, &state) != 0 || (state & 1) == 0)
      return false;
  }
  return true;
}

void Mapping::release() const { ::madvise(data_, size_, MADV_DONTNEED); }

bool Mapping::lost() const { return guard_->lost; }

}  // namespace pysnap
