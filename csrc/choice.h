// choice.h: whether a chunk is encoded before it is written.
#pragma once

#include <array>
#include <cstddef>

#include "codec.h"

namespace pysnap {

// Learns how long a worker takes for a byte when all workers encode, and when all write raw, and
// goes the shorter way: raw unless the disk is much slower than encoders on the cores that training
// leaves, else encoded, also where both take as long, for the files are smaller.
//
// Whether encoding alone takes a small part of what all of a raw chunk does, one chunk shows: the
// probe. Where it does, all go the other way for some chunks before it is judged, as they share the
// disk and the cores: a worker alone that encodes would pay for it, and the others have what it
// spares of the disk. Chunks of one element type are alike, so each type is learnt by itself. The
// other way is tried again now and then, so seldom that it costs a fiftieth of the time. Not thread
// safe.
class Choice {
 public:
  explicit Choice(unsigned workers) : workers_(workers) {}

  // For the next chunk of this type, which is taken now.
  bool encodes(Element element);
  // Whether encodes() would say no, now and for some chunks to come.
  bool is_raw(Element element) const;
  // Of a chunk of `size` raw bytes: the seconds until it was written, without its digest. Raw, it
  // shared the disk with those of `threads` - 1 others, which may be more than the workers.
  void learn_raw(Element element, std::size_t size, double seconds, unsigned threads);
  // By a worker; `encoding` is the part of the seconds that went before the write.
  void learn_encoded(Element element, std::size_t size, double seconds, double encoding);

 private:
  enum class Stage { kSettled, kTrial, kProbe };
  struct Learnt {
    // Seconds per byte, raw and encoded; 0 is not known yet.
    std::array<double, 2> ways{};
    double encoding = 0;   // the part of the encoded way that is not writing
    double chosen = 0;     // what the encoded way took when it was chosen
    bool is_least = true;  // the encoded way takes so long at least: a probe showed it
    bool encodes = false;  // the way that is gone now
    Stage stage = Stage::kProbe;
    bool probe_taken = false;
    unsigned chunks = 0;  // that went this way since it is gone, or since the probe
    double sum = 0;       // of their seconds per byte in a trial
    double spared = 0;    // seconds that a trial may cost; below zero: the last took more
  };
  void learn(Element element, bool encoded, std::size_t size, double encoding, double seconds);
  void learn_probe(Learnt& learnt, bool encoded, double encoding, double seconds, std::size_t size);
  void learn_trial(Learnt& learnt, double now);
  static void follow(Learnt& learnt);
  static bool prefers_encoded(const Learnt& learnt);
  static void try_other(Learnt& learnt);
  static void go(Learnt& learnt, bool encodes, Stage stage);

  const unsigned workers_;
  std::array<Learnt, kElementCount> learnt_;
};

}  // namespace pysnap
