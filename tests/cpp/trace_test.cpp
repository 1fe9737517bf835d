#include "trace.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace {

namespace trace = pysnap::trace;
using trace::Phase;
using trace::Scope;

// On while it lives; begins with nothing noted.
class Tracing {
 public:
  Tracing() {
    trace::take();
    trace::enable(true);
  }
  Tracing(const Tracing&) = delete;
  Tracing& operator=(const Tracing&) = delete;
  ~Tracing() { trace::enable(false); }
};

TEST(off_nothing_is_noted) {
  trace::take();
  {
    Scope scope(Phase::kCopy, 1);
    scope.next(Phase::kWrite, 2);
  }
  CHECK_EQ(trace::take().spans.size(), 0u);
}

TEST(a_scope_is_a_span_and_next_begins_another) {
  const Tracing tracing;
  {
    Scope scope(Phase::kEncode, 7);
    scope.next(Phase::kWrite, 5);
  }
  const std::vector<trace::Span> spans = trace::take().spans;
  CHECK_EQ(spans.size(), 2u);
  if (spans.size() != 2) return;
  CHECK_EQ(trace::phase_names().at(spans[0].phase), std::string("encode"));
  CHECK_EQ(trace::phase_names().at(spans[1].phase), std::string("write"));
  CHECK_EQ(spans[0].amount, 7u);
  CHECK_EQ(spans[1].amount, 5u);
  CHECK(spans[0].start > 0 && spans[0].start <= spans[0].end && spans[0].end <= spans[1].start);
  CHECK_EQ(trace::take().spans.size(), 0u);
}

TEST(every_phase_has_a_name) {
  CHECK_EQ(trace::phase_names().size(), static_cast<std::size_t>(Phase::kMap) + 1);
  CHECK_EQ(trace::phase_names().back(), std::string("map"));
}

TEST(a_scope_that_began_while_it_was_off_is_not_noted) {
  trace::take();
  {
    const Scope scope(Phase::kCopy);
    trace::enable(true);
  }
  trace::enable(false);
  CHECK_EQ(trace::take().spans.size(), 0u);
}

TEST(spans_of_a_thread_that_has_ended_are_taken_once_with_its_name) {
  const Tracing tracing;
  std::thread([] {
    pthread_setname_np(pthread_self(), "worker");
    const Scope scope(Phase::kRead);
  }).join();
  const trace::Taken taken = trace::take();
  CHECK_EQ(taken.spans.size(), 1u);
  if (taken.spans.size() != 1) return;
  const auto named =
      std::find_if(taken.threads.begin(), taken.threads.end(),
                   [&](const trace::Thread& thread) { return thread.id == taken.spans[0].thread; });
  CHECK(named != taken.threads.end() && named->name == "worker");
  CHECK_EQ(trace::take().spans.size(), 0u);
}

TEST(a_buffer_is_bounded_and_what_is_dropped_is_counted) {
  const Tracing tracing;
  constexpr std::uint64_t kMany = 40000;
  for (std::uint64_t i = 0; i < kMany; ++i) const Scope scope(Phase::kCopy, i);
  const trace::Taken taken = trace::take();
  CHECK(taken.dropped > 0);
  CHECK_EQ(taken.spans.size() + taken.dropped, kMany);
  CHECK_EQ(taken.spans.back().amount, taken.spans.size() - 1);
  {
    const Scope scope(Phase::kCopy);
  }
  CHECK_EQ(trace::take().spans.size(), 1u);
}

TEST(threads_note_while_others_take) {
  const Tracing tracing;
  constexpr std::size_t kEach = 2000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (std::size_t j = 0; j < kEach; ++j) const Scope scope(Phase::kWrite, j);
    });
  }
  std::size_t found = 0;
  for (int i = 0; i < 100; ++i) found += trace::take().spans.size();
  for (std::thread& thread : threads) thread.join();
  found += trace::take().spans.size();
  CHECK_EQ(found, 4 * kEach);
}

}  // namespace
