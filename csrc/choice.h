// choice.h: whether a chunk is encoded before it is written, where it should be written soon.
#pragma once

#include <array>
#include <cstddef>

#include "codec.h"

namespace pysnap {

// Learns how long a worker takes for a byte, encoded and raw, and chooses the shorter: raw on a
// disk that is faster than the encoder, encoded on one that is slower. Chunks of one element type
// are alike, so each type is learnt by itself. The way not chosen is tried again now and then, so
// seldom that it costs a hundredth of the time. Not thread safe.
class Choice {
 public:
  // For the next chunk of this type.
  bool encodes(Element element);
  // How long a chunk of `size` raw bytes took, from its digest until it was written.
  void learn(Element element, bool encoded, std::size_t size, double seconds);

  struct Way {
    unsigned tried = 0;
    double seconds_per_byte = 0;
  };

 private:
  struct Learnt {
    Way raw, encoded;
    unsigned since_trial = 0;  // chunks
    double spared = 0;         // seconds that a trial may cost; below zero: the last cost too much
  };

  std::array<Learnt, kElementCount> learnt_;
};

}  // namespace pysnap
