#include "file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "fixture.h"

namespace {

using fixture::Bytes;
using fixture::errno_of;
using fixture::TemporaryDirectory;
using fixture::thrown_by;
using pysnap::Buffer;
using pysnap::File;
using pysnap::kPageSize;
using pysnap::make_buffer;
using pysnap::round_up;

// No file of this process may grow past `bytes` while this lives.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) throw std::runtime_error("setrlimit failed");
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

Buffer page_aligned(const Bytes& bytes) {
  Buffer buffer = make_buffer(bytes.size());
  std::copy(bytes.begin(), bytes.end(), buffer.get());
  return buffer;
}

}  // namespace

TEST(round_up_reaches_the_next_multiple) {
  CHECK_EQ(round_up(0, 4096), 0);
  CHECK_EQ(round_up(1, 4096), 4096);
  CHECK_EQ(round_up(4096, 4096), 4096);
  CHECK_EQ(round_up(4097, 4096), 8192);
}

TEST(create_makes_a_private_empty_file) {
  const TemporaryDirectory directory;
  for (const bool direct : {false, true}) {
    const std::string path = directory / (direct ? "direct" : "buffered");
    CHECK_EQ(File::create(path, direct).size(), 0);
    struct stat status;
    CHECK_EQ(::stat(path.c_str(), &status), 0);
    CHECK_EQ(status.st_mode & 0777, 0600);
  }
}

TEST(create_refuses_what_exists) {
  const TemporaryDirectory directory;
  fixture::write_file(directory / "file", {1, 2, 3});
  std::filesystem::create_symlink(directory / "nowhere", directory / "link");
  std::filesystem::create_directory(directory / "directory");
  for (const bool direct : {false, true}) {
    for (const char* name : {"file", "link", "directory"}) {
      CHECK_EQ(errno_of([&] { File::create(directory / name, direct); }), EEXIST);
    }
  }
  CHECK(fixture::read_file(directory / "file") == Bytes({1, 2, 3}));
  CHECK(!std::filesystem::exists(directory / "nowhere"));
}

TEST(an_error_names_the_path_and_the_reason) {
  const TemporaryDirectory directory;
  const std::string path = directory / "missing/file";
  try {
    File::create(path, false);
    CHECK(false);
  } catch (const pysnap::Error& error) {
    CHECK_EQ(error.path(), path);
    CHECK_EQ(error.error_number(), ENOENT);
    CHECK_EQ(error.what(), "creating " + path + " failed: No such file or directory");
  }
}

TEST(direct_and_buffered_files_hold_the_same_bytes) {
  const TemporaryDirectory directory;
  const Bytes bytes = fixture::random_bytes(5 * kPageSize, 1);
  const Buffer buffer = page_aligned(bytes);
  for (const bool direct : {false, true}) {
    const std::string path = directory / (direct ? "direct" : "buffered");
    File file = File::create(path, direct);
    file.write_at(buffer.get() + 2 * kPageSize, 3 * kPageSize, 2 * kPageSize);
    file.write_at(buffer.get(), 2 * kPageSize, 0);
    file.sync();
    file.close();
    CHECK(fixture::read_file(path) == bytes);
  }
}

