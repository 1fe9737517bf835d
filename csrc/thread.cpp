#include "thread.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <system_error>
#include <utility>

#include "error.h"

namespace pysnap {

namespace {

// Blocks the signals that the calling thread does not raise itself, while it lives; a thread that
// is started meanwhile inherits that for good.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    // Blocked, these end the process without asking a handler.
    for (int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&all, own);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }

 private:
  sigset_t previous_;
};

}  // namespace

std::thread start_thread(const char* name, std::function<void()> body, int nice) {
  const BlockedSignals blocked;
  try {
    return std::thread([name, nice, body = std::move(body)] {
      pthread_setname_np(pthread_self(), name);
      if (nice != 0) ::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), nice);
      body();
    });
  } catch (const std::system_error& failure) {
    throw Error::io("starting thread", name, failure.code().value());
  }
}

UnblockedSigbus::UnblockedSigbus() {
  sigset_t sigbus;
  sigemptyset(&sigbus);
  sigaddset(&sigbus, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &sigbus, &previous_);
}

UnblockedSigbus::~UnblockedSigbus() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }

unsigned available_processors() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) != 0)
    return std::max(1u, std::thread::hardware_concurrency());
  return static_cast<unsigned>(std::max(1, CPU_COUNT(&set)));
}

}  // namespace pysnap
