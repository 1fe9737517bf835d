#include "engine.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "digest.h"
#include "file.h"
#include "fixture.h"
#include "restore.h"
#include "trace.h"

namespace {

namespace trace = pysnap::trace;

using fixture::Bytes;
using fixture::errno_of;
using fixture::TemporaryDirectory;
using fixture::thrown_by;
using pysnap::Codec;
using pysnap::Element;
using pysnap::Encoding;
using pysnap::Engine;
using pysnap::EngineOptions;
using pysnap::Extent;
using pysnap::Job;
using pysnap::kHost;
using pysnap::kPageSize;
using pysnap::Span;
using pysnap::StoredChunk;
using pysnap::WrittenPack;

constexpr std::size_t kChunk = 4 * kPageSize;
constexpr std::chrono::milliseconds kAtOnce{0};
// A wait this long that ends was woken.
constexpr std::chrono::hours kForever{24};

EngineOptions small_engine() {
  EngineOptions options;
  options.chunk_size = kChunk;
  options.slots = 64;
  options.nice = 0;
  return options;
}

// Tensors at addresses of their own, and the stream that they make.
class State {
 public:
  explicit State(const std::vector<std::size_t>& sizes) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      // Every third does not compress, so that both encodings occur.
      tensors_.push_back(i % 3 == 1 ? fixture::random_bytes(sizes[i], i)
                                    : fixture::skewed_elements(sizes[i], 4, i));
    }
  }

  // `chunks` tensors of one chunk each.
  static State of_chunks(std::size_t chunks) {
    return State(std::vector<std::size_t>(chunks, kChunk));
  }

  std::vector<Extent> extents() const {
    std::vector<Extent> extents;
    for (const Bytes& tensor : tensors_) {
      extents.push_back({reinterpret_cast<std::uintptr_t>(tensor.data()), tensor.size(), kHost});
    }
    return extents;
  }

  Bytes stream() const {
    Bytes all;
    for (const Bytes& tensor : tensors_) all.insert(all.end(), tensor.begin(), tensor.end());
    return all;
  }

  std::vector<Span> spans() const { return cut(stream().size()); }

  // What the next training step does to it, or to the tensors from `first` on.
  void scribble(std::size_t first = 0) {
    for (std::size_t i = first; i < tensors_.size(); ++i)
      std::fill(tensors_[i].begin(), tensors_[i].end(), 0xDD);
  }

 private:
  // Chunks of floats, not all of the same length; what is left are bytes.
  static std::vector<Span> cut(std::size_t size) {
    std::vector<Span> spans;
    while (size >= 4) {
      const std::size_t raw = std::min(spans.size() % 5 == 4 ? 1000 : kChunk, size / 4 * 4);
      spans.push_back({static_cast<std::uint32_t>(raw), Element::kF32});
      size -= raw;
    }
    if (size > 0) spans.push_back({static_cast<std::uint32_t>(size), Element::kU8});
    return spans;
  }

  std::vector<Bytes> tensors_;
};

// 19 chunks: nothing, tiny, longer than a chunk, ending on its border.
State mixed_state() {
  return State({0, 1, 3, 0, 0, 3 * kChunk + 17, 4, kChunk, 1, 0, 5 * kChunk - 9, 2, 4 * kChunk,
                30000, 7, 0});
}

std::shared_ptr<Job> begin(Engine& engine, const State& state, std::size_t eager) {
  return engine.begin(state.extents(), state.spans(), eager);
}

std::shared_ptr<Job> begin(Engine& engine, const State& state) {
  return begin(engine, state, state.spans().size());
}

// The part of the committing thread.
WrittenPack write_pack(Job& job, const std::string& path) {
  job.open_pack(path);
  CHECK(job.wait_written(kForever));
  return job.finish();
}

std::future<WrittenPack> write_pack_beside(Job& job, const std::string& path) {
  return std::async(std::launch::async, [&job, path] { return write_pack(job, path); });
}

Bytes read_back(const std::string& path, const WrittenPack& pack, std::size_t size) {
  Bytes bytes(size);
  const pysnap::Target all{0, reinterpret_cast<std::uintptr_t>(bytes.data()), size, kHost};
  CHECK(pysnap::restore({{path, pack.size}}, pack.chunks, {all}, 2, fixture::zstd(), {}, nullptr,
                        nullptr));
  return bytes;
}

bool takes_a_snapshot(Engine& engine, const std::string& path) {
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(engine, state);
  std::future<WrittenPack> pack = write_pack_beside(*job, path);
  return job->capture({}, nullptr) && job->gate({}, nullptr) &&
         read_back(path, pack.get(), state.stream().size()) == state.stream();
}

