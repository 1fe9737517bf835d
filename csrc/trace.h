// trace.h: when which thread did what, for a timeline of a run.
//
//   trace::Scope scope(trace::Phase::kEncode, bytes);   // until the end of the block
//   scope.next(trace::Phase::kWrite, bytes);            // or until here
//
// Off, a scope costs one relaxed load. On, it costs two readings of the clock and a place in a
// buffer of its thread, which is bounded: what finds no place until the next take() is counted and
// dropped.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace pysnap::trace {

enum class Phase : std::uint8_t {
  kCopy,    // a chunk from host memory into its slot, or the call that has a device do so
  kLand,    // waiting for a device's copy of a chunk
  kEncode,  // digest and planes of a chunk
  kWrite,   // a chunk into the pack
  kRead,    // a chunk out of a pack, decoded and checked; the one before is copied meanwhile
  kPut,     // a chunk handed to its targets
  kMap,     // staging memory is mapped and touched
};
// The name of every phase, in order.
const std::vector<std::string>& phase_names();

struct Span {
  std::uint64_t start;  // nanoseconds of CLOCK_MONOTONIC
  std::uint64_t end;
  std::uint64_t amount;  // bytes, or 0
  std::uint32_t thread;  // as the kernel names it
  std::uint8_t phase;
};

struct Thread {
  std::uint32_t id;
  std::string name;
};

struct Taken {
  std::vector<Span> spans;      // each thread's in order
  std::vector<Thread> threads;  // every one that ever had a span
  std::uint64_t dropped;        // since the last take()
};

// Begins or ends to note spans, of every thread of the process. Any thread may call it.
void enable(bool on);
// What was noted since the last call. Any thread may call it.
Taken take();

namespace internal {
extern std::atomic<bool> enabled;
std::uint64_t now();
void note(Phase phase, std::uint64_t start, std::uint64_t amount);
}  // namespace internal

class Scope {
 public:
  explicit Scope(Phase phase, std::uint64_t amount = 0) { begin(phase, amount); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  ~Scope() { end(); }

  // Ends this span and begins another.
  void next(Phase phase, std::uint64_t amount = 0) {
    end();
    begin(phase, amount);
  }

 private:
  void begin(Phase phase, std::uint64_t amount) {
    start_ = internal::enabled.load(std::memory_order_relaxed) ? internal::now() : 0;
    phase_ = phase;
    amount_ = amount;
  }
  void end() const {
    if (start_ != 0) internal::note(phase_, start_, amount_);
  }

  std::uint64_t start_;  // 0: not noted
  std::uint64_t amount_;
  Phase phase_;
};

}  // namespace pysnap::trace
