// Memory that runs out while devices copy: the allocation that fails is, in turn, each that the
// engine makes. A slot that is still copied to must not be used again, whatever fails.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <future>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda_fixture.h"
#include "engine.h"
#include "restore.h"

namespace {

std::atomic<bool> is_short{false};
// How many allocations come before the one that fails, in any thread; and whether all do after it.
std::atomic<long> countdown{0};
std::atomic<bool> stays_short{false};
std::atomic<bool (*)()> is_driver{nullptr};

// A driver has memory of its own, and throws nothing.
bool must_fail() {
  if (!is_short.load() || is_driver.load()()) return false;
  const long left = countdown.fetch_sub(1);
  return left == 0 || (left < 0 && stays_short.load());
}

void* allocate(std::size_t size) {
  if (!must_fail()) {
    if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
  }
  throw std::bad_alloc();
}

}  // namespace

// Not inlined: GCC would miss the other one of a pair.
#define NOT_INLINED __attribute__((noinline))
NOT_INLINED void* operator new(std::size_t size) { return allocate(size); }
NOT_INLINED void* operator new[](std::size_t size) { return allocate(size); }
NOT_INLINED void operator delete(void* memory) noexcept { std::free(memory); }
NOT_INLINED void operator delete[](void* memory) noexcept { std::free(memory); }
NOT_INLINED void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
NOT_INLINED void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using fixture::Bytes;
using fixture::DeviceState;
using fixture::fake;
using fixture::HealthyDriver;
using fixture::TemporaryDirectory;
using pysnap::Engine;
using pysnap::EngineOptions;
using pysnap::Job;
using pysnap::kHost;
using pysnap::WrittenPack;

constexpr std::size_t kChunk = 4096;
constexpr std::size_t kChunks = 4;
constexpr std::chrono::milliseconds kSoon{5};
constexpr std::chrono::hours kForever{24};
constexpr long kNever = 1'000'000;
// Under TSan, which makes it slow, a few allocations fail; elsewhere each does.
#ifdef __SANITIZE_THREAD__
constexpr long kStep = 5;
#else
constexpr long kStep = 1;
#endif

// While it lives, an allocation fails after `nth` others, or all do from then on.
class ShortMemory {
 public:
  explicit ShortMemory(long nth, bool stays = false) {
    is_driver = fake().is_inside;
    countdown = nth;
    stays_short = stays;
    is_short = true;
  }
  ShortMemory(const ShortMemory&) = delete;
  ShortMemory& operator=(const ShortMemory&) = delete;
  ~ShortMemory() { is_short = false; }

  bool has_failed() const { return countdown.load() < 0; }
};

EngineOptions small_engine(std::size_t slots,
                           std::chrono::milliseconds device_timeout = pysnap::kDeviceTimeout) {
  EngineOptions options;
  options.chunk_size = kChunk;
  options.slots = slots;
  options.nice = 0;
  options.device_timeout = device_timeout;
  return options;
}

// Each chunk is on two devices, in tiny tensors and in one that is not.
DeviceState two_devices() {
  std::vector<std::size_t> sizes;
  for (std::size_t i = 0; i < kChunks; ++i) {
    sizes.insert(sizes.end(), {16, 16, 32, 32, kChunk / 2 - 48, kChunk / 2 - 48});
  }
  return DeviceState(sizes, {0, 1});
}

Bytes read_back(const std::string& path, const WrittenPack& pack, std::size_t size) {
  Bytes bytes(size);
  const pysnap::Target all{0, reinterpret_cast<std::uintptr_t>(bytes.data()), size, kHost};
  CHECK(pysnap::restore({{path, pack.size}}, pack.chunks, {all}, 2, nullptr, {}, nullptr, nullptr));
  return bytes;
}

// A snapshot that is right; nothing where it has failed. The next step changes the tensors, or they
// are given back when the job has ended.
std::optional<WrittenPack> take_snapshot(Engine& engine, const std::string& path, bool steps,
                                         long nth, bool stays, bool& failed) {
  DeviceState state = two_devices();
  std::optional<WrittenPack> pack;
  std::shared_ptr<Job> job;
  {
    const ShortMemory memory(nth, stays);
    try {
      job = engine.begin(state.extents(), state.spans(kChunk), 2);
      job->open_pack(path);
      CHECK(job->capture(state.streams(), nullptr));
      CHECK(job->gate(state.streams(), nullptr));
      if (steps) state.fill(0xDD);
      job->wait_written(kForever);
      pack = job->finish();
    } catch (const std::exception&) {
      if (job != nullptr) job->abort();
    }
    failed = memory.has_failed();
  }
  CHECK(pack || failed);
  if (pack) CHECK(read_back(path, *pack, state.stream().size()) == state.stream());
  if (!steps) state.free();
  return pack;
}

}  // namespace