// What the manifest and docs/format.md say about a pack, compared with the file.
void check_pack(const std::string& path, const WrittenPack& pack, const State& state,
                bool with_zstd) {
  const Bytes file = fixture::read_file(path);
  const Bytes stream = state.stream();
  const std::vector<Span> spans = state.spans();
  CHECK_EQ(file.size(), pack.size);
  CHECK_EQ(pack.chunks.size(), spans.size());
  std::size_t position = 0;
  std::size_t pages = 0;
  std::size_t raw_chunks = 0;
  std::vector<bool> used(file.size() / kPageSize);
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const StoredChunk& chunk = pack.chunks[i];
    CHECK_EQ(chunk.pack, 0);
    CHECK_EQ(chunk.raw, spans[i].raw);
    CHECK_EQ(chunk.element, spans[i].element);
    CHECK(chunk.digest == pysnap::xxh3_128(stream.data() + position, chunk.raw));
    position += chunk.raw;
    if (chunk.encoding == Encoding::kRaw) ++raw_chunks;
    CHECK(chunk.encoding == Encoding::kRaw ? chunk.stored == chunk.raw : chunk.stored < chunk.raw);
    CHECK_EQ(chunk.offset % kPageSize, 0);
    const std::size_t end = pysnap::round_up(chunk.offset + chunk.stored, kPageSize);
    CHECK(end <= file.size());
    CHECK_EQ(std::count(file.begin() + chunk.offset + chunk.stored, file.begin() + end, 0),
             end - chunk.offset - chunk.stored);
    for (std::size_t page = chunk.offset / kPageSize; page < end / kPageSize; ++page, ++pages) {
      CHECK(!used[page]);
      used[page] = true;
    }
  }
  CHECK_EQ(pages * kPageSize, file.size());
  CHECK_EQ(raw_chunks == spans.size(), !with_zstd);
  CHECK(raw_chunks > 0);
}

// No file of this process may grow past `bytes` while this lives. SIGXFSZ stays as it is: the
// engine must not raise it.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) throw std::runtime_error("setrlimit failed");
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

// Ends of the forked child; its exit status says which.
constexpr int kAsExpected = 0;
constexpr int kUnexpected = 1;

// Runs call() in a forked child, which SIGALRM ends if it hangs. True if the child says that all
// was as expected.
template <typename Call>
bool holds_in_child(Call call) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGALRM, SIG_DFL);
    ::alarm(20);
    ::_exit(call() ? kAsExpected : kUnexpected);
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
  return WIFEXITED(status) && WEXITSTATUS(status) == kAsExpected;
}

// A snapshot whose pack is open before its capture, and when its chunks went where.
struct Traced {
  WrittenPack pack;
  std::vector<trace::Span> spans;
  std::map<std::uint32_t, std::string> threads;

  std::set<std::string> threads_of(trace::Phase phase) const {
    std::set<std::string> names;
    for (const trace::Span& span : spans)
      if (is(span, phase)) names.insert(threads.at(span.thread));
    return names;
  }
  std::ptrdiff_t begun_before_last_copy(trace::Phase phase) const {
    std::uint64_t last_copy = 0;
    for (const trace::Span& span : spans)
      if (is(span, trace::Phase::kCopy)) last_copy = std::max(last_copy, span.start);
    return std::count_if(spans.begin(), spans.end(), [&](const trace::Span& span) {
      return is(span, phase) && span.start < last_copy;
    });
  }
  static bool is(const trace::Span& span, trace::Phase phase) {
    return span.phase == static_cast<std::uint8_t>(phase);
  }
};

// Once a thread that was woken has seen that there is nothing to do yet.
void wait_until_asleep(const std::string& name) {
  std::vector<std::string> states;
  do {
    std::this_thread::yield();
    states = fixture::told_of_threads(name, "State:");
    // Those that have started: none may have.
  } while (states.empty() || states != std::vector<std::string>(states.size(), "S"));
}

Traced trace_snapshot(Engine& engine, const State& state, const std::string& path) {
  // Where slots run out, workers do not wait for the copy.
  engine.reserve(state.spans().size() * kChunk);
  engine.wait_reserved();
  trace::take();
  trace::enable(true);
  const std::shared_ptr<Job> job = begin(engine, state);
  job->open_pack(path);
  // Who sees the pack only after the copy was not woken by its end.
  wait_until_asleep("pysnap-work");
  wait_until_asleep("pysnap-write");
  CHECK(job->capture({}, nullptr));
  while (!job->wait_written(pysnap::kPoll)) {
  }
  WrittenPack pack = job->finish();
  trace::enable(false);
  trace::Taken taken = trace::take();
  std::map<std::uint32_t, std::string> threads;
  for (const trace::Thread& thread : taken.threads) threads[thread.id] = thread.name;
  return {std::move(pack), std::move(taken.spans), std::move(threads)};
}

}  // namespace

