#include "mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "fixture.h"
#include "thread.h"

namespace {

using fixture::Bytes;
using fixture::TemporaryDirectory;
using pysnap::File;
using pysnap::kPageSize;
using pysnap::Mapping;

constexpr std::size_t kPages = 8;

class Sample {
 public:
  Sample() { fixture::write_file(path, bytes); }
  std::unique_ptr<Mapping> map() const {
    return Mapping::create(File::open(path), kPages * kPageSize);
  }
  void cut_to(std::size_t pages) const {
    CHECK_EQ(::truncate(path.c_str(), static_cast<off_t>(pages * kPageSize)), 0);
  }

 private:
  TemporaryDirectory directory_;

 public:
  const Bytes bytes = fixture::random_bytes(kPages * kPageSize, 1);
  const std::string path = directory_ / "file";
};

Bytes page(const Mapping& mapping, std::size_t index) {
  const std::uint8_t* start = mapping.data() + index * kPageSize;
  return Bytes(start, start + kPageSize);
}

bool has_default_handler() {
  struct sigaction now{};
  ::sigaction(SIGBUS, nullptr, &now);
  return (now.sa_flags & SA_SIGINFO) == 0 && now.sa_handler == SIG_DFL;
}

// What the handler of somebody else saw, and where it let the instruction go on.
volatile std::sig_atomic_t foreign_faults = 0;
void* volatile foreign_page = nullptr;

void foreign_handler(int, siginfo_t*, void*) {
  foreign_faults = foreign_faults + 1;
  ::mmap(foreign_page, kPageSize, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

// A page of a file that is not there, mapped by somebody else.
class ForeignFault {
 public:
  ForeignFault() {
    sample_.cut_to(0);
    const File file = File::open(sample_.path);
    foreign_page = file.map(kPageSize);
  }
  ~ForeignFault() { ::munmap(foreign_page, kPageSize); }
  void touch() const { CHECK_EQ(*static_cast<volatile std::uint8_t*>(foreign_page), 0); }

 private:
  Sample sample_;
};

}  // namespace

TEST(a_mapping_shows_the_file) {
  const Sample sample;
  const std::unique_ptr<Mapping> mapping = sample.map();
  CHECK(std::equal(sample.bytes.begin(), sample.bytes.end(), mapping->data()));
  CHECK(mapping->is_cached(kPageSize, 2 * kPageSize));
  CHECK(!mapping->lost());
}

TEST(pages_that_are_released_can_be_read_again) {
  const Sample sample;
  const std::unique_ptr<Mapping> mapping = sample.map();
  const Bytes before = page(*mapping, 3);
  mapping->release();
  CHECK(page(*mapping, 3) == before);
}

TEST(a_file_that_is_cut_short_reads_as_zeros_and_is_lost) {
  const Sample sample;
  const std::unique_ptr<Mapping> mapping = sample.map();
  sample.cut_to(4);
  CHECK(page(*mapping, 3) ==
        Bytes(sample.bytes.begin() + 3 * kPageSize, sample.bytes.begin() + 4 * kPageSize));
  CHECK(!mapping->lost());
  CHECK(page(*mapping, 4) == Bytes(kPageSize));
  CHECK(mapping->lost());
}

TEST(one_lost_mapping_is_not_another) {
  const Sample sound, cut;
  const std::unique_ptr<Mapping> whole = sound.map();
  const std::unique_ptr<Mapping> lost = cut.map();
  cut.cut_to(0);
  page(*lost, 0);
  CHECK(lost->lost());
  CHECK(!whole->lost());
}

TEST(threads_of_pysnap_survive_a_lost_page) {
  const Sample sample;
  const std::unique_ptr<Mapping> mapping = sample.map();
  sample.cut_to(0);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kPages; ++i) {
    threads.push_back(pysnap::start_thread(
        "reader", [&mapping, i] { CHECK(page(*mapping, i) == Bytes(kPageSize)); }));
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(mapping->lost());
}

TEST(a_caller_that_blocks_sigbus_survives_a_lost_page) {
  sigset_t sigbus, before, after;
  sigemptyset(&sigbus);
  sigaddset(&sigbus, SIGBUS);
  CHECK_EQ(pthread_sigmask(SIG_BLOCK, &sigbus, &before), 0);
  const Sample sample;
  const std::unique_ptr<Mapping> mapping = sample.map();
  sample.cut_to(0);
  {
    const pysnap::UnblockedSigbus unblocked;
    CHECK(page(*mapping, 0) == Bytes(kPageSize));
  }
  CHECK_EQ(pthread_sigmask(SIG_SETMASK, &before, &after), 0);
  CHECK(sigismember(&after, SIGBUS) == 1);
}

TEST(faults_elsewhere_go_to_the_handler_that_was_there) {
  struct sigaction foreign{}, before{};
  foreign.sa_sigaction = foreign_handler;
  foreign.sa_flags = SA_SIGINFO;
  CHECK_EQ(::sigaction(SIGBUS, &foreign, &before), 0);
  foreign_faults = 0;
  {
    const Sample sample;
    const std::unique_ptr<Mapping> mapping = sample.map();
    ForeignFault().touch();
    CHECK_EQ(static_cast<int>(foreign_faults), 1);
    CHECK(!mapping->lost());
  }
  ForeignFault().touch();
  CHECK_EQ(static_cast<int>(foreign_faults), 2);
  CHECK_EQ(::sigaction(SIGBUS, &before, nullptr), 0);
}

TEST(the_handler_goes_with_the_last_mapping) {
  if (!has_default_handler()) return;  // a sanitizer has its own
  const Sample sample;
  std::unique_ptr<Mapping> first = sample.map();
  std::unique_ptr<Mapping> second = sample.map();
  first.reset();
  CHECK(!has_default_handler());
  second.reset();
  CHECK(has_default_handler());
}

TEST(too_many_mappings_and_empty_files_are_not_mapped) {
  const Sample sample;
  std::vector<std::unique_ptr<Mapping>> mappings;
  while (mappings.size() < 1000 && (mappings.empty() || mappings.back() != nullptr))
    mappings.push_back(sample.map());
  CHECK(mappings.size() > 16);
  CHECK(mappings.back() == nullptr);
  mappings.clear();
  CHECK(sample.map() != nullptr);
  CHECK(Mapping::create(File::open(sample.path), 0) == nullptr);
}
