#include "restore.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "fixture.h"

namespace {

using fixture::Bytes;
using fixture::TemporaryDirectory;
using fixture::thrown_by;
using pysnap::Damage;
using pysnap::Element;
using pysnap::Encoding;
using pysnap::kHost;
using pysnap::kPageSize;
using pysnap::PackFile;
using pysnap::PackWriter;
using pysnap::StoredChunk;
using pysnap::Target;

constexpr std::uint64_t kLargest = ~std::uint64_t{0};

// A snapshot without its manifest: two packs, whose chunks are raw and planes in turn and do not
// fill their last page.
class Snapshot {
 public:
  static constexpr std::size_t kChunks = 8;

  Snapshot() {
    PackWriter writers[] = {PackWriter(directory_ / "0.pack", 0, false),
                            PackWriter(directory_ / "1.pack", 0, false)};
    pysnap::PlanesEncoder encoder(fixture::zstd());
    for (std::uint32_t i = 0; i < kChunks; ++i) {
      const std::uint32_t size = 8000 + 100 * i;
      const bool planes = i % 2 == 1;
      const Bytes raw =
          planes ? fixture::skewed_elements(size, 4, i) : fixture::random_bytes(size, i);
      StoredChunk chunk{i / 2 % 2,      size, size,
                        Element::kI32,  // their planes are zstd frames
                        Encoding::kRaw, 0,    pysnap::xxh3_128(raw.data(), size)};
      const pysnap::Buffer buffer = pysnap::make_buffer(size);
      if (planes) {
        chunk.encoding = Encoding::kPlanes;
        chunk.stored = static_cast<std::uint32_t>(
            encoder.encode(chunk.element, raw.data(), size, buffer.get()));
      } else {
        std::copy(raw.begin(), raw.end(), buffer.get());
      }
      chunk.offset = writers[chunk.pack].append(buffer.get(), chunk.stored);
      starts.push_back(stream.size());
      stream.insert(stream.end(), raw.begin(), raw.end());
      chunks.push_back(chunk);
    }
    for (const char* name : {"0.pack", "1.pack"}) {
      PackWriter& writer = writers[packs.size()];
      packs.push_back({directory_ / name, writer.finish()});
    }
  }

  // Replaces a byte of the file that holds chunk `i` by its complement, `at` bytes behind the
  // chunk's first.
  void damage(std::size_t i, std::size_t at) {
    const std::string& path = packs[chunks[i].pack].path;
    Bytes bytes = fixture::read_file(path);
    bytes.at(chunks[i].offset + at) ^= 0xFF;
    fixture::write_file(path, bytes);
  }

  bool restore(const std::vector<Target>& targets, unsigned threads = 2) const {
    return pysnap::restore(packs, chunks, targets, threads, fixture::zstd(), {}, nullptr, nullptr);
  }

  // The whole stream, read anew.
  Bytes restore_all(unsigned threads = 2) const {
    Bytes bytes(stream.size());
    CHECK(restore({target(0, bytes)}, threads));
    return bytes;
  }

  std::vector<std::size_t> damaged_chunks(unsigned threads = 2) const {
    std::vector<std::size_t> damaged;
    for (const Damage& damage : pysnap::verify(packs, chunks, threads, fixture::zstd(), nullptr)) {
      damaged.push_back(damage.chunk);
    }
    return damaged;
  }

  static Target target(std::uint64_t offset, Bytes& bytes) {
    return {offset, reinterpret_cast<std::uintptr_t>(bytes.data()), bytes.size(), kHost};
  }

  std::vector<PackFile> packs;
  std::vector<StoredChunk> chunks;
  std::vector<std::size_t> starts;
  Bytes stream;

 private:
  TemporaryDirectory directory_;
};

Bytes part(const Bytes& bytes, std::size_t offset, std::size_t length) {
  return Bytes(bytes.begin() + static_cast<std::ptrdiff_t>(offset),
               bytes.begin() + static_cast<std::ptrdiff_t>(offset + length));
}

using Chunks = std::vector<std::size_t>;

}  // namespace

