#include "choice.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "check.h"
#include "fixture.h"

namespace {

using pysnap::Choice;
using pysnap::Element;

constexpr std::size_t kChunkSize = 4 << 20;
constexpr double kChunk = kChunkSize;

// What workers share. Rates are bytes a second.
struct Machine {
  double disk;           // of all writes together
  double write;          // of one write at most
  double cores;          // that training leaves to the workers
  double encoder;        // on a whole core
  double stored = 0.83;  // of an encoded byte
  double digest = 15e9;  // on a whole core
};

struct Outcome {
  int encoded = 0;
  double seconds = 0;
};

enum class Codec { kAuto, kNone, kFast };

// Workers that take `chunks` from a full queue, in small steps of time. Writes differ by a fifth,
// or the workers would keep step, all encode at once and leave the disk idle.
Outcome write(Choice& choice, unsigned workers, const Machine& machine, int chunks,
              Element element = Element::kF32, Codec codec = Codec::kAuto) {
  struct Worker {
    bool busy = false;
    bool encoded;
    double computing;  // seconds of a core that are left
    double writing;    // bytes that are left
    double start;
    double encoded_at;
  };
  constexpr double kStep = 10e-6;
  std::vector<Worker> all(workers);
  fixture::Random random(1);
  Outcome outcome;
  int begun = 0, done = 0;
  for (double now = 0; done < chunks; now += kStep) {
    double computing = 0, writing = 0;
    for (Worker& worker : all) {
      if (!worker.busy && begun < chunks) {
        ++begun;
        worker.busy = true;
        worker.encoded = codec == Codec::kAuto ? choice.encodes(element) : codec == Codec::kFast;
        worker.computing =
            kChunk / machine.digest + (worker.encoded ? kChunk / machine.encoder : 0);
        worker.writing = kChunk * (worker.encoded ? machine.stored : 1) *
                         (0.8 + 0.4 * static_cast<double>(random.next() >> 40) / (1 << 24));
        worker.start = now;
      }
      if (worker.busy) (worker.computing > 0 ? computing : writing) += 1;
    }
    for (Worker& worker : all) {
      if (!worker.busy) continue;
      if (worker.computing > 0) {
        worker.computing -= kStep * std::min(1.0, machine.cores / computing);
        worker.encoded_at = now;
      } else {
        worker.writing -= kStep * std::min(machine.write, machine.disk / writing);
      }
      if (worker.computing > 0 || worker.writing > 0) continue;
      worker.busy = false;
      ++done;
      outcome.encoded += worker.encoded;
      const double seconds = now - worker.start;
      // The digest is not counted as encoding.
      const double encoding =
          (worker.encoded_at - worker.start) * machine.digest / (machine.digest + machine.encoder);
      if (worker.encoded)
        choice.learn_encoded(element, kChunkSize, seconds, encoding);
      else
        choice.learn_raw(element, kChunkSize, seconds, workers);
    }
    outcome.seconds = now;
  }
  return outcome;
}

double seconds_with(Codec codec, unsigned workers, const Machine& machine, int chunks) {
  Choice none(workers);
  return write(none, workers, machine, chunks, Element::kF32, codec).seconds;
}

constexpr Machine kSlowDisk{0.3e9, 0.3e9, 2, 8e9};
constexpr Machine kUsualDisk{2.4e9, 1.8e9, 2, 8e9};
constexpr Machine kFastDisk{12e9, 6e9, 2, 3e9};
constexpr Machine kFastEncoder{4e9, 2e9, 2, 9e9};
// Training has the cores; a slow encoder on a slow disk.
constexpr Machine kBusyCores{2.4e9, 1.8e9, 0.05, 8e9};
constexpr Machine kSlowBoth{0.3e9, 0.2e9, 2, 0.2e9};
// Zeros, or nearly so.
constexpr Machine kSparse{0.3e9, 0.3e9, 2, 8e9, 0.05};
constexpr Machine kMachines[] = {kSlowDisk, kFastDisk, kBusyCores, kSlowBoth, kSparse};
// Encoders of such speed would make it a little sooner.
constexpr Machine kBetween[] = {kUsualDisk, kFastEncoder};

}  // namespace

TEST(a_snapshot_is_durable_nearly_as_soon_as_with_the_better_way) {
  for (const unsigned workers : {1U, 2U, 3U, 4U}) {
    for (const Machine& machine : kMachines) {
      Choice choice(workers);
      write(choice, workers, machine, 1500);
      const double learnt = write(choice, workers, machine, 2400).seconds;
      const double better = std::min(seconds_with(Codec::kNone, workers, machine, 2400),
                                     seconds_with(Codec::kFast, workers, machine, 2400));
      CHECK(learnt < 1.05 * better);
    }
  }
}

TEST(on_a_disk_that_is_not_much_slower_than_the_encoders_chunks_are_raw) {
  for (const Machine& machine : kBetween) {
    Choice choice(3);
    const Outcome outcome = write(choice, 3, machine, 2400);
    CHECK(outcome.encoded > 0 && outcome.encoded < 24);
    CHECK(outcome.seconds < 1.02 * seconds_with(Codec::kNone, 3, machine, 2400));
  }
}

TEST(the_first_snapshot_is_not_much_later) {
  for (const Machine& machine : kMachines) {
    Choice choice(3);
    const double first = write(choice, 3, machine, 375).seconds;
    CHECK(first < 1.6 * std::min(seconds_with(Codec::kNone, 3, machine, 375),
                                 seconds_with(Codec::kFast, 3, machine, 375)));
  }
}

