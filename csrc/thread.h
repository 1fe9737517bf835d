// thread.h: how pysnap starts a thread.
#pragma once

#include <functional>
#include <thread>

namespace pysnap {

// A thread with every signal blocked (they belong to the trainer's threads), named for debuggers,
// at `nice` (0 = unchanged; a system that refuses leaves it unchanged). Throws Error(kIo) where the
// system starts no more threads. `body` must not throw.
std::thread start_thread(const char* name, std::function<void()> body, int nice = 0);

// The processors that this process may run on, at least 1.
unsigned available_processors();

}  // namespace pysnap