TEST(the_whole_stream_comes_back) {
  const Snapshot snapshot;
  CHECK(snapshot.chunks[1].encoding == Encoding::kPlanes);
  for (const unsigned threads : {0U, 1U, 3U, 100U}) {
    CHECK(snapshot.restore_all(threads) == snapshot.stream);
    CHECK(snapshot.damaged_chunks(threads).empty());
  }
}

TEST(chunks_that_one_thread_decodes_one_after_the_other_come_back) {
  const Snapshot snapshot;
  Bytes bytes(snapshot.stream.size());
  std::vector<Target> targets;
  for (std::size_t i = 1; i < Snapshot::kChunks; i += 2) {
    CHECK(snapshot.chunks[i].encoding == Encoding::kPlanes);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data()) + snapshot.starts[i];
    targets.push_back({snapshot.starts[i], address, snapshot.chunks[i].raw, kHost});
  }
  CHECK(snapshot.restore(targets, 1));
  for (std::size_t i = 1; i < Snapshot::kChunks; i += 2) {
    const std::size_t start = snapshot.starts[i], size = snapshot.chunks[i].raw;
    CHECK(part(bytes, start, size) == part(snapshot.stream, start, size));
  }
}

TEST(targets_may_cover_any_part_of_the_stream) {
  const Snapshot snapshot;
  for (const std::size_t border :
       {snapshot.starts[1], snapshot.starts[4], snapshot.stream.size()}) {
    for (const std::size_t before : {0U, 1U, 9000U}) {
      for (const std::size_t behind : {0U, 1U, 20000U}) {
        const std::size_t offset = border - std::min<std::size_t>(before, border);
        const std::size_t end = std::min(border + behind, snapshot.stream.size());
        Bytes bytes(end - offset, 0xEE);
        CHECK(snapshot.restore({Snapshot::target(offset, bytes)}));
        CHECK(bytes == part(snapshot.stream, offset, end - offset));
      }
    }
  }
}

TEST(targets_may_share_bytes_of_the_stream) {
  const Snapshot snapshot;
  Bytes all(snapshot.stream.size());
  Bytes front(20000);
  Bytes same(20000);
  Bytes middle(100);
  CHECK(snapshot.restore({Snapshot::target(0, all), Snapshot::target(0, front),
                          Snapshot::target(0, same), Snapshot::target(8000, middle)}));
  CHECK(all == snapshot.stream);
  CHECK(front == part(snapshot.stream, 0, 20000));
  CHECK(same == front);
  CHECK(middle == part(snapshot.stream, 8000, 100));
}

TEST(what_no_target_covers_is_not_written) {
  const Snapshot snapshot;
  Bytes bytes(30000, 0xEE);
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(bytes.data());
  CHECK(snapshot.restore({{100, address + 10, 9000, kHost}, {20000, address + 15000, 5, kHost}}));
  Bytes expected(30000, 0xEE);
  std::copy_n(snapshot.stream.begin() + 100, 9000, expected.begin() + 10);
  std::copy_n(snapshot.stream.begin() + 20000, 5, expected.begin() + 15000);
  CHECK(bytes == expected);
}

TEST(no_targets_need_nothing) {
  const Snapshot snapshot;
  CHECK(snapshot.restore({}));
  CHECK(snapshot.restore({{snapshot.stream.size(), 0, 0, kHost}, {5, 0, 0, kHost}}));
  CHECK(pysnap::restore({}, {}, {}, 2, nullptr, {}, nullptr, nullptr));
  CHECK(pysnap::verify({}, {}, 2, nullptr, nullptr).empty());
}

TEST(targets_that_cannot_be_are_refused) {
  const Snapshot snapshot;
  Bytes bytes(snapshot.stream.size() + 1);
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::uint64_t size = snapshot.stream.size();
  for (const Target& target :
       {Target{0, address, size + 1, kHost}, Target{size, address, 1, kHost},
        Target{size + 1, address, 0, kHost}, Target{kLargest, address, 2, kHost},
        Target{1, address, kLargest, kHost}, Target{0, address, 1, 0}, Target{0, address, 1, -2}}) {
    CHECK_EQ(thrown_by([&] { snapshot.restore({target}); }), "invalid");
  }
  CHECK_EQ(thrown_by([&] {
             pysnap::restore({}, {}, {{0, address, 1, kHost}}, 1, nullptr, {}, nullptr, nullptr);
           }),
           "invalid");
  CHECK(bytes == Bytes(bytes.size()));
}