TEST(a_disk_that_is_much_slower_than_the_encoders_gets_encoded_chunks) {
  for (const double disk : {0.1e9, 0.5e9, 0.9e9}) {
    const Machine machine{disk, disk, 2, 8e9};
    Choice choice(3);
    write(choice, 3, machine, 300);
    CHECK(write(choice, 3, machine, 600).encoded > 500);
  }
}

// Here a chunk alone takes longer when it is encoded; together they do not, for the disk has less.
TEST(what_an_encoder_spares_the_others_counts) {
  constexpr Machine kShared{0.9e9, 0.9e9, 2, 7e9, 0.96};
  Choice choice(3);
  write(choice, 3, kShared, 300);
  CHECK(write(choice, 3, kShared, 600).encoded > 500);
}

TEST(a_disk_that_is_faster_than_the_encoders_gets_raw_chunks) {
  for (const Machine& machine : {kFastDisk, kBusyCores, kSlowBoth}) {
    Choice choice(3);
    write(choice, 3, machine, 300);
    CHECK(write(choice, 3, machine, 600).encoded < 10);
  }
}

TEST(the_other_way_is_tried_again) {
  for (const Machine& machine : {kFastDisk, kSlowDisk}) {
    Choice choice(3);
    write(choice, 3, machine, 300);
    const int encoded = write(choice, 3, machine, 3000).encoded;
    CHECK(encoded > 0);
    CHECK(encoded < 3000);
  }
}

TEST(a_change_is_seen_soon) {
  Choice choice(3);
  write(choice, 3, kSlowDisk, 500);
  CHECK(write(choice, 3, kBusyCores, 150).encoded < 60);
  CHECK(write(choice, 3, kBusyCores, 300).encoded < 40);
  write(choice, 3, kSlowDisk, 1000);
  CHECK(write(choice, 3, kSlowDisk, 300).encoded > 200);
}

TEST(a_disk_that_is_slow_for_a_moment_does_not_get_encoded_chunks_for_long) {
  Choice choice(3);
  write(choice, 3, kUsualDisk, 300);
  write(choice, 3, kSlowDisk, 300);
  write(choice, 3, kUsualDisk, 600);
  CHECK(write(choice, 3, kUsualDisk, 600).encoded < 10);
}

TEST(chunks_that_get_much_smaller_are_hardly_ever_written_raw) {
  Choice choice(3);
  write(choice, 3, kSparse, 300);
  CHECK(write(choice, 3, kSparse, 3000).encoded > 2800);
}

TEST(a_trial_that_goes_very_wrong_ends_at_once) {
  constexpr Machine kHopeless{2.4e9, 1.8e9, 2, 0.02e9};
  Choice choice(2);
  write(choice, 2, kHopeless, 200);
  CHECK(write(choice, 2, kHopeless, 4000).encoded <= 2);
}

TEST(chunks_of_which_nothing_is_saved_are_written_raw) {
  Machine machine = kFastDisk;
  machine.stored = 1;
  Choice choice(3);
  write(choice, 3, machine, 300);
  CHECK(write(choice, 3, machine, 600).encoded < 60);
}

// A probe shows it: these are not tried by all workers.
TEST(encoders_that_are_slower_than_writing_raw_cost_a_chunk_now_and_then) {
  for (const int workers : {1, 2}) {
    Choice choice(static_cast<unsigned>(workers));
    for (int chunks : {375, 375, 4000}) {
      const int encoded = write(choice, static_cast<unsigned>(workers), kFastDisk, chunks).encoded;
      CHECK(encoded > 0);
      CHECK(encoded <= 2 + chunks / (128 * workers));
    }
  }
}

// Four writes that share a disk take four times as long each, and the disk is no slower for it.
TEST(it_does_not_matter_how_many_threads_write_raw) {
  for (const unsigned threads : {1U, 2U, 4U}) {
    for (const double encoding : {0.04, 0.06}) {
      Choice choice(2);
      int encoded = 0;
      for (int chunk = 0; chunk < 100; ++chunk) {
        if (choice.encodes(Element::kF32)) {
          ++encoded;
          choice.learn_encoded(Element::kF32, kChunkSize, 0.9, encoding);
        } else {
          choice.learn_raw(Element::kF32, kChunkSize, 0.5 * threads, threads);
        }
      }
      // A twentieth of what raw takes is the bound.
      CHECK(encoding < 0.05 ? encoded > 80 : encoded < 5);
    }
  }
}

TEST(a_probe_that_never_comes_back_is_sent_again) {
  Choice choice(1);
  CHECK(choice.encodes(Element::kF32));
  int until = 0;
  while (!choice.encodes(Element::kF32) && until < 1000) {
    ++until;
    choice.learn_raw(Element::kF32, 4096, 1, 1);
  }
  CHECK_EQ(until, 128);
}

TEST(the_first_chunk_of_a_type_is_encoded) {
  Choice choice(3);
  CHECK(choice.encodes(Element::kF32));
  CHECK(!choice.encodes(Element::kF32));
  CHECK(choice.encodes(Element::kF16));
}

TEST(types_are_learnt_apart) {
  Choice choice(3);
  write(choice, 3, kFastDisk, 300);
  CHECK(!choice.encodes(Element::kF32));
  write(choice, 3, kSlowDisk, 300, Element::kF16);
  CHECK(choice.encodes(Element::kF16));
  CHECK(!choice.encodes(Element::kF32));
}
