// Expected values: xxhash.xxh3_128_hexdigest of the Python package xxhash, over the prefixes of
//   bytes((i * i * 2654435761 >> 16) & 255 for i in range(1, size + 1))

#include "digest.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu.h"

namespace {

using pysnap::Digest;
using pysnap::SimdPath;
using pysnap::to_hex;
using pysnap::xxh3_128;

constexpr SimdPath kAllPaths[] = {SimdPath::kPortable, SimdPath::kAvx2, SimdPath::kAvx512,
                                  SimdPath::kNeon};

struct Vector {
  std::size_t size;
  const char* hex;
};

constexpr Vector kVectors[] = {
    {0, "99aa06d3014798d86001c324468d497f"},     {1, "dbd6a1e71414294c06eed105b82285fa"},
    {2, "acb2468a5b0dc3d24e866ca79556db39"},     {3, "650eaf46d6d2921aca56c11274be3f3f"},
    {4, "639bba9a545be57a760dc647391dce5a"},     {5, "3696f606027ed31c6b949b1ea96bd932"},
    {8, "a43cdeb96a6e7399683c53b38b1790e5"},     {9, "aef49e9aa8a9f066bf88229115381a19"},
    {12, "8d4dc177db42b2645bf3372f0e7cce32"},    {16, "7c66ddf58efd2bbca7013d01d796967a"},
    {17, "1c580627ac1c745a602a053d6d09b786"},    {32, "f580ebd93a086e9ea7051375b66ce142"},
    {33, "730aee685aabf9eb4d0eddda817aaded"},    {128, "f17616373e6d4c68ae974d1a969337de"},
    {129, "a39be60c67f8ca13b3ef7f3ce6ca9eb2"},   {160, "3cdcf5fc8872046d4d136e26abaa8d39"},
    {240, "72cd1f03128c597534e13359e43082e9"},   {241, "c49144b338bddeee59a98a2fde7d23cd"},
    {256, "f3dd5abb0901555e744b8b9359a68332"},   {1023, "63b9b93bd769376ffa1c8306005536bd"},
    {1024, "2295e7b542c1fd501d5e975421f4f7c6"},  {1025, "f7b35c5a67ac67193aea5431e10f0ddf"},
    {1088, "a47bc942be4f5a0aade0afa0f1cd1470"},  {2047, "3bebe9ec66cd180938b03ce5faeb36c9"},
    {2048, "d15e774893ec3a9e7658093b214a023a"},  {2049, "9b85c073b54afbc702d54efbab0522f8"},
    {65536, "d5049b69f7947a5299a4909fd4cfce62"}, {4194317, "b2782597d6c1146a6d4bde535cb785ef"},
};

// The digest of the hex digests of all sizes from 0 to kFoldedSizes - 1, one after the other.
constexpr std::size_t kFoldedSizes = 1101;
constexpr const char* kFolded = "590b5d0783a3d15fdb4c8b0f0906e1e8";

std::vector<std::uint8_t> pattern(std::size_t size) {
  std::vector<std::uint8_t> bytes(size);
  for (std::uint64_t i = 1; i <= size; ++i) {
    bytes[i - 1] = static_cast<std::uint8_t>(i * i * 2654435761U >> 16);
  }
  return bytes;
}

// The bytes moved to `offset` past a boundary of at least 16, in memory that ends where they end,
// so that AddressSanitizer sees a read past them.
std::vector<std::uint8_t> moved(const std::vector<std::uint8_t>& bytes, std::size_t size,
                                std::size_t offset) {
  std::vector<std::uint8_t> memory(offset + size);
  std::copy_n(bytes.begin(), size, memory.begin() + static_cast<std::ptrdiff_t>(offset));
  return memory;
}

}  // namespace