TEST(what_is_restored_is_what_was_captured) {
  const TemporaryDirectory directory;
  const State state = mixed_state();
  int pack = 0;
  for (const unsigned workers : {1U, 4U}) {
    for (const unsigned copy_threads : {1U, 4U}) {
      for (const std::size_t slots : {2U, 64U}) {
        for (const bool with_zstd : {false, true}) {
          EngineOptions options = small_engine();
          options.workers = workers;
          options.copy_threads = copy_threads;
          options.slots = slots;
          options.direct_io = with_zstd;
          options.codec = with_zstd ? Codec::kFast : Codec::kNone;
          options.zstd = with_zstd ? fixture::zstd() : nullptr;
          const std::shared_ptr<Engine> engine = Engine::create(options);
          const std::shared_ptr<Job> job = begin(*engine, state);
          const std::string path = directory / std::to_string(pack++);
          std::future<WrittenPack> written = write_pack_beside(*job, path);
          CHECK(job->capture({}, nullptr));
          const WrittenPack table = written.get();
          check_pack(path, table, state, with_zstd);
          CHECK(read_back(path, table, state.stream().size()) == state.stream());
        }
      }
    }
  }
}

TEST(every_codec_of_an_engine_is_read_back) {
  const TemporaryDirectory directory;
  const State state = mixed_state();
  std::map<Codec, std::size_t> encoded, stored;
  for (const Codec codec : {Codec::kNone, Codec::kFast, Codec::kSmall, Codec::kAuto}) {
    EngineOptions options = small_engine();
    options.codec = codec;
    options.zstd = fixture::zstd();
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const std::shared_ptr<Job> job = begin(*engine, state);
    const std::string path = directory / std::to_string(static_cast<int>(codec));
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(job->capture({}, nullptr));
    const WrittenPack table = written.get();
    for (const StoredChunk& chunk : table.chunks) {
      encoded[codec] += chunk.encoding == Encoding::kPlanes;
      stored[codec] += chunk.stored;
    }
    CHECK(read_back(path, table, state.stream().size()) == state.stream());
  }
  CHECK_EQ(encoded[Codec::kNone], 0);
  CHECK(encoded[Codec::kAuto] > 0);
  CHECK(encoded[Codec::kAuto] <= encoded[Codec::kFast]);
  CHECK(stored[Codec::kSmall] < stored[Codec::kFast]);
}

// A disk need not be idle while the caller copies; the processors are the caller's.
TEST(chunks_are_written_while_others_are_copied_and_digested_afterwards) {
  const State state = State::of_chunks(400);
  for (const bool direct : {false, true}) {
    const TemporaryDirectory directory;
    EngineOptions options = small_engine();
    options.slots = 600;
    options.copy_threads = 1;
    options.direct_io = direct;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    bool seen = false;
    // It is for the kernel to say when a worker runs.
    for (int pack = 0; pack < 200 && !seen; ++pack) {
      const std::string path = directory / std::to_string(pack);
      const Traced traced = trace_snapshot(*engine, state, path);
      CHECK_EQ(traced.begun_before_last_copy(trace::Phase::kEncode), 0);
      seen = traced.begun_before_last_copy(trace::Phase::kWrite) > 0;
      check_pack(path, traced.pack, state, false);
      CHECK(read_back(path, traced.pack, state.stream().size()) == state.stream());
    }
    CHECK(seen);
  }
}

// A buffered write is a copy, which is for threads of low priority; a direct one takes no time.
TEST(writers_write_past_the_page_cache_and_workers_do_the_work) {
  const TemporaryDirectory directory;
  const State state = State::of_chunks(40);
  const bool has_direct = pysnap::File::create(directory / "probe", true).is_direct();
  for (const bool direct : {false, true}) {
    EngineOptions options = small_engine();
    options.direct_io = direct;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const Traced traced =
        trace_snapshot(*engine, state, directory / (direct ? "direct" : "buffered"));
    const std::string writer = direct && has_direct ? "pysnap-write" : "pysnap-work";
    CHECK(traced.threads_of(trace::Phase::kWrite) == std::set<std::string>{writer});
    CHECK(traced.threads_of(trace::Phase::kEncode) == std::set<std::string>{"pysnap-work"});
  }
}

// A disk needs some writes in flight, however few workers the cores allow.
TEST(an_engine_has_four_writers_or_as_many_as_workers) {
  for (const auto& [workers, writers] : {std::pair{1U, 4U}, std::pair{6U, 6U}}) {
    EngineOptions options = small_engine();
    options.workers = workers;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    // A thread gives itself its name when it runs; with too few this waits for ever.
    while (fixture::told_of_threads("pysnap-write", "State:").size() < writers)
      std::this_thread::yield();
    CHECK_EQ(fixture::told_of_threads("pysnap-write", "State:").size(), writers);
  }
}