// The copies are held until a second job has had every slot that it got.
TEST(no_slot_is_reused_during_copies_whatever_allocation_fails) {
  for (const auto& [eager, stays] :
       std::vector<std::pair<std::size_t, bool>>{{0, false}, {2, false}, {2, true}}) {
    bool failed = true;
    for (long nth = 0; failed; nth += kStep) {
      const HealthyDriver driver;
      const TemporaryDirectory directory;
      const std::shared_ptr<Engine> engine = Engine::create(small_engine(kChunks, kSoon));
      engine->reserve(kChunks * kChunk, {0, 1}, kChunks * kChunk);
      engine->wait_reserved();
      const DeviceState state = two_devices();
      fake().set_late(FakeCuda::kCopies);
      fake().hold(-1);
      std::shared_ptr<Job> job;
      {
        const ShortMemory memory(nth, stays);
        try {
          job = engine->begin(state.extents(), state.spans(kChunk), eager);
        } catch (const std::bad_alloc&) {
        }
        // Training goes on, whatever fails.
        if (job != nullptr) {
          CHECK(job->capture(state.streams(), nullptr));
          CHECK(job->gate(state.streams(), nullptr));
        }
        failed = memory.has_failed();
      }
      if (job != nullptr) job->abort();
      const DeviceState host(std::vector<std::size_t>(kChunks, kChunk), {kHost});
      const std::shared_ptr<Job> next = engine->begin(host.extents(), host.spans(kChunk), kChunks);
      std::future<bool> captured =
          std::async(std::launch::async, [&] { return next->capture({}, nullptr); });
      std::this_thread::sleep_for(kSoon);
      fake().release();
      CHECK(captured.get());
      fake().finish();
      const std::string path = directory / "next.pack";
      next->open_pack(path);
      next->wait_written(kForever);
      CHECK(read_back(path, next->finish(), host.stream().size()) == host.stream());
    }
  }
}

TEST(a_snapshot_is_right_or_fails_whatever_allocation_fails) {
  for (const auto& [steps, stays] :
       std::vector<std::pair<bool, bool>>{{true, false}, {false, false}, {false, true}}) {
    bool failed = true;
    for (long nth = 0; failed; nth += kStep) {
      const HealthyDriver driver;
      const TemporaryDirectory directory;
      const std::shared_ptr<Engine> engine = Engine::create(small_engine(2));
      engine->reserve(kChunks * kChunk, {0, 1}, kChunks * kChunk);
      fake().set_late(FakeCuda::kCopies);
      take_snapshot(*engine, directory / "0.pack", steps, nth, stays, failed);
      bool never = false;
      take_snapshot(*engine, directory / "1.pack", steps, kNever, false, never);
    }
  }
}

// Of the device, too: what is told then needs memory.
TEST(a_device_that_is_lost_fails_the_job_whatever_allocation_fails) {
  bool failed = true;
  for (long nth = 0; failed; nth += kStep) {
    const HealthyDriver driver;
    const TemporaryDirectory directory;
    const std::shared_ptr<Engine> engine = Engine::create(small_engine(2));
    engine->reserve(kChunks * kChunk, {0, 1});
    fake().set_late(FakeCuda::kCopies);
    fake().fail_copy(5);
    DeviceState state = two_devices();
    std::shared_ptr<Job> job;
    const ShortMemory memory(nth);
    bool ended = false;
    try {
      job = engine->begin(state.extents(), state.spans(kChunk), 0);
      job->open_pack(directory / "0.pack");
      CHECK(job->capture(state.streams(), nullptr));
      CHECK(job->gate(state.streams(), nullptr));
      job->wait_written(kForever);
      ended = true;
    } catch (const std::exception&) {
    }
    CHECK(!ended);
    failed = memory.has_failed();
    if (job != nullptr) job->abort();
  }
}

TEST(a_restore_is_whole_or_fails_whatever_allocation_fails) {
  const TemporaryDirectory directory;
  const std::string path = directory / "0.pack";
  std::optional<WrittenPack> pack;
  {
    const HealthyDriver driver;
    const std::shared_ptr<Engine> engine = Engine::create(small_engine(2));
    bool failed = false;
    pack = take_snapshot(*engine, path, false, kNever, false, failed);
  }
  for (const auto& [threads, stays] :
       std::vector<std::pair<unsigned, bool>>{{1, false}, {3, false}, {3, true}}) {
    bool failed = true;
    for (long nth = 0; failed; nth += kStep) {
      const HealthyDriver driver;
      const TemporaryDirectory directory;
      DeviceState state = two_devices();
      state.fill(0);
      fake().finish();
      fake().set_late(FakeCuda::kCopies);
      bool restored = false;
      {
        const ShortMemory memory(nth, stays);
        try {
          restored = pysnap::restore({{path, pack->size}}, pack->chunks, state.targets(), threads,
                                     nullptr, state.streams(), nullptr, nullptr);
        } catch (const std::exception&) {
        }
        failed = memory.has_failed();
      }
      CHECK(restored || failed);
      if (restored) CHECK(state.now() == state.stream());
      // Nothing is copied any more.
      state.free();
    }
  }
}