TEST(threads_that_meet_at_the_first_digest_agree) {
  const std::vector<std::uint8_t> bytes = pattern(65536);
  std::vector<Digest> digests(4);
  std::vector<std::thread> threads;
  for (Digest& digest : digests) {
    threads.emplace_back([&] { digest = xxh3_128(bytes.data(), bytes.size()); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Digest& digest : digests) {
    CHECK_EQ(to_hex(digest), to_hex(xxh3_128(bytes.data(), bytes.size(), SimdPath::kPortable)));
  }
}

TEST(equals_the_reference_at_every_boundary) {
  const std::vector<std::uint8_t> bytes = pattern(std::end(kVectors)[-1].size);
  for (const Vector& vector : kVectors) {
    CHECK_EQ(to_hex(xxh3_128(bytes.data(), vector.size)), vector.hex);
    for (const SimdPath path : pysnap::supported_simd_paths()) {
      for (const std::size_t offset : {0U, 1U, 7U}) {
        const std::vector<std::uint8_t> memory = moved(bytes, vector.size, offset);
        const Digest digest = xxh3_128(memory.data() + offset, vector.size, path);
        CHECK_EQ(std::string(pysnap::simd_path_name(path)) + " " + to_hex(digest),
                 std::string(pysnap::simd_path_name(path)) + " " + vector.hex);
      }
    }
  }
}

TEST(equals_the_reference_at_every_short_size) {
  const std::vector<std::uint8_t> bytes = pattern(kFoldedSizes);
  for (const SimdPath path : pysnap::supported_simd_paths()) {
    for (std::size_t offset = 0; offset < 16; ++offset) {
      std::string all;
      for (std::size_t size = 0; size < kFoldedSizes; ++size) {
        const std::vector<std::uint8_t> memory = moved(bytes, size, offset);
        all += to_hex(xxh3_128(memory.data() + offset, size, path));
      }
      CHECK_EQ(to_hex(xxh3_128(all.data(), all.size(), path)), kFolded);
    }
  }
}

TEST(bytes_that_come_little_by_little_have_the_same_digest) {
  for (const Vector& vector : kVectors) {
    if (vector.size > 70'000) continue;
    const std::vector<std::uint8_t> bytes = pattern(vector.size);
    for (const SimdPath path : kAllPaths) {
      for (const std::size_t piece : {1, 64, 1000, 1024, 4096}) {
        // What is looked at before it has come is wrong.
        std::vector<std::uint8_t> memory(vector.size, 0xEE);
        pysnap::GrowingDigest digest(memory.data(), vector.size, path);
        for (std::size_t at = 0; at < vector.size; at += piece) {
          const std::size_t end = std::min(at + piece, vector.size);
          std::copy(bytes.data() + at, bytes.data() + end, memory.data() + at);
          digest.advance(end);
        }
        CHECK_EQ(to_hex(digest.finish()), vector.hex);
      }
    }
  }
}

TEST(no_bytes_need_no_address) { CHECK_EQ(to_hex(xxh3_128(nullptr, 0)), kVectors[0].hex); }

TEST(a_path_that_this_cpu_lacks_is_computed_portably) {
  const std::vector<std::uint8_t> bytes = pattern(65536);
  const Digest expected = xxh3_128(bytes.data(), bytes.size());
  for (const SimdPath path : kAllPaths) {
    CHECK_EQ(to_hex(xxh3_128(bytes.data(), bytes.size(), path)), to_hex(expected));
  }
}

TEST(hex_has_the_high_half_first) {
  CHECK_EQ(to_hex({0x0123456789abcdef, 0x00000000fedcba98}), "00000000fedcba980123456789abcdef");
}

TEST(digests_are_equal_only_if_both_halves_are) {
  CHECK((Digest{1, 2} == Digest{1, 2}));
  CHECK((Digest{1, 2} != Digest{1, 3}));
  CHECK((Digest{1, 2} != Digest{0, 2}));
}

TEST(paths_go_from_portable_to_best) {
  const std::vector<SimdPath> paths = pysnap::supported_simd_paths();
  CHECK(paths.front() == SimdPath::kPortable);
  CHECK(paths.back() == pysnap::best_simd_path());
  for (const SimdPath path : kAllPaths) {
    const bool listed = std::find(paths.begin(), paths.end(), path) != paths.end();
    CHECK_EQ(listed, pysnap::cpu_runs(path));
  }
}