// Encoding would take the processors from the caller.
TEST(what_is_to_be_encoded_waits_until_all_is_copied) {
  const TemporaryDirectory directory;
  const State state = State::of_chunks(400);
  EngineOptions options = small_engine();
  options.slots = 600;
  options.codec = Codec::kFast;
  options.zstd = fixture::zstd();
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const Traced traced = trace_snapshot(*engine, state, directory / "pack");
  CHECK_EQ(traced.begun_before_last_copy(trace::Phase::kEncode), 0);
  CHECK_EQ(traced.begun_before_last_copy(trace::Phase::kWrite), 0);
  check_pack(directory / "pack", traced.pack, state, true);
}

TEST(one_engine_takes_many_snapshots) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 8;
  options.copy_threads = 3;
  options.codec = Codec::kFast;
  options.zstd = fixture::zstd();
  const std::shared_ptr<Engine> engine = Engine::create(options);
  for (int i = 0; i < 10; ++i) {
    State state = mixed_state();
    const Bytes stream = state.stream();
    const std::shared_ptr<Job> job = begin(*engine, state, state.spans().size() * i / 10);
    const std::string path = directory / std::to_string(i);
    std::future<WrittenPack> written = write_pack_beside(*job, path);
    CHECK(job->capture({}, nullptr));
    CHECK(job->gate({}, nullptr));
    state.scribble();
    CHECK(read_back(path, written.get(), stream.size()) == stream);
  }
}

TEST(a_disk_that_takes_nothing_fails_the_job_and_lets_the_caller_go_on) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 2;
  options.disk_timeout = std::chrono::milliseconds{1};
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const State state = State::of_chunks(6);
  for (const std::size_t eager : {std::size_t{0}, std::size_t{6}}) {
    const std::shared_ptr<Job> job = begin(*engine, state, eager);
    CHECK(job->capture({}, nullptr));
    CHECK(job->gate({}, nullptr));
    CHECK_EQ(errno_of([&] { job->wait_written(kAtOnce); }), ETIMEDOUT);
    CHECK_EQ(errno_of([&] { job->open_pack(directory / std::to_string(eager)); }), ETIMEDOUT);
    job->abort();
  }
  const State small = State::of_chunks(2);
  const std::shared_ptr<Job> job = begin(*engine, small);
  CHECK(job->capture({}, nullptr));
  job->abort();
}

TEST(a_state_without_bytes_makes_an_empty_pack) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  for (const State& state : {State({}), State({0, 0})}) {
    const std::string path = directory / std::to_string(state.extents().size());
    const std::shared_ptr<Job> job = begin(*engine, state);
    CHECK(job->capture({}, nullptr));
    CHECK(job->gate({}, nullptr));
    CHECK(job->wait_staged(kForever));
    const WrittenPack pack = write_pack(*job, path);
    CHECK_EQ(pack.size, 0);
    CHECK_EQ(pack.chunks.size(), 0);
    CHECK_EQ(std::filesystem::file_size(path), 0);
  }
}

TEST(what_is_eager_may_change_after_capture) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  State state = mixed_state();
  const Bytes stream = state.stream();
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture({}, nullptr));
  state.scribble();
  CHECK(job->gate({}, nullptr));
  CHECK(job->wait_staged(kForever));
  const std::string path = directory / "0.pack";
  CHECK(read_back(path, write_pack(*job, path), stream.size()) == stream);
}

TEST(what_is_lazy_may_change_after_the_gate) {
  const TemporaryDirectory directory;
  for (const unsigned copy_threads : {1U, 4U}) {
    for (const std::size_t slots : {4U, 64U}) {
      EngineOptions options = small_engine();
      options.copy_threads = copy_threads;
      options.slots = slots;
      const std::shared_ptr<Engine> engine = Engine::create(options);
      State state = mixed_state();
      const Bytes stream = state.stream();
      const std::shared_ptr<Job> job = begin(*engine, state, 3);
      const std::string path = directory / (std::to_string(copy_threads) + std::to_string(slots));
      std::future<WrittenPack> written = write_pack_beside(*job, path);
      CHECK(job->capture({}, nullptr));
      CHECK(job->gate({}, nullptr));
      state.scribble();
      CHECK(read_back(path, written.get(), stream.size()) == stream);
    }
  }
}

TEST(what_is_lazy_and_changes_before_it_is_copied_fails_the_job) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 2;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  State state = State::of_chunks(8);
  const std::shared_ptr<Job> job = begin(*engine, state, 1);
  CHECK(job->capture({}, nullptr));
  CHECK(!job->wait_staged(kAtOnce));
  // The first two may be copied at this moment; there is no slot for the others.
  state.scribble(options.slots);
  CHECK_EQ(thrown_by([&] { write_pack(*job, directory / "0.pack"); }), "torn");
  job->abort();
  CHECK(takes_a_snapshot(*engine, directory / "1.pack"));
}

