// docs/format.md section 4 is the specification that these tests hold the coder to.

#include "huffman.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "fixture.h"

namespace {

using fixture::Bytes;
using pysnap::HuffmanDecoder;
using pysnap::HuffmanEncoder;
using pysnap::SimdPath;

constexpr std::size_t kStreams = pysnap::kHuffmanStreams;
constexpr std::size_t kLengths = 8;
constexpr std::size_t kStreamSizes = kLengths + 128;
constexpr std::size_t kHeader = kStreamSizes + 4 * kStreams;

// The buffer is exact, so that AddressSanitizer sees a write past it.
Bytes encode(const Bytes& plane, SimdPath path = pysnap::best_simd_path()) {
  HuffmanEncoder encoder;
  Bytes out(plane.size());
  out.resize(encoder.encode(plane.data(), plane.size(), out.data(), out.size(), path));
  return out;
}

std::optional<Bytes> decode(const Bytes& payload, std::size_t size) {
  static HuffmanDecoder decoder;
  const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[payload.size()]);
  std::copy(payload.begin(), payload.end(), exact.get());
  const std::unique_ptr<std::uint8_t[]> plane(new std::uint8_t[size]);
  if (!decoder.decode(exact.get(), payload.size(), plane.get(), size)) return std::nullopt;
  return Bytes(plane.get(), plane.get() + size);
}

std::uint32_t u32_at(const Bytes& bytes, std::size_t at) {
  std::uint32_t value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

// A decoder straight from the specification: bit by bit, against a list of all codes.
std::optional<Bytes> reference_decode(const Bytes& payload, std::size_t size) {
  struct CodeWord {
    unsigned length;
    unsigned symbol;
    unsigned code;
  };
  std::vector<CodeWord> words;
  for (unsigned symbol = 0; symbol < 256; ++symbol) {
    const unsigned length = payload[kLengths + symbol / 2] >> symbol % 2 * 4 & 15;
    if (length > 0) words.push_back({length, symbol, 0});
  }
  std::stable_sort(words.begin(), words.end(),
                   [](const CodeWord& a, const CodeWord& b) { return a.length < b.length; });
  for (std::size_t i = 1; i < words.size(); ++i)
    words[i].code = (words[i - 1].code + 1) << (words[i].length - words[i - 1].length);
  Bytes plane;
  std::size_t at = kHeader;
  for (std::size_t s = 0; s < kStreams; ++s) {
    const std::size_t count = s + 1 < kStreams ? size / kStreams : size - size / kStreams * s;
    std::size_t bit = 8 * at;
    for (std::size_t i = 0; i < count; ++i) {
      unsigned code = 0, length = 0;
      const CodeWord* found = nullptr;
      while (found == nullptr) {
        code = code << 1 | (payload[bit / 8] >> bit % 8 & 1);
        ++bit, ++length;
        for (const CodeWord& word : words)
          if (word.length == length && word.code == code) found = &word;
        if (length > 11) return std::nullopt;
      }
      plane.push_back(static_cast<std::uint8_t>(found->symbol));
    }
    at += u32_at(payload, kStreamSizes + 4 * s);
    if ((bit + 7) / 8 != at) return std::nullopt;
  }
  if (payload[0] == 1) {
    for (std::uint8_t& byte : plane)
      if (byte == payload[1]) byte = payload[at++];
  }
  if (at != payload.size()) return std::nullopt;
  return plane;
}

// Bytes that fall off by the factor `decay` from one value to the next.
Bytes falling(std::size_t size, double decay, std::uint64_t seed) {
  std::vector<double> sums;
  double weight = 1, sum = 0;
  for (int i = 0; i < 256; ++i, weight *= decay) sums.push_back(sum += weight);
  fixture::Random random(seed);
  Bytes plane(size);
  for (std::uint8_t& byte : plane) {
    const double x = static_cast<double>(random.next() >> 11) / (std::uint64_t{1} << 53) * sum;
    byte = static_cast<std::uint8_t>(
        90 + (std::upper_bound(sums.begin(), sums.end(), x) - sums.begin()));
  }
  return plane;
}

const std::size_t kSizes[] = {2,     3,     7,     8,     9,      15,     63,    64,    65,
                              511,   512,   513,   1000,  4095,   4096,   16383, 16384, 16385,
                              20000, 32768, 65536, 65543, 100001, 262144, 524288};

// A payload with these lengths of codes; streams and literals as given.
Bytes payload_of(const std::array<std::uint8_t, 256>& lengths, const std::vector<Bytes>& streams,
                 std::optional<std::uint8_t> escape = std::nullopt, const Bytes& literals = {}) {
  Bytes payload(kHeader);
  payload[0] = escape.has_value();
  payload[1] = escape.value_or(0);
  payload[4] = static_cast<std::uint8_t>(literals.size());
  for (std::size_t i = 0; i < 256; ++i)
    payload[kLengths + i / 2] =
        static_cast<std::uint8_t>(payload[kLengths + i / 2] | lengths[i] << i % 2 * 4);
  for (std::size_t s = 0; s < kStreams; ++s) {
    payload[kStreamSizes + 4 * s] = static_cast<std::uint8_t>(streams[s].size());
    payload.insert(payload.end(), streams[s].begin(), streams[s].end());
  }
  payload.insert(payload.end(), literals.begin(), literals.end());
  return payload;
}

const std::vector<Bytes> kOneByteEach(kStreams, Bytes{0b10});

// The codes 0, 10, 11 of 'a', 'b', 'c'.
std::array<std::uint8_t, 256> three_codes() {
  std::array<std::uint8_t, 256> lengths{};
  lengths['a'] = 1;
  lengths['b'] = lengths['c'] = 2;
  return lengths;
}

}  // namespace

