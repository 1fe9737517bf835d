#include "trace.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ctime>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace pysnap::trace {

namespace {

// 32 bytes each: at most 1 MiB a thread. A snapshot of 100 GB has 25 600 chunks of 4 MiB.
constexpr std::size_t kMostSpans = 32768;

struct Buffer {
  Thread thread;
  std::mutex mutex;
  // Guarded by mutex.
  std::vector<Span> spans;
  std::uint64_t dropped = 0;
};

// Threads and their spans outlive the threads. Never destroyed: a thread may end after main.
struct Registry {
  std::mutex mutex;
  // Guarded by mutex.
  std::vector<std::shared_ptr<Buffer>> live;
  std::vector<Thread> threads;
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::shared_ptr<Buffer> register_thread() {
  auto buffer = std::make_shared<Buffer>();
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  buffer->thread = {static_cast<std::uint32_t>(::syscall(SYS_gettid)), name};
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().live.push_back(buffer);
  registry().threads.push_back(buffer->thread);
  return buffer;
}

}  // namespace

const std::vector<std::string>& phase_names() {
  static const std::vector<std::string> names{"copy", "land", "encode", "write",
                                              "read", "put",  "map"};
  return names;
}

void enable(bool on) { internal::enabled.store(on, std::memory_order_relaxed); }

Taken take() {
  Taken taken{{}, {}, 0};
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  taken.threads = all.threads;
  std::vector<std::shared_ptr<Buffer>> live;
  for (std::shared_ptr<Buffer>& buffer : all.live) {
    // Only its thread shares it; one that has ended adds nothing to what is taken now.
    const bool ended = buffer.use_count() == 1;
    std::vector<Span> spans;
    {
      std::lock_guard<std::mutex> buffer_lock(buffer->mutex);
      spans.swap(buffer->spans);
      taken.dropped += std::exchange(buffer->dropped, 0);
    }
    taken.spans.insert(taken.spans.end(), spans.begin(), spans.end());
    if (!ended) live.push_back(std::move(buffer));
  }
  all.live = std::move(live);
  return taken;
}

namespace internal {

std::atomic<bool> enabled{false};

std::uint64_t now() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000u +
         static_cast<std::uint64_t>(time.tv_nsec);
}

void note(Phase phase, std::uint64_t start, std::uint64_t amount) {
  try {
    thread_local const std::shared_ptr<Buffer> buffer = register_thread();
    const Span span{start, now(), amount, buffer->thread.id, static_cast<std::uint8_t>(phase)};
    std::lock_guard<std::mutex> lock(buffer->mutex);
    if (buffer->spans.size() < kMostSpans) {
      buffer->spans.push_back(span);
    } else {
      ++buffer->dropped;
    }
  } catch (const std::bad_alloc&) {
    // A span is worth no failure.
  }
}

}  // namespace internal

}  // namespace pysnap::trace