TEST(what_is_lazy_is_copied_without_a_gate) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.copy_threads = 1;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  State state = mixed_state();
  const Bytes stream = state.stream();
  const std::shared_ptr<Job> job = begin(*engine, state, 0);
  CHECK(!job->wait_staged(kAtOnce));
  CHECK(job->capture({}, nullptr));
  CHECK(job->wait_staged(kForever));
  state.scribble();
  const std::string path = directory / "0.pack";
  CHECK(read_back(path, write_pack(*job, path), stream.size()) == stream);
}

// The eager chunks take all slots, so that one chunk more would wait for ever.
TEST(capture_copies_the_eager_chunks_alone) {
  EngineOptions options = small_engine();
  options.slots = 4;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const State state = State::of_chunks(4);
  std::vector<Extent> extents = state.extents();
  const Bytes lazy(kChunk);
  extents.push_back({reinterpret_cast<std::uintptr_t>(lazy.data()), kChunk, kHost});
  const std::shared_ptr<Job> job =
      engine->begin(extents, std::vector<Span>(5, Span{kChunk, Element::kF32}), 4);
  CHECK(job->capture({}, nullptr));
  CHECK(!job->wait_staged(kAtOnce));
  job->abort();
}

TEST(waits_end_at_their_deadline) {
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(!job->wait_staged(kAtOnce));
  CHECK(!job->wait_written(kAtOnce));
  CHECK(job->capture({}, nullptr));
  CHECK(job->wait_staged(kAtOnce));
  CHECK(!job->wait_written(kAtOnce));
  CHECK_EQ(thrown_by([&] { job->finish(); }), "invalid");
  CHECK_EQ(thrown_by([&] { begin(*engine, state); }), "invalid");
  job->abort();
}

TEST(staging_memory_may_be_reserved) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  engine->reserve(std::uint64_t{1} << 40);
  engine->wait_reserved();
  CHECK(takes_a_snapshot(*engine, directory / "0.pack"));
}

TEST(options_that_cannot_be_are_refused) {
  const auto refused = [](auto change) {
    EngineOptions options = small_engine();
    change(options);
    return thrown_by([&] { Engine::create(options); }) == "invalid";
  };
  CHECK(refused([](EngineOptions& options) { options.chunk_size = 0; }));
  CHECK(refused([](EngineOptions& options) { options.chunk_size = kPageSize + 1; }));
  CHECK(refused([](EngineOptions& options) { options.chunk_size = 2 * pysnap::kLargestChunk; }));
  CHECK(refused([](EngineOptions& options) { options.slots = 1; }));
  CHECK(refused([](EngineOptions& options) { options.workers = 0; }));
  CHECK(refused([](EngineOptions& options) { options.copy_threads = 0; }));
}

TEST(spans_that_do_not_fit_are_refused) {
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = State::of_chunks(2);
  const auto begins = [&](const std::vector<Span>& spans, std::size_t eager) {
    return thrown_by([&] { engine->begin(state.extents(), spans, eager)->abort(); });
  };
  const Span whole{kChunk, Element::kF32};
  CHECK_EQ(begins({whole, whole}, 2), "nothing");
  CHECK_EQ(begins({whole, whole}, 3), "invalid");
  CHECK_EQ(begins({whole}, 0), "invalid");
  CHECK_EQ(begins({whole, whole, whole}, 0), "invalid");
  CHECK_EQ(begins({{2 * kChunk, Element::kF32}}, 0), "invalid");
  CHECK_EQ(begins({whole, whole, {0, Element::kF32}}, 0), "invalid");
  CHECK_EQ(begins({{kChunk - 2, Element::kF32}, {2, Element::kF16}, whole}, 0), "invalid");
  CHECK_EQ(begins({{kChunk - 2, Element::kF16}, {2, Element::kU8}, whole}, 0), "nothing");
  CHECK_EQ(begins({whole, {kChunk, static_cast<Element>(7)}}, 0), "invalid");
}

TEST(a_device_that_is_not_there_is_refused) {
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  CHECK_EQ(thrown_by([&] { engine->begin({{1, kChunk, -2}}, {{kChunk, Element::kF32}}, 1); }),
           "invalid");
}

TEST(streams_of_other_devices_are_ignored) {
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state, 1);
  CHECK(job->capture({{kHost, 0}, {5, 77}}, nullptr));
  CHECK(job->gate({{kHost, 0}, {5, 77}}, nullptr));
  CHECK(job->wait_staged(kAtOnce));
  job->abort();
}