TEST(planes_come_back_and_every_path_writes_the_same) {
  for (const std::size_t size : kSizes) {
    for (const double decay : {0.05, 0.5, 0.8, 0.97, 0.99}) {
      const Bytes plane = falling(size, decay, size);
      const Bytes encoded = encode(plane, SimdPath::kPortable);
      for (const SimdPath path : pysnap::supported_simd_paths())
        CHECK(encode(plane, path) == encoded);
      if (encoded.empty()) continue;
      CHECK(encoded.size() < size);
      CHECK(decode(encoded, size) == plane);
      if (size < 70000) CHECK(reference_decode(encoded, size) == plane);
    }
  }
}

TEST(the_length_is_near_the_entropy) {
  // Of these, half of the bytes have one bit, a quarter has two ...: two bits each.
  const Bytes plane = falling(524288, 0.5, 1);
  CHECK(encode(plane).size() < 524288 * 2.02 / 8 + kHeader);
}

TEST(noise_and_constants_are_not_coded) {
  CHECK(encode(fixture::random_bytes(100000, 1)).empty());
  CHECK(encode(Bytes(100000, 7)).empty());
  CHECK(encode({}).empty());
  CHECK(encode({1}).empty());
}

TEST(a_result_that_does_not_fit_is_none) {
  const Bytes plane = falling(20000, 0.8, 1);
  HuffmanEncoder encoder;
  const std::size_t needed = encode(plane).size();
  for (const std::size_t capacity : {std::size_t{0}, std::size_t{1}, kHeader, needed - 1, needed}) {
    Bytes out(capacity);
    CHECK_EQ(encoder.encode(plane.data(), plane.size(), out.data(), capacity),
             capacity == needed ? needed : 0);
  }
}

TEST(values_that_the_sample_missed_are_escaped) {
  Bytes plane = falling(100000, 0.7, 1);
  for (std::size_t i = 0; i < plane.size(); i += 999) plane[i] = static_cast<std::uint8_t>(i % 89);
  const Bytes encoded = encode(plane);
  CHECK_EQ(encoded[0], 1);
  CHECK(u32_at(encoded, 4) > 50);
  CHECK(decode(encoded, plane.size()) == plane);
  CHECK(reference_decode(encoded, plane.size()) == plane);
  for (const SimdPath path : pysnap::supported_simd_paths()) CHECK(encode(plane, path) == encoded);
}

TEST(the_value_that_stands_for_an_escape_may_occur) {
  Bytes plane = falling(100000, 0.7, 1);
  const std::uint8_t escape = encode(plane)[1];
  // Between the pieces that are counted, so that it stays the one that was not seen.
  for (const std::size_t at : {100U, 101U, 51300U, 99940U}) plane[at] = escape;
  const Bytes encoded = encode(plane);
  CHECK_EQ(encoded[1], escape);
  CHECK(decode(encoded, plane.size()) == plane);
}

TEST(streams_of_very_different_lengths) {
  Bytes plane = falling(262144, 0.9, 1);
  for (std::size_t s = 0; s < kStreams; s += 3)
    std::fill_n(plane.begin() + static_cast<std::ptrdiff_t>(s * 32768), 32768, 91);
  const Bytes encoded = encode(plane);
  CHECK(decode(encoded, plane.size()) == plane);
}

TEST(a_payload_by_hand) {
  // 'a' is 0, 'b' is 10 and 'c' is 11; the first bit of a byte is its lowest.
  const Bytes payload = payload_of(three_codes(), {{0}, {1}, {3}, {0}, {1}, {3}, {0}, {0b01101}});
  CHECK(decode(payload, 10) == Bytes({'a', 'b', 'c', 'a', 'b', 'c', 'a', 'b', 'c', 'a'}));
}

