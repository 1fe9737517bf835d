#include "choice.h"

#include <algorithm>

namespace pysnap {

namespace {

// Chunks of each worker that a trial takes, without the first, in which others still go the other
// way; a trial that goes very wrong ends sooner.
constexpr unsigned kTrial = 4;
constexpr double kVeryWrong = 1.5;
// Of each worker: a trial for its own sake, and one because this way became longer than the other
// was.
constexpr unsigned kLeastBetweenTrials = 64;
constexpr unsigned kLeastBeforeTurn = 4;
constexpr double kShareOfTrials = 0.02;
// A chunk counts so much against all before it: a disk that turns slow is seen after some.
constexpr double kWeight = 0.1;
// How much longer it may take to have smaller files.
constexpr double kTolerance = 1.02;

}  // namespace

bool Choice::encodes(Element element) const {
  return learnt_[static_cast<std::size_t>(element)].encodes;
}

void Choice::learn(Element element, bool encoded, std::size_t size, double seconds) {
  Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  // One that began before the way was changed.
  if (encoded != learnt.encodes) return;
  const double now = seconds / static_cast<double>(size);
  double& way = learnt.ways[learnt.encodes];
  const double other = learnt.ways[!learnt.encodes];
  if (learnt.trial && other > 0)
    learnt.spared -= std::max(0.0, now - other) * static_cast<double>(size);
  // Beside it, others still went the other way.
  if (++learnt.chunks <= workers_) return;
  const unsigned judged = learnt.chunks - workers_;
  if (learnt.trial) {
    learnt.sum += now;
    const double mean = learnt.sum / judged;
    const bool wrong = other > 0 && judged >= workers_ && mean > kVeryWrong * other;
    if (judged < kTrial * workers_ && !wrong) return;
    way = mean;
    if (other == 0) return turn(learnt, true);
    learnt.trial = false;
    if (prefers_encoded(learnt) != learnt.encodes) turn(learnt, false);
    return;
  }
  way += kWeight * (now - way);
  learnt.spared = std::min(learnt.spared + kShareOfTrials * seconds, seconds * kTrial);
  const bool is_longer = prefers_encoded(learnt) != learnt.encodes;
  const bool is_due = judged >= kLeastBetweenTrials * workers_ && learnt.spared > 0;
  if (is_due || (is_longer && judged >= kLeastBeforeTurn * workers_)) turn(learnt, true);
}

bool Choice::prefers_encoded(const Learnt& learnt) {
  return learnt.ways[true] <= kTolerance * learnt.ways[false];
}

void Choice::turn(Learnt& learnt, bool trial) {
  learnt.encodes = !learnt.encodes;
  learnt.trial = trial;
  learnt.chunks = 0;
  learnt.sum = 0;
}

}  // namespace pysnap
