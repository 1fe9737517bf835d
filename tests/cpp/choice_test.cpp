#include "choice.h"

#include <cstddef>

#include "check.h"

namespace {

using pysnap::Choice;
using pysnap::Element;

constexpr std::size_t kChunk = 4u << 20;

// A worker with these times for a chunk, encoded and raw.
struct Machine {
  double encoded;
  double raw;
};

struct Outcome {
  int encoded = 0;
  double seconds = 0;
};

Outcome write(Choice& choice, const Machine& machine, int chunks, Element element) {
  Outcome outcome;
  for (int i = 0; i < chunks; ++i) {
    const bool encoded = choice.encodes(element);
    const double seconds = encoded ? machine.encoded : machine.raw;
    choice.learn(element, encoded, kChunk, seconds);
    outcome.encoded += encoded;
    outcome.seconds += seconds;
  }
  return outcome;
}

constexpr Machine kFastDisk{0.005, 0.0013};
constexpr Machine kSlowDisk{0.014, 0.020};

}  // namespace

TEST(both_ways_are_tried_first) {
  Choice choice;
  CHECK_EQ(write(choice, kFastDisk, 4, Element::kF32).encoded, 2);
}

TEST(a_disk_that_is_faster_than_the_encoder_gets_raw_chunks) {
  Choice choice;
  write(choice, kFastDisk, 4, Element::kF32);
  const Outcome outcome = write(choice, kFastDisk, 2000, Element::kF32);
  CHECK(outcome.encoded > 0);
  CHECK(outcome.seconds < 1.02 * 2000 * kFastDisk.raw);
}

TEST(a_disk_that_is_slower_than_the_encoder_gets_encoded_chunks) {
  Choice choice;
  write(choice, kSlowDisk, 4, Element::kF32);
  const Outcome outcome = write(choice, kSlowDisk, 2000, Element::kF32);
  CHECK(outcome.encoded < 2000);
  CHECK(outcome.seconds < 1.02 * 2000 * kSlowDisk.encoded);
}

TEST(a_change_is_seen_soon) {
  Choice choice;
  write(choice, kFastDisk, 500, Element::kF32);
  CHECK(write(choice, kSlowDisk, 50, Element::kF32).encoded > 35);
  write(choice, kFastDisk, 100, Element::kF32);
  CHECK(write(choice, kFastDisk, 50, Element::kF32).encoded < 5);
}

TEST(a_trial_is_not_repeated_before_it_is_earned) {
  constexpr Machine kHopeless{1.3, 0.0013};
  Choice choice;
  write(choice, kHopeless, 4, Element::kF32);
  CHECK(write(choice, kHopeless, 10000, Element::kF32).encoded <= 1);
}

TEST(types_are_learnt_apart) {
  Choice choice;
  write(choice, kFastDisk, 100, Element::kF32);
  CHECK_EQ(write(choice, kSlowDisk, 4, Element::kF16).encoded, 2);
  CHECK(write(choice, kSlowDisk, 30, Element::kF16).encoded == 30);
  CHECK(write(choice, kFastDisk, 30, Element::kF32).encoded <= 1);
}