TEST(a_payload_by_hand_with_an_escape) {
  const std::vector<Bytes> streams = {{0}, {1}, {3}, {0}, {1}, {3}, {0}, {0}};
  CHECK(decode(payload_of(three_codes(), streams, 'b', {'x', 'b'}), 8) ==
        Bytes({'a', 'x', 'c', 'a', 'b', 'c', 'a', 'a'}));
  CHECK(!decode(payload_of(three_codes(), streams, 'b', {'x'}), 8).has_value());
  CHECK(!decode(payload_of(three_codes(), streams, 'b', {'x', 'y', 'z'}), 8).has_value());
  CHECK(!decode(payload_of(three_codes(), streams, 'd', {'x', 'y'}), 8).has_value());
  CHECK(!decode(payload_of(three_codes(), streams, 'd'), 8).has_value());
  Bytes unused = payload_of(three_codes(), streams);
  CHECK(decode(unused, 8).has_value());
  unused[1] = 'd';
  CHECK(!decode(unused, 8).has_value());
  Bytes without = payload_of(three_codes(), streams, 'b', {'x', 'y'});
  without[0] = 0;
  CHECK(!decode(without, 8).has_value());
  without[1] = 0;
  CHECK(!decode(without, 8).has_value());
}

TEST(codes_that_are_not_complete_are_refused) {
  const std::vector<Bytes> streams(kStreams, Bytes{0});
  std::array<std::uint8_t, 256> lengths{};
  const auto decodes = [&] { return decode(payload_of(lengths, streams), 8).has_value(); };
  CHECK(!decodes());
  lengths['a'] = 1;
  CHECK(!decodes());
  lengths['b'] = 2;
  CHECK(!decodes());
  lengths['c'] = 2;
  CHECK(decodes());
  lengths['d'] = 11;
  CHECK(!decodes());
  lengths = {};
  lengths['a'] = lengths['b'] = lengths['c'] = 1;
  CHECK(!decodes());
  lengths = {};
  // Complete, but with codes of 12 bits.
  for (std::uint8_t i = 1; i <= 12; ++i) lengths[i] = i;
  lengths[13] = 12;
  CHECK(!decodes());
  lengths.fill(15);
  CHECK(!decodes());
  lengths.fill(8);
  CHECK(decodes());
}

TEST(streams_that_lie_are_refused) {
  const std::vector<Bytes> good(kStreams, Bytes{0b010});
  const auto decodes = [](std::size_t stream, const Bytes& bytes) {
    std::vector<Bytes> streams(kStreams, Bytes{0b010});
    streams[stream] = bytes;
    return decode(payload_of(three_codes(), streams), 16).has_value();
  };
  for (std::size_t stream = 0; stream < kStreams; ++stream) {
    CHECK(decodes(stream, {0b010}));      // a b
    CHECK(decodes(stream, {0}));          // a a
    CHECK(!decodes(stream, {}));          // ends before
    CHECK(!decodes(stream, {0b1010}));    // a bit behind it
    CHECK(!decodes(stream, {0b010, 0}));  // a byte behind it
  }
  for (const std::size_t size : {0U, 7U, 8U, 15U, 72U, 1000U})
    CHECK(!decode(payload_of(three_codes(), good), size).has_value());
}

TEST(every_changed_bit_of_a_header_and_every_truncation_is_refused_or_survived) {
  const Bytes plane = falling(40000, 0.7, 1);
  const Bytes encoded = encode(plane);
  CHECK_EQ(encoded[0], 1);
  for (std::size_t bit = 0; bit < 8 * kHeader; ++bit) {
    Bytes changed = encoded;
    changed[bit / 8] = static_cast<std::uint8_t>(changed[bit / 8] ^ 1 << bit % 8);
    CHECK(!decode(changed, plane.size()).has_value());
  }
  for (std::size_t size = 0; size < encoded.size(); size += size < kHeader + 100 ? 1 : 97)
    CHECK(!decode(Bytes(encoded.begin(), encoded.begin() + size), plane.size()).has_value());
  for (std::size_t at = kHeader; at < encoded.size(); at += 61) {
    Bytes changed = encoded;
    changed[at] = static_cast<std::uint8_t>(changed[at] ^ (1 + at % 255));
    const std::optional<Bytes> decoded = decode(changed, plane.size());
    CHECK(!decoded.has_value() || decoded != plane);
  }
}

TEST(any_bytes_are_survived) {
  fixture::Random random(5);
  Bytes good = encode(falling(3000, 0.7, 1));
  for (int i = 0; i < 3000; ++i) {
    Bytes payload = good;
    for (std::size_t k = random.next() % 30; k-- > 0;)
      payload[random.next() % (i % 2 ? kHeader : payload.size())] =
          static_cast<std::uint8_t>(random.next());
    // Lengths of codes that are complete reach the streams.
    if (i % 3 == 0) std::copy_n(good.begin() + kLengths, 128, payload.begin() + kLengths);
    decode(payload, random.next() % 2 ? 3000 : random.next() % 5000);
  }
}