TEST(a_pack_that_cannot_be_made_fails_the_job_and_no_other) {
  const TemporaryDirectory directory;
  fixture::write_file(directory / "taken", {1});
  EngineOptions options = small_engine();
  options.slots = 4;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  for (const auto& [name, number] :
       {std::pair{"missing/0.pack", ENOENT}, std::pair{"taken", EEXIST}}) {
    const State state = mixed_state();
    const std::shared_ptr<Job> job = begin(*engine, state, 12);
    // Without the failure this capture would wait for slots for ever.
    std::future<bool> captured =
        std::async(std::launch::async, [&] { return job->capture({}, nullptr); });
    const std::string path = directory / name;
    CHECK_EQ(errno_of([&] { job->open_pack(path); }), number);
    CHECK(captured.get());
    CHECK(job->gate({}, nullptr));
    CHECK(job->wait_staged(kForever));
    CHECK_EQ(errno_of([&] { job->wait_written(kForever); }), number);
    CHECK_EQ(errno_of([&] { job->finish(); }), number);
    CHECK(takes_a_snapshot(*engine, directory / std::to_string(number)));
  }
  CHECK(fixture::read_file(directory / "taken") == Bytes({1}));
}

TEST(a_disk_without_room_fails_the_job_and_no_other) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  {
    // In Python's process, too, this signal is ignored.
    void (*handler)(int) = std::signal(SIGXFSZ, SIG_IGN);
    const FileSizeLimit limit(kChunk);
    CHECK_EQ(errno_of([&] { job->open_pack(directory / "0.pack"); }), EFBIG);
    std::signal(SIGXFSZ, handler);
  }
  CHECK(job->capture({}, nullptr));
  CHECK(job->gate({}, nullptr));
  CHECK_EQ(errno_of([&] { job->finish(); }), EFBIG);
  CHECK(takes_a_snapshot(*engine, directory / "1.pack"));
}

TEST(a_write_that_fails_is_told_by_the_waits_alone) {
  const TemporaryDirectory directory;
  for (const unsigned workers : {1U, 4U}) {
    EngineOptions options = small_engine();
    options.workers = workers;
    options.slots = 8;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const State state = mixed_state();
    const std::shared_ptr<Job> job = begin(*engine, state, 10);
    const std::string path = directory / std::to_string(workers);
    job->open_pack(path);
    {
      const FileSizeLimit limit(2 * kChunk);
      CHECK(job->capture({}, nullptr));
      CHECK(job->gate({}, nullptr));
      CHECK_EQ(errno_of([&] { job->wait_written(kForever); }), EFBIG);
      CHECK(job->wait_staged(kForever));
    }
    // The first failure is the one that is told.
    job->abort();
    try {
      job->finish();
      CHECK(false);
    } catch (const pysnap::Error& error) {
      CHECK_EQ(error.path(), path);
      CHECK_EQ(error.error_number(), EFBIG);
    }
    CHECK(takes_a_snapshot(*engine, path + ".next"));
  }
}

TEST(finish_succeeds_once) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture({}, nullptr));
  CHECK_EQ(write_pack(*job, directory / "0.pack").chunks.size(), state.spans().size());
  CHECK_EQ(thrown_by([&] { job->finish(); }), "invalid");
}

TEST(abort_ends_a_job_at_every_stage) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 64;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  for (int stage = 0; stage < 6; ++stage) {
    const State state = mixed_state();
    const std::shared_ptr<Job> job = begin(*engine, state, 10);
    const std::string path = directory / std::to_string(stage);
    if (stage == 1) CHECK(job->capture({}, nullptr));
    if (stage == 2) job->open_pack(path);
    if (stage == 3) CHECK(job->capture({}, nullptr) && job->gate({}, nullptr));
    if (stage >= 4) {
      job->open_pack(path);
      CHECK(job->capture({}, nullptr));
    }
    if (stage == 5) CHECK(job->wait_written(kForever));
    job->abort();
    job->abort();
    CHECK(job->capture({}, nullptr));
    CHECK(job->gate({}, nullptr));
    CHECK(job->wait_staged(kForever));
    CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "closed");
    CHECK_EQ(thrown_by([&] { job->open_pack(path + ".late"); }), "closed");
    CHECK_EQ(thrown_by([&] { job->finish(); }), "closed");
    CHECK(takes_a_snapshot(*engine, path + ".next"));
  }
}

TEST(abort_after_the_end_changes_nothing) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> first = begin(*engine, state);
  CHECK(first->capture({}, nullptr));
  const WrittenPack pack = write_pack(*first, directory / "0.pack");
  const std::shared_ptr<Job> second = begin(*engine, state);
  first->abort();
  CHECK(read_back(directory / "0.pack", pack, state.stream().size()) == state.stream());
  CHECK_EQ(thrown_by([&] { begin(*engine, state); }), "invalid");
  CHECK(second->capture({}, nullptr));
  write_pack(*second, directory / "1.pack");
}