TEST(every_damaged_byte_is_found) {
  Snapshot snapshot;
  for (const std::size_t i : {2U, 3U}) {
    const std::size_t stored = snapshot.chunks[i].stored;
    for (const std::size_t at : {std::size_t{0}, std::size_t{1}, stored / 2, stored - 1, stored,
                                 pysnap::round_up(stored, kPageSize) - 1}) {
      snapshot.damage(i, at);
      CHECK(snapshot.damaged_chunks() == Chunks({i}));
      try {
        snapshot.restore_all();
        CHECK(false);
      } catch (const pysnap::Error& error) {
        CHECK_EQ(error.kind(), pysnap::ErrorKind::kCorrupt);
        CHECK_EQ(error.chunk(), i);
        CHECK_EQ(error.path(), snapshot.packs[1].path);
      }
      snapshot.damage(i, at);
      CHECK(snapshot.damaged_chunks().empty());
    }
  }
}

TEST(a_chunk_that_is_damaged_reaches_no_target) {
  Snapshot snapshot;
  snapshot.damage(4, 100);
  Bytes bytes(snapshot.chunks[4].raw, 0xEE);
  CHECK_EQ(thrown_by([&] { snapshot.restore({Snapshot::target(snapshot.starts[4], bytes)}); }),
           "corrupt");
  CHECK(bytes == Bytes(bytes.size(), 0xEE));
}

TEST(a_wrong_digest_is_found) {
  for (std::size_t i = 0; i < 2; ++i) {
    Snapshot snapshot;
    snapshot.chunks[i].digest.low ^= 1;
    snapshot.chunks[i + 4].digest.high ^= 1;
    CHECK(snapshot.damaged_chunks() == Chunks({i, i + 4}));
    CHECK_EQ(thrown_by([&] { snapshot.restore_all(); }), "corrupt");
  }
}

TEST(a_wrong_element_is_found) {
  Snapshot snapshot;
  snapshot.chunks[1].element = Element::kF32;
  snapshot.chunks[3].element = Element::kF16;
  CHECK(snapshot.damaged_chunks() == Chunks({1, 3}));
}

TEST(only_the_chunks_of_the_targets_are_read) {
  Snapshot snapshot;
  for (const std::size_t i : {0U, 3U, 5U, 7U}) snapshot.damage(i, 20);
  for (const std::size_t i : {1U, 2U, 4U, 6U}) {
    Bytes bytes(snapshot.chunks[i].raw);
    CHECK(snapshot.restore({Snapshot::target(snapshot.starts[i], bytes)}));
    CHECK(bytes == part(snapshot.stream, snapshot.starts[i], bytes.size()));
  }
  Bytes two(snapshot.chunks[1].raw + snapshot.chunks[2].raw);
  CHECK(snapshot.restore({Snapshot::target(snapshot.starts[1], two)}));
  Bytes more(two.size() + 1);
  CHECK_EQ(thrown_by([&] { snapshot.restore({Snapshot::target(snapshot.starts[1], more)}); }),
           "corrupt");
}

TEST(verify_goes_on_after_damage) {
  for (const unsigned threads : {1U, 3U}) {
    Snapshot snapshot;
    for (const std::size_t i : {7U, 1U, 0U, 4U}) snapshot.damage(i, 20);
    const std::vector<Damage> damages =
        pysnap::verify(snapshot.packs, snapshot.chunks, threads, fixture::zstd(), nullptr);
    CHECK(snapshot.damaged_chunks(threads) == Chunks({0, 1, 4, 7}));
    CHECK(damages[0].what.find(snapshot.packs[0].path + ", chunk 0: ") == 0);
    CHECK_EQ(damages[0].error_number, 0);
  }
}

