// What several test programs need: a directory that goes away, bytes as a training run has them,
// and the kind of an error.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.h"
#include "zstd.h"

#if defined(__has_feature)
#define PYSNAP_HAS_FEATURE(name) __has_feature(name)
#else
#define PYSNAP_HAS_FEATURE(name) 0
#endif

namespace fixture {

#if defined(__SANITIZE_ADDRESS__) || PYSNAP_HAS_FEATURE(address_sanitizer)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__) || PYSNAP_HAS_FEATURE(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// A word that the kernel tells of each thread of this process that has this name, as the letter of
// its "State:".
inline std::vector<std::string> told_of_threads(const std::string& name, const std::string& what) {
  std::vector<std::string> told;
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string word;
    std::ifstream(thread.path() / "comm") >> word;
    if (word != name) continue;
    std::ifstream status(thread.path() / "status");
    while (status >> word) {
      if (word != what) continue;
      status >> word;
      told.push_back(word);
      break;
    }
  }
  return told;
}

using Bytes = std::vector<std::uint8_t>;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "pysnap-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// The same sequence for the same seed, everywhere (xorshift64*).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}
  std::uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1DU;
  }

 private:
  std::uint64_t state_;
};

inline Bytes random_bytes(std::size_t size, std::uint64_t seed) {
  Random random(seed);
  Bytes bytes(size);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.next() >> 56);
  return bytes;
}

// Little-endian elements of `width` bytes whose lower half is noise and whose upper half takes few
// values, as in weights.
inline Bytes skewed_elements(std::size_t size, std::size_t width, std::uint64_t seed) {
  Random random(seed);
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    const std::uint64_t word = random.next() >> 32;
    const bool upper = i % width >= width / 2;
    bytes[i] = static_cast<std::uint8_t>(upper ? 0x3C + (word & word >> 8 & 3) : word);
  }
  return bytes;
}

inline Bytes read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

inline void write_file(const std::string& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

// The tests need the library that releases find; a build machine without it is not set up.
inline std::shared_ptr<const pysnap::Zstd> zstd() {
  static const std::shared_ptr<const pysnap::Zstd> library = pysnap::Zstd::open({"libzstd.so.1"});
  if (library == nullptr) throw std::runtime_error("libzstd.so.1 is not installed");
  return library;
}

// "invalid", "io", "device", "torn", "corrupt" or "closed": the kind of the Error that call()
// throws; "nothing" where it throws none.
template <typename Call>
std::string thrown_by(Call call) {
  try {
    call();
  } catch (const pysnap::Error& error) {
    switch (error.kind()) {
      case pysnap::ErrorKind::kInvalid:
        return "invalid";
      case pysnap::ErrorKind::kIo:
        return "io";
      case pysnap::ErrorKind::kDevice:
        return "device";
      case pysnap::ErrorKind::kTorn:
        return "torn";
      case pysnap::ErrorKind::kCorrupt:
        return "corrupt";
      case pysnap::ErrorKind::kClosed:
        return "closed";
    }
  }
  return "nothing";
}

// errno of the Error(kIo) that call() throws, else 0.
template <typename Call>
int errno_of(Call call) {
  try {
    call();
  } catch (const pysnap::Error& error) {
    return error.error_number();
  }
  return 0;
}

}  // namespace fixture