// The pack of a job that was given up may be deleted; its space is free only when nobody has it
// open.
TEST(abort_closes_the_pack) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  const std::string path = std::filesystem::canonical(directory / ".") / "0.pack";
  const auto is_open = [&] {
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      if (std::filesystem::read_symlink(entry, gone) == path) return true;
    }
    return false;
  };
  job->open_pack(path);
  CHECK(is_open());
  job->abort();
  CHECK(!is_open());
}

// The next three look for a copy that still runs when the caller goes on. One tensor is every chunk
// of the stream: the threads are long busy with it, and it is changed and freed at once.
constexpr std::size_t kLongChunk = 64 * kPageSize;
constexpr std::size_t kLongChunks = 48;

std::shared_ptr<Engine> engine_of_long_chunks() {
  EngineOptions options = small_engine();
  options.chunk_size = kLongChunk;
  options.slots = kLongChunks;
  options.copy_threads = 4;
  options.codec = Codec::kFast;
  options.zstd = fixture::zstd();
  const std::shared_ptr<Engine> engine = Engine::create(options);
  engine->reserve(kLongChunk * kLongChunks);
  engine->wait_reserved();
  return engine;
}

class LongState {
 public:
  std::shared_ptr<Job> begin(Engine& engine, std::size_t eager) const {
    const Extent extent{reinterpret_cast<std::uintptr_t>(tensor_.data()), kLongChunk, kHost};
    return engine.begin(std::vector<Extent>(kLongChunks, extent),
                        std::vector<Span>(kLongChunks, Span{kLongChunk, Element::kF32}), eager);
  }
  void scribble_and_free() {
    std::fill(tensor_.begin(), tensor_.end(), 0xDD);
    Bytes().swap(tensor_);
  }

 private:
  Bytes tensor_ = Bytes(kLongChunk, 1);
};

TEST(nothing_eager_is_read_after_capture) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = engine_of_long_chunks();
  const Bytes ones(kLongChunk, 1);
  const pysnap::Digest digest = pysnap::xxh3_128(ones.data(), ones.size());
  for (int i = 0; i < 5; ++i) {
    LongState state;
    const std::shared_ptr<Job> job = state.begin(*engine, kLongChunks);
    CHECK(job->capture({}, nullptr));
    state.scribble_and_free();
    for (const StoredChunk& chunk : write_pack(*job, directory / std::to_string(i)).chunks) {
      CHECK(chunk.digest == digest);
    }
  }
}

TEST(nothing_is_read_after_abort) {
  const std::shared_ptr<Engine> engine = engine_of_long_chunks();
  for (int i = 0; i < 10; ++i) {
    LongState state;
    const std::shared_ptr<Job> job = state.begin(*engine, kLongChunks / 2);
    CHECK(job->capture({}, nullptr));
    job->abort();
    state.scribble_and_free();
  }
}

TEST(nothing_is_read_after_wait_staged_of_a_failed_job) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = engine_of_long_chunks();
  for (int i = 0; i < 10; ++i) {
    LongState state;
    const std::shared_ptr<Job> job = state.begin(*engine, kLongChunks / 2);
    CHECK(job->capture({}, nullptr));
    CHECK_EQ(errno_of([&] { job->open_pack(directory / "missing/0.pack"); }), ENOENT);
    CHECK(job->wait_staged(kForever));
    state.scribble_and_free();
    CHECK_EQ(errno_of([&] { job->finish(); }), ENOENT);
  }
}

// A job that has no pack and fewer slots than chunks waits until somebody ends it.
TEST(capture_that_waits_for_slots_can_be_interrupted) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 4;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  int polls = 0;
  CHECK(!job->capture({}, [&] { return ++polls == 2; }));
  CHECK_EQ(polls, 2);
  state.scribble();
  CHECK_EQ(thrown_by([&] { job->finish(); }), "closed");
  CHECK(takes_a_snapshot(*engine, directory / "0.pack"));
}

TEST(gate_that_waits_for_slots_can_be_interrupted) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 4;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state, 2);
  CHECK(job->capture({}, nullptr));
  CHECK(!job->gate({}, [] { return true; }));
  // The job goes on.
  const std::string path = directory / "0.pack";
  CHECK(read_back(path, write_pack(*job, path), state.stream().size()) == state.stream());
}

TEST(abort_wakes_a_capture_that_waits_for_slots) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 4;
  const std::shared_ptr<Engine> engine = Engine::create(options);
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  CHECK(job->capture({}, [&] {
    std::thread(&Job::abort, job.get()).join();
    return false;
  }));
  CHECK(job->wait_staged(kForever));
  CHECK(takes_a_snapshot(*engine, directory / "0.pack"));
}