TEST(a_pack_of_another_length_is_refused) {
  for (const int change : {-4096, -1, 1, 4096}) {
    const Snapshot snapshot;
    std::filesystem::resize_file(snapshot.packs[1].path,
                                 snapshot.packs[1].size + static_cast<std::uint64_t>(change));
    CHECK_EQ(thrown_by([&] { snapshot.restore_all(); }), "corrupt");
    CHECK(snapshot.damaged_chunks() == Chunks({2, 3, 6, 7}));
    Bytes bytes(100);
    CHECK(snapshot.restore({Snapshot::target(0, bytes)}));
    CHECK(bytes == part(snapshot.stream, 0, 100));
  }
}

TEST(a_pack_that_is_missing_is_an_io_error_that_verify_lists) {
  const Snapshot snapshot;
  std::filesystem::remove(snapshot.packs[0].path);
  CHECK_EQ(fixture::errno_of([&] { snapshot.restore_all(); }), ENOENT);
  CHECK(snapshot.damaged_chunks() == Chunks({0, 1, 4, 5}));
  const std::vector<Damage> damages =
      pysnap::verify(snapshot.packs, snapshot.chunks, 2, fixture::zstd(), nullptr);
  CHECK_EQ(damages[0].error_number, ENOENT);
}

TEST(a_table_that_points_past_the_end_of_the_file_is_refused) {
  Snapshot snapshot;
  // The last page of the pack is cut in the manifest and on the disk alike.
  const std::uint64_t size = snapshot.chunks[7].offset + snapshot.chunks[7].stored;
  std::filesystem::resize_file(snapshot.packs[1].path, size);
  snapshot.packs[1].size = size;
  const std::vector<Damage> damages =
      pysnap::verify(snapshot.packs, snapshot.chunks, 2, fixture::zstd(), nullptr);
  CHECK_EQ(damages.size(), 1);
  CHECK_EQ(damages[0].what, snapshot.packs[1].path + ", chunk 7: the file ends before it");
}

TEST(rows_that_cannot_be_are_refused) {
  const std::function<void(StoredChunk&)> changes[] = {
      [](StoredChunk& chunk) { chunk.pack = 2; },
      [](StoredChunk& chunk) { chunk.pack = 0xFFFFFFFF; },
      [](StoredChunk& chunk) { chunk.raw = 0; },
      [](StoredChunk& chunk) { chunk.raw = chunk.stored = 0; },
      [](StoredChunk& chunk) { chunk.stored = 0; },
      [](StoredChunk& chunk) { chunk.stored = chunk.raw + 1; },
      [](StoredChunk& chunk) { chunk.stored = 0xFFFFFFFF; },
      [](StoredChunk& chunk) { chunk.raw = pysnap::kLargestChunk + 4; },
      [](StoredChunk& chunk) { chunk.raw = 0xFFFFFFFC; },
      [](StoredChunk& chunk) { chunk.raw += 2; },
      [](StoredChunk& chunk) { chunk.element = static_cast<Element>(7); },
      [](StoredChunk& chunk) { chunk.element = static_cast<Element>(255); },
      [](StoredChunk& chunk) { chunk.encoding = static_cast<Encoding>(2); },
      [](StoredChunk& chunk) { chunk.encoding = static_cast<Encoding>(255); },
      [](StoredChunk& chunk) { chunk.encoding = Encoding::kRaw; },
      [](StoredChunk& chunk) { chunk.raw = chunk.stored / 4 * 4, chunk.stored = chunk.raw; },
      [](StoredChunk& chunk) { chunk.offset += 1; },
      [](StoredChunk& chunk) { chunk.offset += 2048; },
      [](StoredChunk& chunk) { chunk.offset = std::uint64_t{1} << 40; },
      [](StoredChunk& chunk) { chunk.offset = kLargest / kPageSize * kPageSize; },
  };
  for (const auto& change : changes) {
    Snapshot snapshot;
    change(snapshot.chunks[3]);
    CHECK_EQ(thrown_by([&] { snapshot.restore({}); }), "invalid");
    CHECK_EQ(thrown_by([&] { snapshot.damaged_chunks(); }), "invalid");
  }
  Snapshot snapshot;
  snapshot.packs[1].size = snapshot.chunks[7].offset + snapshot.chunks[7].stored - 1;
  CHECK_EQ(thrown_by([&] { snapshot.restore({}); }), "invalid");
}

