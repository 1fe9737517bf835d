// A small fuzzer for compilers that have none: mutates inputs, keeps those that reach new code.
//
//   driver CORPUS_FOLDER DICTIONARY SECONDS SEED CRASH_FILE
//
// The code under test is compiled with -fsanitize-coverage=trace-pc and the sanitizers, this file
// with the sanitizers alone. Where a sanitizer or abort() ends the process, the input at hand is
// written to CRASH_FILE first. The last line says how much was tried.
#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t length);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kLongest = std::size_t{1} << 18;
constexpr std::array<std::uint32_t, 16> kInteresting = {
    0,    1,     2,       7,       8,       63,         64,         65,
    4095, 65535, 1048575, 1048576, 1048577, 0x7fffffff, 0x80000000, 0xffffffff};

// Edges that were reached, by hash.
std::array<std::uint8_t, 1 << 16> reached;
bool reached_new = false;
std::uintptr_t previous = 0;

const Bytes* current = nullptr;
std::string crash_file;

void write_crash() {
  if (current == nullptr) return;
  std::ofstream file(crash_file, std::ios::binary);
  file.write(reinterpret_cast<const char*>(current->data()),
             static_cast<std::streamsize>(current->size()));
}

void on_abort(int) {
  write_crash();
  std::_Exit(77);
}

Bytes read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// Lines such as  name="ab\x01".
std::vector<Bytes> read_dictionary(const std::string& path) {
  std::vector<Bytes> words;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find('"'), last = line.rfind('"');
    if (line.empty() || line[0] == '#' || first == last) continue;
    Bytes word;
    for (std::size_t i = first + 1; i < last; ++i) {
      if (line[i] == '\\' && line[i + 1] == 'x') {
        word.push_back(static_cast<std::uint8_t>(std::stoi(line.substr(i + 2, 2), nullptr, 16)));
        i += 3;
      } else {
        word.push_back(static_cast<std::uint8_t>(line[i]));
      }
    }
    words.push_back(word);
  }
  return words;
}

class Mutator {
 public:
  Mutator(std::uint64_t seed, std::vector<Bytes> dictionary)
      : random_(seed), dictionary_(std::move(dictionary)) {}

  std::size_t below(std::size_t count) { return count == 0 ? 0 : random_() % count; }

  void mutate(Bytes& data, const Bytes& other) {
    for (std::size_t i = 0, times = 1 + below(4); i < times; ++i) once(data, other);
    if (data.size() > kLongest) data.resize(kLongest);
  }

 private:
  // Headers decide most: half of all changes are made near the beginning.
  std::size_t place(const Bytes& data) {
    return below(below(2) == 0 ? std::min<std::size_t>(data.size(), 96) : data.size());
  }

  void once(Bytes& data, const Bytes& other) {
    if (data.empty()) data.push_back(0);
    const std::size_t at = place(data);
    auto here = data.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(8)) {
      case 0:
        data[at] = static_cast<std::uint8_t>(data[at] ^ 1u << below(8));
        break;
      case 1:
        data[at] = static_cast<std::uint8_t>(random_());
        break;
      case 2:
        overwrite(data, at, kInteresting[below(kInteresting.size())]);
        break;
      case 3: {  // a number that is off by a little
        std::uint32_t value = 0;
        std::memcpy(&value, &data[at], std::min<std::size_t>(4, data.size() - at));
        overwrite(data, at, value + static_cast<std::uint32_t>(below(33)) - 16);
        break;
      }
      case 4:
        data.insert(here, 1 + below(16), static_cast<std::uint8_t>(random_()));
        break;
      case 5:
        data.erase(here, here + static_cast<std::ptrdiff_t>(
                                    std::min(data.size() - at, 1 + below(below(4) ? 16 : 4096))));
        break;
      case 6:
        if (!dictionary_.empty()) {
          const Bytes& word = dictionary_[below(dictionary_.size())];
          std::copy_n(word.begin(), std::min(word.size(), data.size() - at), here);
        }
        break;
      default:
        if (!other.empty()) {  // the end of another
          data.resize(at);
          data.insert(data.end(),
                      other.begin() + static_cast<std::ptrdiff_t>(std::min(at, other.size())),
                      other.end());
        }
    }
  }

  static void overwrite(Bytes& data, std::size_t at, std::uint32_t value) {
    std::memcpy(&data[at], &value, std::min<std::size_t>(4, data.size() - at));
  }

  std::mt19937_64 random_;
  const std::vector<Bytes> dictionary_;
};

// Whether the input reached code that none before it did.
bool run(const Bytes& input) {
  current = &input;
  reached_new = false;
  previous = 0;
  LLVMFuzzerTestOneInput(input.data(), input.size());
  current = nullptr;
  return reached_new;
}

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const std::uintptr_t here = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  const std::uintptr_t edge = (here ^ previous << 1) * 0x9e3779b97f4a7c15u >> 48;
  previous = here;
  if (reached[edge] != 0) return;
  reached[edge] = 1;
  reached_new = true;
}

int main(int count, char** arguments) {
  if (count != 6) return 2;
  crash_file = arguments[5];
  std::signal(SIGABRT, on_abort);
  __sanitizer_set_death_callback(write_crash);
  std::vector<std::filesystem::path> seeds;
  for (const auto& entry : std::filesystem::directory_iterator(arguments[1]))
    seeds.push_back(entry.path());
  std::sort(seeds.begin(), seeds.end());
  std::vector<Bytes> corpus;
  for (const auto& seed : seeds) {
    corpus.push_back(read_file(seed));
    run(corpus.back());
  }
  if (corpus.empty()) return 2;
  Mutator mutator(std::strtoull(arguments[4], nullptr, 10), read_dictionary(arguments[2]));
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(std::strtod(arguments[3], nullptr));
  std::uint64_t runs = corpus.size();
  while (std::chrono::steady_clock::now() < end) {
    Bytes input = corpus[mutator.below(corpus.size())];
    mutator.mutate(input, corpus[mutator.below(corpus.size())]);
    ++runs;
    if (run(input)) corpus.push_back(input);
  }
  std::printf("runs %llu, corpus %zu, edges %td\n", static_cast<unsigned long long>(runs),
              corpus.size(), std::count(reached.begin(), reached.end(), 1));
}
