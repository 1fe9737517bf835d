// thread.h: how pysnap starts a thread.
#pragma once

#include <csignal>
#include <functional>
#include <thread>

namespace pysnap {

// A thread with every signal blocked but those that its own instructions raise (the others belong
// to the trainer's threads), named for debuggers, at `nice` (0 = unchanged; a system that refuses
// leaves it unchanged). Throws Error(kIo) where the system starts no more threads. `body` must not
// throw.
std::thread start_thread(const char* name, std::function<void()> body, int nice = 0);

// While it lives, the calling thread gets SIGBUS, as whoever reads a Mapping must.
class UnblockedSigbus {
 public:
  UnblockedSigbus();
  UnblockedSigbus(const UnblockedSigbus&) = delete;
  UnblockedSigbus& operator=(const UnblockedSigbus&) = delete;
  ~UnblockedSigbus();

 private:
  sigset_t previous_;
};

// The processors that this process may run on, at least 1.
unsigned available_processors();

}  // namespace pysnap