TEST(links_and_pipes_in_place_of_packs_are_refused) {
  const Snapshot snapshot;
  const std::string& path = snapshot.packs[1].path;
  std::filesystem::rename(path, path + ".real");
  std::filesystem::create_symlink(path + ".real", path);
  CHECK_EQ(fixture::errno_of([&] { snapshot.restore_all(); }), ELOOP);
}

TEST(without_zstd_chunks_that_need_it_are_an_error_and_no_damage) {
  const Snapshot snapshot;
  Bytes bytes(snapshot.stream.size());
  CHECK_EQ(thrown_by([&] {
             pysnap::restore(snapshot.packs, snapshot.chunks, {Snapshot::target(0, bytes)}, 2,
                             nullptr, {}, nullptr, nullptr);
           }),
           "invalid");
  CHECK_EQ(thrown_by([&] { pysnap::verify(snapshot.packs, snapshot.chunks, 2, nullptr, nullptr); }),
           "invalid");
  bytes.resize(100);
  CHECK(pysnap::restore(snapshot.packs, snapshot.chunks, {Snapshot::target(0, bytes)}, 2, nullptr,
                        {}, nullptr, nullptr));
}

TEST(an_interruption_ends_restore_and_verify) {
  const Snapshot snapshot;
  Bytes bytes(snapshot.stream.size());
  int polls = 0;
  const auto at_the_third_poll = [&] { return ++polls == 3; };
  CHECK(!pysnap::restore(snapshot.packs, snapshot.chunks, {Snapshot::target(0, bytes)}, 1,
                         fixture::zstd(), {}, nullptr, at_the_third_poll));
  // The second is checked, and would be copied beside the third.
  CHECK(part(bytes, snapshot.starts[1], 100) == Bytes(100));
  CHECK(part(bytes, 0, snapshot.starts[1]) == part(snapshot.stream, 0, snapshot.starts[1]));
  polls = 0;
  pysnap::verify(snapshot.packs, snapshot.chunks, 1, fixture::zstd(), at_the_third_poll);
  CHECK_EQ(polls, 3);
}

namespace {

// Memory whose first use cuts a file short.
void* trap = nullptr;
const char* file_of_trap = nullptr;

void spring_trap(int) {
  static_cast<void>(::truncate(file_of_trap, 0) == 0);
  ::mprotect(trap, kPageSize, PROT_READ | PROT_WRITE);
}

}  // namespace

// Its pages might be read anew while the disk is busy with the next one.
TEST(a_chunk_that_was_checked_in_place_is_copied_before_the_file_is_read) {
  Snapshot snapshot;
  // Found when it has been read, and before its digest is looked at.
  snapshot.damage(1, snapshot.chunks[1].stored);
  Bytes bytes(snapshot.stream.size());
  CHECK_EQ(thrown_by([&] { snapshot.restore({Snapshot::target(0, bytes)}, 1); }), "corrupt");
  CHECK(part(bytes, 0, snapshot.starts[1]) == part(snapshot.stream, 0, snapshot.starts[1]));
}

TEST(a_file_that_is_cut_short_while_it_is_copied_is_damage_and_kills_nobody) {
  const Snapshot snapshot;
  trap = ::mmap(nullptr, kPageSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  file_of_trap = snapshot.packs[0].path.c_str();
  struct sigaction action{}, before{};
  action.sa_handler = spring_trap;
  CHECK_EQ(::sigaction(SIGSEGV, &action, &before), 0);
  const Target target{0, reinterpret_cast<std::uintptr_t>(trap), kPageSize, kHost};
  CHECK_EQ(thrown_by([&] { snapshot.restore({target}, 1); }), "corrupt");
  CHECK_EQ(::sigaction(SIGSEGV, &before, nullptr), 0);
  ::munmap(trap, kPageSize);
}