TEST(close_ends_the_job_in_flight_at_every_stage) {
  const TemporaryDirectory directory;
  for (int stage = 0; stage < 5; ++stage) {
    EngineOptions options = small_engine();
    options.slots = 4;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const State state = mixed_state();
    const std::shared_ptr<Job> job = begin(*engine, state, 3);
    const std::string path = directory / std::to_string(stage);
    if (stage == 1) CHECK(job->capture({}, nullptr));
    if (stage == 2) job->open_pack(path);
    if (stage == 3) {
      job->open_pack(path);
      CHECK(job->capture({}, nullptr));
    }
    if (stage == 4) {
      CHECK(job->capture({}, nullptr));
      CHECK(job->gate({}, [&] {
        engine->close();
        return false;
      }));
    }
    engine->close();
    engine->close();
    CHECK(job->capture({}, nullptr));
    CHECK(job->gate({}, nullptr));
    CHECK(job->wait_staged(kForever));
    CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "closed");
    CHECK_EQ(thrown_by([&] { job->finish(); }), "closed");
    CHECK_EQ(thrown_by([&] { begin(*engine, state); }), "closed");
    CHECK_EQ(thrown_by([&] { engine->staging(); }), "closed");
    job->abort();
  }
}

TEST(close_wakes_who_waits) {
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  const std::shared_ptr<Job> job = begin(*engine, state);
  std::thread staged([&] { CHECK(job->wait_staged(kForever)); });
  std::thread written([&] { CHECK_EQ(thrown_by([&] { job->wait_written(kForever); }), "closed"); });
  engine->close();
  staged.join();
  written.join();
}

TEST(an_engine_may_go_while_it_writes) {
  const TemporaryDirectory directory;
  for (int i = 0; i < 20; ++i) {
    const State state = mixed_state();
    EngineOptions options = small_engine();
    options.codec = Codec::kFast;
    options.zstd = fixture::zstd();
    options.copy_threads = 3;
    const std::shared_ptr<Engine> engine = Engine::create(options);
    const std::shared_ptr<Job> job = begin(*engine, state, state.spans().size() * i / 20);
    job->open_pack(directory / std::to_string(i));
    CHECK(job->capture({}, nullptr));
  }
}

TEST(a_job_that_nobody_holds_is_still_in_flight) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  const State state = mixed_state();
  begin(*engine, state)->open_pack(directory / "0.pack");
  CHECK_EQ(thrown_by([&] { begin(*engine, state); }), "invalid");
}

TEST(a_forked_child_can_use_nothing_and_does_not_hang) {
  const TemporaryDirectory directory;
  EngineOptions options = small_engine();
  options.slots = 4;
  std::shared_ptr<Engine> engine = Engine::create(options);
  State state = mixed_state();
  std::shared_ptr<Job> job = begin(*engine, state, 3);
  CHECK(job->capture({}, nullptr));
  CHECK(holds_in_child([&] {
    const auto closed = [](auto call) { return thrown_by(call) == "closed"; };
    const bool all =
        closed([&] { begin(*engine, state); }) && closed([&] { engine->close(); }) &&
        closed([&] { engine->staging(); }) && closed([&] { engine->reserve(1); }) &&
        closed([&] { engine->wait_reserved(); }) && closed([&] { job->capture({}, nullptr); }) &&
        closed([&] { job->gate({}, nullptr); }) &&
        closed([&] { job->open_pack(directory / "child"); }) &&
        closed([&] { job->wait_staged(kAtOnce); }) && closed([&] { job->wait_written(kAtOnce); }) &&
        closed([&] { job->finish(); }) && closed([&] { job->abort(); });
    job.reset();
    engine.reset();
    return all && !std::filesystem::exists(directory / "child");
  }));
  std::future<WrittenPack> written = write_pack_beside(*job, directory / "0.pack");
  CHECK(job->gate({}, nullptr));
  const Bytes stream = state.stream();
  state.scribble();
  CHECK(read_back(directory / "0.pack", written.get(), stream.size()) == stream);
}

TEST(a_forked_child_may_have_an_engine_of_its_own) {
  const TemporaryDirectory directory;
  const std::shared_ptr<Engine> engine = Engine::create(small_engine());
  CHECK(takes_a_snapshot(*engine, directory / "0.pack"));
  // ThreadSanitizer ends a forked child that starts threads.
  if (fixture::kThreadSanitizer) return;
  CHECK(holds_in_child([&] {
    const std::shared_ptr<Engine> own = Engine::create(small_engine());
    return takes_a_snapshot(*own, directory / "1.pack");
  }));
}
