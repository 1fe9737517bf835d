#include "choice.h"

namespace pysnap {

namespace {

constexpr unsigned kFirstTrials = 2;
constexpr unsigned kLeastBetweenTrials = 32;
constexpr double kShareOfTrials = 0.01;
// A chunk counts so much against all before it: a disk that turns slow is seen after a few.
constexpr double kWeight = 0.25;

bool is_shorter(const Choice::Way& a, const Choice::Way& b) {
  return a.seconds_per_byte < b.seconds_per_byte;
}

}  // namespace

bool Choice::encodes(Element element) {
  Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  for (Way* way : {&learnt.raw, &learnt.encoded}) {
    if (way->tried < kFirstTrials) {
      ++way->tried;
      return way == &learnt.encoded;
    }
  }
  const bool shorter = is_shorter(learnt.encoded, learnt.raw);
  if (learnt.since_trial < kLeastBetweenTrials || learnt.spared < 0) {
    ++learnt.since_trial;
    return shorter;
  }
  learnt.since_trial = 0;
  return !shorter;
}

void Choice::learn(Element element, bool encoded, std::size_t size, double seconds) {
  Learnt& learnt = learnt_[static_cast<std::size_t>(element)];
  Way& way = encoded ? learnt.encoded : learnt.raw;
  const Way& other = encoded ? learnt.raw : learnt.encoded;
  const bool trial = encoded != is_shorter(learnt.encoded, learnt.raw);
  const double now = seconds / static_cast<double>(size);
  // What a trial finds replaces what was known: that may be long ago.
  const double weight = trial || way.seconds_per_byte == 0 ? 1 : kWeight;
  way.seconds_per_byte += weight * (now - way.seconds_per_byte);
  if (trial) {
    learnt.spared = other.seconds_per_byte * static_cast<double>(size) - seconds;
  } else {
    learnt.spared += kShareOfTrials * seconds;
  }
}

}  // namespace pysnap
