#include "choice.h"

#include <algorithm>
#include <utility>

namespace pysnap {

namespace {

// Chunks of each worker that a trial takes, without the first, in which others still go the other
// way; a trial that goes very wrong ends sooner.
constexpr unsigned kTrial = 4;
constexpr double kVeryWrong = 1.5;
// Of each worker: a trial for its own sake, and one because this way became longer than the other
// was.
constexpr unsigned kLeastBetweenTrials = 128;
constexpr unsigned kLeastBeforeTurn = 4;
constexpr double kShareOfTrials = 0.02;
// A chunk counts so much against all before it: a disk that turns slow is seen after some.
constexpr double kWeight = 0.1;
// An encoded chunk that takes less than this share of what it took when that way was chosen.
constexpr double kMuchSooner = 0.5;
// Encoding alone may take so much of a raw chunk's time. Encoders take time of the cores, do not
// write while the step copies, and make reading longer: on a disk that is not much slower than they
// are, all that buys a little.
constexpr double kQuick = 1.0 / 20;
// How much longer it may take to have smaller files.
constexpr double kTolerance = 1.02;

}  // namespace

bool Choice::encodes(Element element) {
  Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  if (learnt.stage == Stage::kProbe) return !std::exchange(learnt.probe_taken, true);
  return learnt.encodes;
}

bool Choice::is_raw(Element element) const {
  const Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  return learnt.stage == Stage::kSettled && !learnt.encodes;
}

void Choice::learn_raw(Element element, std::size_t size, double seconds, unsigned threads) {
  // What it takes if as many threads as workers share the disk.
  learn(element, false, size, 0, seconds * workers_ / threads);
}

void Choice::learn_encoded(Element element, std::size_t size, double seconds, double encoding) {
  learn(element, true, size, encoding, seconds);
}

void Choice::learn(Element element, bool encoded, std::size_t size, double encoding,
                   double seconds) {
  Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  if (learnt.stage == Stage::kProbe) return learn_probe(learnt, encoded, encoding, seconds, size);
  // One that began before the way was changed.
  if (encoded != learnt.encodes) return;
  const double now = seconds / static_cast<double>(size);
  if (encoded)
    learnt.encoding += kWeight * (encoding / static_cast<double>(size) - learnt.encoding);
  const double other = learnt.ways[!learnt.encodes];
  const bool is_trial = learnt.stage == Stage::kTrial;
  if (is_trial) learnt.spared -= std::max(0.0, now - other) * static_cast<double>(size);
  // Beside it, others still went the other way.
  if (++learnt.chunks <= workers_) return;
  if (is_trial) return learn_trial(learnt, now);
  double& way = learnt.ways[learnt.encodes];
  way += kWeight * (now - way);
  learnt.spared = std::min(learnt.spared + kShareOfTrials * seconds, seconds * kTrial);
  const unsigned judged = learnt.chunks - workers_;
  const bool is_longer = prefers_encoded(learnt) != learnt.encodes;
  // That the disk is not slow any more shows in the encoded way, too.
  const bool is_quick_now = learnt.encodes && way < kMuchSooner * learnt.chosen;
  const bool is_due = judged >= kLeastBetweenTrials * workers_ && learnt.spared > 0;
  if (is_due || ((is_longer || is_quick_now) && judged >= kLeastBeforeTurn * workers_))
    try_other(learnt);
}

void Choice::learn_probe(Learnt& learnt, bool encoded, double encoding, double seconds,
                         std::size_t size) {
  const double bytes = static_cast<double>(size);
  const double raw = learnt.ways[false];
  if (!encoded) {
    // The probe of a snapshot that failed never comes.
    if (++learnt.chunks >= kLeastBetweenTrials * workers_) go(learnt, false, Stage::kProbe);
    return;
  }
  if (raw > 0) learnt.spared -= std::max(0.0, seconds - raw * bytes);
  learnt.encoding = learnt.ways[true] = encoding / bytes;
  learnt.is_least = true;
  if (raw == 0) return go(learnt, false, Stage::kTrial);
  follow(learnt);
}

void Choice::learn_trial(Learnt& learnt, double now) {
  double& way = learnt.ways[learnt.encodes];
  const double other = learnt.ways[!learnt.encodes];
  const unsigned judged = learnt.chunks - workers_;
  learnt.sum += now;
  const double mean = learnt.sum / judged;
  // Of what is not known at all, a little is enough.
  const bool is_over = judged >= (way > 0 ? kTrial : 1) * workers_;
  const bool is_wrong = judged >= workers_ && mean > kVeryWrong * other;
  if (!is_over && !is_wrong) return;
  way = mean;
  if (learnt.encodes) learnt.is_least = false;
  follow(learnt);
}

// Goes the better way; to encode, where a probe alone says so, as a trial.
void Choice::follow(Learnt& learnt) {
  const bool encodes = prefers_encoded(learnt);
  const Stage stage = encodes && learnt.is_least ? Stage::kTrial : Stage::kSettled;
  learnt.chosen = learnt.ways[true];
  if (encodes != learnt.encodes) go(learnt, encodes, stage);
  learnt.stage = stage;
}

bool Choice::prefers_encoded(const Learnt& learnt) {
  const double raw = learnt.ways[false];
  return learnt.encoding <= kQuick * raw && learnt.ways[true] <= kTolerance * raw;
}

void Choice::try_other(Learnt& learnt) {
  go(learnt, false, learnt.encodes ? Stage::kTrial : Stage::kProbe);
}

void Choice::go(Learnt& learnt, bool encodes, Stage stage) {
  learnt.encodes = encodes;
  learnt.stage = stage;
  learnt.probe_taken = false;
  learnt.chunks = 0;
  learnt.sum = 0;
}

}  // namespace pysnap