// The second thread to meet EINVAL finds direct I/O off already; that is no error.
TEST(what_direct_io_refuses_goes_through_the_page_cache) {
  const TemporaryDirectory directory;
  constexpr std::size_t kPart = 1000;
  const Bytes bytes = fixture::random_bytes(4 * kPart, 1);
  for (int round = 0; round < 50; ++round) {
    const std::string path = directory / std::to_string(round);
    File file = File::create(path, true);
    std::vector<std::thread> threads;
    for (std::size_t part = 0; part < 4; ++part) {
      threads.emplace_back([&, part] {
        const std::size_t offset = part * kPart;
        CHECK_EQ(thrown_by([&] { file.write_at(bytes.data() + offset, kPart, offset); }),
                 "nothing");
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(fixture::read_file(path) == bytes);
  }
}

TEST(reserve_sets_the_length_and_truncate_cuts_it) {
  const TemporaryDirectory directory;
  File file = File::create(directory / "file", true);
  file.reserve(0);
  CHECK_EQ(file.size(), 0);
  file.reserve(10 * kPageSize);
  CHECK_EQ(file.size(), 10 * kPageSize);
  const Buffer buffer = page_aligned(Bytes(kPageSize, 7));
  file.write_at(buffer.get(), kPageSize, 0);
  file.truncate(kPageSize);
  CHECK_EQ(file.size(), kPageSize);
  CHECK(fixture::read_file(directory / "file") == Bytes(kPageSize, 7));
}

TEST(reserve_fails_where_there_is_no_room) {
  const TemporaryDirectory directory;
  File file = File::create(directory / "file", false);
  const FileSizeLimit limit(4 * kPageSize);
  CHECK_EQ(errno_of([&] { file.reserve(5 * kPageSize); }), EFBIG);
  CHECK_EQ(thrown_by([&] { file.reserve(4 * kPageSize); }), "nothing");
}

TEST(reserve_refuses_a_length_that_no_file_has) {
  const TemporaryDirectory directory;
  File file = File::create(directory / "file", false);
  CHECK_EQ(thrown_by([&] { file.reserve(std::uint64_t{1} << 63); }), "io");
}

TEST(a_write_that_stops_half_way_is_an_error) {
  const TemporaryDirectory directory;
  File file = File::create(directory / "file", false);
  const Bytes bytes(4 * kPageSize, 1);
  {
    const FileSizeLimit limit(3 * kPageSize);
    CHECK_EQ(errno_of([&] { file.write_at(bytes.data(), bytes.size(), kPageSize); }), EFBIG);
    CHECK_EQ(file.size(), 3 * kPageSize);
  }
  CHECK_EQ(thrown_by([&] { file.write_at(bytes.data(), bytes.size(), kPageSize); }), "nothing");
  CHECK_EQ(file.size(), 5 * kPageSize);
}

TEST(a_whole_file_is_new_and_private) {
  const TemporaryDirectory directory;
  const std::string path = directory / "file";
  const Bytes bytes = fixture::random_bytes(kPageSize + 1, 1);
  const mode_t before = ::umask(0777);
  File::write_whole(path, bytes.data(), bytes.size());
  ::umask(before);
  struct stat status;
  CHECK_EQ(::stat(path.c_str(), &status), 0);
  CHECK_EQ(status.st_mode & 0777, 0600);
  CHECK(fixture::read_file(path) == bytes);
  std::filesystem::create_symlink(directory / "nowhere", directory / "link");
  for (const char* name : {"file", "link"}) {
    CHECK_EQ(errno_of([&] { File::write_whole(directory / name, bytes.data(), 1); }), EEXIST);
  }
  CHECK(fixture::read_file(path) == bytes);
  const FileSizeLimit limit(kPageSize);
  CHECK_EQ(errno_of([&] { File::write_whole(directory / "cut", bytes.data(), bytes.size()); }),
           EFBIG);
}

TEST(the_names_of_a_directory_are_synced_also_behind_a_link) {
  const TemporaryDirectory directory;
  fixture::write_file(directory / "file", {1});
  std::filesystem::create_directory(directory / "names");
  std::filesystem::create_symlink(directory / "names", directory / "link");
  for (const char* name : {"names", "link"}) {
    CHECK_EQ(thrown_by([&] { File::sync_directory(directory / name); }), "nothing");
  }
  CHECK_EQ(errno_of([&] { File::sync_directory(directory / "file"); }), ENOTDIR);
  CHECK_EQ(errno_of([&] { File::sync_directory(directory / "missing"); }), ENOENT);
}

TEST(open_refuses_what_is_no_regular_file) {
  const TemporaryDirectory directory;
  fixture::write_file(directory / "file", {1});
  CHECK_EQ(::mkfifo((directory / "fifo").c_str(), 0600), 0);
  std::filesystem::create_symlink(directory / "file", directory / "link");
  std::filesystem::create_directory(directory / "directory");
  CHECK_EQ(errno_of([&] { File::open(directory / "fifo"); }), EINVAL);
  CHECK_EQ(errno_of([&] { File::open(directory / "directory"); }), EINVAL);
  CHECK_EQ(errno_of([&] { File::open(directory / "link"); }), ELOOP);
  CHECK_EQ(errno_of([&] { File::open(directory / "missing"); }), ENOENT);
  CHECK_EQ(thrown_by([&] { File::open(directory / "file"); }), "nothing");
}

TEST(read_at_stops_where_the_file_ends) {
  const TemporaryDirectory directory;
  const Bytes bytes = fixture::random_bytes(100, 1);
  fixture::write_file(directory / "file", bytes);
  const File file = File::open(directory / "file");
  CHECK_EQ(file.size(), 100);
  Bytes read(200, 0);
  CHECK_EQ(file.read_at(read.data(), 60, 30), 60);
  CHECK(std::equal(read.begin(), read.begin() + 60, bytes.begin() + 30));
  CHECK_EQ(read[60], 0);
  CHECK_EQ(file.read_at(read.data(), 200, 90), 10);
  CHECK(std::equal(read.begin(), read.begin() + 10, bytes.begin() + 90));
  CHECK_EQ(file.read_at(read.data(), 1, 100), 0);
  CHECK_EQ(file.read_at(read.data(), 1, 1000), 0);
  CHECK_EQ(file.read_at(read.data(), 0, 0), 0);
}

TEST(a_file_that_was_moved_from_closes_nothing) {
  const TemporaryDirectory directory;
  fixture::write_file(directory / "file", {9});
  File first = File::open(directory / "file");
  {
    File second(std::move(first));
    const File third(std::move(second));
    CHECK_EQ(third.size(), 1);
  }
  const int descriptor = ::open((directory / "file").c_str(), O_RDONLY | O_CLOEXEC);
  {
    const File moved(std::move(first));
  }
  CHECK_EQ(::close(descriptor), 0);
}

TEST(buffers_are_page_aligned_and_round_up) {
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kPageSize, kPageSize + 1}) {
    const Buffer buffer = make_buffer(size);
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(buffer.get()) % kPageSize, 0);
    std::fill_n(buffer.get(), std::max(round_up(size, kPageSize), std::uint64_t{1}), 1);
  }
}
