// docs/format.md section 4 is the specification that these tests hold the codec to.

#include "codec.h"

#include <algorithm>
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
#include "planes.h"

namespace {

using fixture::Bytes;
using pysnap::Effort;
using pysnap::Element;
using pysnap::element_width;
using pysnap::PlanesDecoder;
using pysnap::PlanesEncoder;
using pysnap::SimdPath;

constexpr Element kElements[] = {Element::kU8,  Element::kI16, Element::kI32, Element::kI64,
                                 Element::kF16, Element::kF32, Element::kF64};
constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kLine = 64;
constexpr std::uint8_t kRaw = 0;
constexpr std::uint8_t kConstant = 1;
constexpr std::uint8_t kZstd = 2;
constexpr std::uint8_t kHuffman = 3;
constexpr std::uint8_t kSevenBits = 4;

bool is_float(Element element) {
  return element == Element::kF16 || element == Element::kF32 || element == Element::kF64;
}

// Plane p of one element, straight from the specification.
std::uint8_t reference_plane_byte(Element element, std::uint64_t v, std::size_t p) {
  const std::size_t width = element_width(element);
  if (is_float(element) && p == 0) return static_cast<std::uint8_t>(v >> (8 * width - 9) & 255);
  if (is_float(element) && p == 1) {
    return static_cast<std::uint8_t>(v >> (8 * width - 1) << 7 | (v >> (8 * width - 16) & 127));
  }
  return static_cast<std::uint8_t>(v >> 8 * (width - 1 - p) & 255);
}

std::vector<Bytes> reference_planes(Element element, const Bytes& raw) {
  const std::size_t width = element_width(element);
  std::vector<Bytes> planes(width);
  for (std::size_t i = 0; i < raw.size(); i += width) {
    std::uint64_t v = 0;
    std::memcpy(&v, raw.data() + i, width);
    for (std::size_t p = 0; p < width; ++p) {
      planes[p].push_back(reference_plane_byte(element, v, p));
    }
  }
  return planes;
}

// Empty where the chunk is not worth encoding. The buffer is exact, so that AddressSanitizer sees a
// write past it.
Bytes encode(PlanesEncoder& encoder, Element element, const Bytes& raw) {
  Bytes out(raw.size());
  out.resize(encoder.encode(element, raw.data(), raw.size(), out.data()));
  return out;
}

Bytes encode(Element element, const Bytes& raw, Effort effort = Effort::kFast) {
  PlanesEncoder encoder(fixture::zstd(), effort);
  return encode(encoder, element, raw);
}

// Nothing where the decoder refuses. Both buffers are exact.
std::optional<Bytes> decode(PlanesDecoder& decoder, Element element, const Bytes& encoded,
                            std::size_t size) {
  const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[encoded.size()]);
  std::copy(encoded.begin(), encoded.end(), exact.get());
  Bytes raw(size, 0xEE);
  if (!decoder.decode(element, exact.get(), encoded.size(), raw.data(), size)) return std::nullopt;
  return raw;
}

std::optional<Bytes> decode(Element element, const Bytes& encoded, std::size_t size) {
  PlanesDecoder decoder(fixture::zstd());
  return decode(decoder, element, encoded, size);
}

bool refuses(Element element, const Bytes& encoded, std::size_t size) {
  return !decode(element, encoded, size).has_value();
}

Bytes little_endian(std::uint32_t value) {
  Bytes bytes(sizeof(value));
  std::memcpy(bytes.data(), &value, sizeof(value));
  return bytes;
}

Bytes joined(const std::vector<Bytes>& parts) {
  Bytes all;
  for (const Bytes& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

Bytes header(std::uint8_t flags, std::uint8_t width, std::uint32_t kept) {
  return joined({{flags, width, 0, 0}, little_endian(kept)});
}

Bytes entry(std::uint8_t method, std::size_t size) {
  return joined({{method, 0, 0, 0}, little_endian(static_cast<std::uint32_t>(size))});
}

Bytes frame(const Bytes& plane) {
  pysnap::ZstdCompressor compressor(fixture::zstd(), pysnap::ZstdRecipe::kMatches);
  Bytes out(plane.size() + 64);
  out.resize(compressor.compress(plane.data(), plane.size(), out.data(), out.size()));
  return out;
}

// `count` lines of which every `stride`-th has bytes, and `tail` bytes behind them.
Bytes sparse_lines(std::size_t count, std::size_t stride, std::size_t tail) {
  Bytes raw(count * kLine + tail);
  for (std::size_t i = 0; i < count; i += stride)
    raw[i * kLine + 5] = static_cast<std::uint8_t>(i | 1);
  std::fill(raw.end() - static_cast<std::ptrdiff_t>(tail), raw.end(), 0x11);
  return raw;
}

// Sizes around the borders of a line, of the smallest map and of a block, cut to whole elements.
std::vector<std::size_t> sizes_around_borders(std::size_t width) {
  std::vector<std::size_t> sizes;
  for (const std::size_t border : {std::size_t{0}, kLine, 128 * kLine, kMiB}) {
    if (border > 0) sizes.push_back(border - width);
    sizes.push_back(border);
    sizes.push_back(border + width);
  }
  return sizes;
}

struct Content {
  const char* name;
  bool for_blocks;  // tried with whole blocks, too
  std::function<Bytes(std::size_t size, std::size_t width)> make;
};

const std::vector<Content>& contents() {
  static const std::vector<Content> all = {
      {"zeros", false, [](std::size_t size, std::size_t) { return Bytes(size, 0); }},
      {"ones", false, [](std::size_t size, std::size_t) { return Bytes(size, 0xFF); }},
      {"skewed", true,
       [](std::size_t size, std::size_t width) {
         return fixture::skewed_elements(size, width, 7);
       }},
      {"random", false,
       [](std::size_t size, std::size_t) { return fixture::random_bytes(size, 7); }},
      {"counting", false,
       [](std::size_t size, std::size_t width) {
         Bytes raw(size);
         for (std::uint64_t i = 0; i < size / width; ++i) std::memcpy(&raw[i * width], &i, width);
         return raw;
       }},
      // Elements with planes of seven bits, and few values that are too rare for a sample.
      {"rare", true,
       [](std::size_t size, std::size_t width) {
         Bytes raw = fixture::random_bytes(size, 9);
         for (std::size_t i = 0; i < size; ++i) {
           raw[i] &= 0x7F;
           if (i % width % 2 == 0) raw[i] = i % 4099 == 0 ? raw[i] : raw[i] & 15;
         }
         return raw;
       }},
      {"sparse", true,
       [](std::size_t size, std::size_t) { return sparse_lines(size / kLine, 3, size % kLine); }},
  };
  return all;
}

// An encoding with a map, and planes of four methods.
struct Sample {
  Element element = Element::kF32;
  Bytes raw;
  Bytes encoded;
};

Sample small_sample() {
  Sample sample;
  sample.raw = Bytes(160 * kLine + 8);
  fixture::Random random(3);
  for (std::size_t i = 0; i < sample.raw.size(); i += 4) {
    if (i / kLine % 4 == 1) continue;
    const std::uint64_t word = random.next();
    sample.raw[i] = static_cast<std::uint8_t>(word >> 56);
    sample.raw[i + 1] = static_cast<std::uint8_t>(word >> 40 & 0x7F);
    sample.raw[i + 2] = 0x80;
    sample.raw[i + 3] = static_cast<std::uint8_t>(0x3C + (word >> 32 & 1));
  }
  sample.encoded = encode(sample.element, sample.raw);
  return sample;
}

}  // namespace

TEST(elements_have_the_widths_of_the_format) {
  const std::size_t widths[] = {1, 2, 4, 8, 2, 4, 8};
  for (std::size_t i = 0; i < pysnap::kElementCount; ++i) {
    CHECK_EQ(element_width(kElements[i]), widths[i]);
    CHECK_EQ(static_cast<std::size_t>(kElements[i]), i);
  }
}

TEST(planes_equal_the_reference_on_every_path) {
  for (const Element element : kElements) {
    const std::size_t width = element_width(element);
    for (const std::size_t count :
         {0U, 1U, 2U, 3U, 15U, 16U, 17U, 31U, 63U, 64U, 65U, 127U, 128U, 1000U, 9000U}) {
      const Bytes raw = fixture::random_bytes(count * width, count);
      const std::vector<Bytes> expected = reference_planes(element, raw);
      for (const SimdPath path : pysnap::supported_simd_paths()) {
        const std::size_t stride = count + 3;
        Bytes planes(width * stride, 0xEE);
        pysnap::split_planes(element, raw.data(), count, {0, width}, planes.data(), stride, path);
        std::vector<const std::uint8_t*> pointers;
        for (std::size_t p = 0; p < width; ++p) {
          const std::uint8_t* plane = planes.data() + p * stride;
          CHECK(std::equal(expected[p].begin(), expected[p].end(), plane));
          CHECK_EQ(std::count(plane + count, plane + stride, 0xEE), 3);
          pointers.push_back(plane);
        }
        Bytes merged(raw.size());
        pysnap::merge_planes(element, pointers.data(), count, merged.data(), path);
        CHECK(merged == raw);
        for (std::size_t first = 0; first < width; ++first) {
          for (std::size_t last = first + 1; last <= width; ++last) {
            Bytes some((last - first) * stride, 0xEE);
            pysnap::split_planes(element, raw.data(), count, {first, last}, some.data(), stride,
                                 path);
            CHECK(std::equal(some.begin(), some.end(), planes.begin() + first * stride));
          }
        }
      }
    }
  }
}

TEST(what_is_decoded_is_what_was_encoded) {
  PlanesEncoder fast(fixture::zstd());
  PlanesEncoder small(fixture::zstd(), Effort::kSmall);
  PlanesEncoder without_zstd(nullptr);
  PlanesDecoder decoder(fixture::zstd());
  for (const Element element : kElements) {
    for (const std::size_t size : sizes_around_borders(element_width(element))) {
      for (const Content& content : contents()) {
        if (size > kMiB / 2 && !content.for_blocks) continue;
        const Bytes raw = content.make(size, element_width(element));
        std::size_t fast_size = size;
        for (PlanesEncoder* encoder : {&fast, &small, &without_zstd}) {
          if (encoder == &small && size > kMiB / 2 && element_width(element) != 2) continue;
          const Bytes encoded = encode(*encoder, element, raw);
          if (encoder == &fast && !encoded.empty()) fast_size = encoded.size();
          if (encoder == &small && !encoded.empty()) CHECK(encoded.size() <= fast_size);
          if (encoded.empty()) continue;
          const std::string name = content.name + std::string(" of ") + std::to_string(size);
          CHECK(encoded.size() < size);
          CHECK_EQ(decode(decoder, element, encoded, size) == raw ? name : "not " + name, name);
        }
      }
    }
  }
}

TEST(a_chunk_of_several_blocks_comes_back) {
  PlanesEncoder encoder(fixture::zstd());
  PlanesDecoder decoder(fixture::zstd());
  for (const Element element : kElements) {
    const std::size_t size = element == Element::kF32 ? 4 * kMiB : kMiB * 3 / 2 + 8;
    Bytes raw = fixture::skewed_elements(size, element_width(element), 1);
    std::fill_n(raw.begin() + kMiB, kMiB / 4, 0);
    const Bytes encoded = encode(encoder, element, raw);
    CHECK(!encoded.empty());
    CHECK(decode(decoder, element, encoded, size) == raw);
  }
}

TEST(what_has_structure_becomes_smaller) {
  for (const Element element : kElements) {
    const std::size_t width = element_width(element);
    for (const Content& content : contents()) {
      const std::string name = content.name;
      // Counting is seen by the planes of integers alone: a byte of it looks random to the sample.
      if (name == "random" || (name == "counting" && (width == 1 || is_float(element)))) continue;
      CHECK(!encode(element, content.make(kMiB / 8, width)).empty());
    }
  }
}

TEST(random_bytes_are_not_worth_encoding) {
  for (const Element element : kElements) {
    for (const std::size_t size : {8U, 64U, 8192U, 8200U, 70000U}) {
      CHECK(encode(element, fixture::random_bytes(size, size)).empty());
      CHECK(encode(element, fixture::random_bytes(size, size), Effort::kSmall).empty());
    }
  }
}

TEST(a_chunk_that_begins_with_noise_is_encoded_all_the_same) {
  for (const std::size_t noisy : {1U, 3U}) {
    Bytes raw = fixture::skewed_elements(4 * kMiB, 4, 1);
    const Bytes noise = fixture::random_bytes(noisy * kMiB, 1);
    std::copy(noise.begin(), noise.end(), raw.begin());
    const Bytes encoded = encode(Element::kF32, raw);
    CHECK(!encoded.empty());
    CHECK(decode(Element::kF32, encoded, raw.size()) == raw);
  }
}

TEST(weights_are_coded_without_zstd) {
  const Bytes raw = fixture::skewed_elements(kMiB, 2, 1);
  PlanesEncoder encoder(nullptr);
  PlanesDecoder decoder(nullptr);
  const Bytes encoded = encode(encoder, Element::kF16, raw);
  CHECK(!encoded.empty() && encoded == encode(Element::kF16, raw));
  CHECK(decode(decoder, Element::kF16, encoded, raw.size()) == raw);
}

// Bits of a NaN are bits.
TEST(special_floats_keep_their_bits) {
  for (const Element element : {Element::kF16, Element::kF32, Element::kF64}) {
    const std::size_t width = element_width(element);
    Bytes raw(width * 20000);
    fixture::Random random(1);
    for (std::size_t i = 0; i < raw.size(); i += width) {
      std::uint64_t bits = random.next() % 7 * 0x1111111111111111U;  // NaNs, tiny and usual ones
      if (i % 3 == 0) bits |= std::uint64_t{0x7FF} << (8 * width - 12);
      std::memcpy(&raw[i], &bits, width);
    }
    const Bytes encoded = encode(element, raw);
    CHECK(!encoded.empty());
    CHECK(decode(element, encoded, raw.size()) == raw);
  }
}

TEST(what_headers_would_make_longer_is_not_worth_encoding) {
  CHECK(encode(Element::kU8, {}).empty());
  CHECK(encode(Element::kU8, Bytes(17, 0)).empty());
  CHECK_EQ(encode(Element::kU8, Bytes(18, 0)).size(), 17);
}

TEST(a_block_is_encoded_as_the_format_says) {
  Bytes raw;
  Bytes low_bytes;
  for (unsigned i = 0; i < 256; ++i) {
    low_bytes.push_back(static_cast<std::uint8_t>(i * 37));
    raw.insert(raw.end(), {low_bytes.back(), 3, 2, 1});
  }
  const Bytes encoded = joined({header(0, 4, 1024),
                                entry(kConstant, 1),
                                entry(kConstant, 1),
                                entry(kConstant, 1),
                                entry(kRaw, 256),
                                {1, 2, 3},
                                low_bytes});
  CHECK(encode(Element::kI32, raw) == encoded);
  CHECK(decode(Element::kI32, encoded, raw.size()) == raw);
}

TEST(zero_lines_are_left_out_as_the_format_says) {
  Bytes raw(130 * kLine + 3);
  std::fill_n(raw.begin() + 9 * kLine, kLine, 5);
  std::fill_n(raw.begin() + 129 * kLine, kLine, 5);
  std::fill(raw.end() - 3, raw.end(), 5);
  Bytes map(17);
  map[1] = 1 << 1;
  map[16] = 1 << 1;
  const Bytes encoded = joined({header(1, 1, 2 * kLine + 3), map, entry(kConstant, 1), {5}});
  CHECK(encode(Element::kU8, raw) == encoded);
  CHECK(decode(Element::kU8, encoded, raw.size()) == raw);
}

TEST(a_block_of_zero_lines_keeps_nothing) {
  const Bytes raw(256 * kLine);
  const Bytes encoded = joined({header(1, 2, 0), Bytes(32), entry(kRaw, 0), entry(kRaw, 0)});
  CHECK(encode(Element::kF16, raw) == encoded);
  CHECK(decode(Element::kF16, encoded, raw.size()) == raw);
}

TEST(the_sample_holds_the_methods_of_floats) {
  const Sample sample = small_sample();
  CHECK_EQ(sample.encoded[0], 1);
  const std::uint8_t* entries = sample.encoded.data() + 8 + 20;
  CHECK_EQ(entries[0], kHuffman);
  CHECK_EQ(entries[8], kConstant);
  CHECK_EQ(entries[16], kSevenBits);
  CHECK_EQ(entries[24], kRaw);
  CHECK(decode(sample.element, sample.encoded, sample.raw.size()) == sample.raw);
}

TEST(every_truncation_is_refused) {
  const Sample sample = small_sample();
  PlanesDecoder decoder(fixture::zstd());
  Bytes encoded = sample.encoded;
  while (!encoded.empty()) {
    encoded.pop_back();
    CHECK(!decode(decoder, sample.element, encoded, sample.raw.size()).has_value());
  }
}

TEST(every_changed_byte_is_survived) {
  const Sample sample = small_sample();
  PlanesDecoder decoder(fixture::zstd());
  Bytes encoded = sample.encoded;
  const auto is_refused_with = [&](std::size_t at, std::uint8_t change) {
    encoded[at] ^= change;
    const bool refused = !decode(decoder, sample.element, encoded, sample.raw.size()).has_value();
    encoded[at] ^= change;
    return refused;
  };
  // The header, the map and the entries leave no bit free.
  constexpr std::size_t kFixed = 8 + 20 + 4 * 8;
  for (std::size_t bit = 0; bit < 8 * kFixed; ++bit) {
    CHECK(is_refused_with(bit / 8, static_cast<std::uint8_t>(1 << bit % 8)));
  }
  for (std::size_t at = kFixed; at < encoded.size(); ++at) {
    is_refused_with(at, static_cast<std::uint8_t>(1 << at % 8));
    is_refused_with(at, 0xFF);
  }
}

TEST(other_lengths_and_elements_are_refused) {
  const Sample sample = small_sample();
  for (const std::size_t size : {sample.raw.size() - 4, sample.raw.size() + 4, std::size_t{4}, kMiB,
                                 kMiB + sample.raw.size(), sample.raw.size() - 1}) {
    CHECK(refuses(sample.element, sample.encoded, size));
  }
  CHECK(refuses(sample.element, sample.encoded, 0));
  CHECK(refuses(Element::kF16, sample.encoded, sample.raw.size()));
  CHECK(refuses(Element::kF64, sample.encoded, sample.raw.size()));
  CHECK(refuses(Element::kU8, sample.encoded, sample.raw.size()));
}

TEST(bytes_behind_the_last_block_are_refused) {
  const Sample sample = small_sample();
  CHECK(refuses(sample.element, joined({sample.encoded, {0}}), sample.raw.size()));
  CHECK(refuses(sample.element, joined({sample.encoded, sample.encoded}), sample.raw.size()));
}

TEST(headers_that_lie_are_refused) {
  const Bytes rest = joined({entry(kConstant, 1), {7}});
  CHECK(decode(Element::kU8, joined({header(0, 1, 100), rest}), 100) == Bytes(100, 7));
  CHECK(refuses(Element::kU8, joined({header(0, 1, 99), rest}), 100));
  CHECK(refuses(Element::kU8, joined({header(0, 1, 0xFFFFFFFF), rest}), 100));
  CHECK(refuses(Element::kU8, joined({header(2, 1, 100), rest}), 100));
  CHECK(refuses(Element::kU8, joined({header(0, 2, 100), rest}), 100));
  CHECK(refuses(Element::kU8, joined({header(0, 0, 100), rest}), 100));
  for (const std::size_t reserved : {2U, 3U}) {
    Bytes encoded = joined({header(0, 1, 100), rest});
    encoded[reserved] = 1;
    CHECK(refuses(Element::kU8, encoded, 100));
  }
}

TEST(a_length_that_is_no_number_of_elements_is_refused) {
  const auto constants = [](std::uint32_t kept) {
    return joined({header(0, 2, kept), entry(kConstant, 1), entry(kConstant, 1), {7, 7}});
  };
  CHECK(decode(Element::kI16, constants(6), 6) == Bytes(6, 7));
  CHECK(refuses(Element::kI16, constants(7), 7));
}

TEST(maps_that_lie_are_refused) {
  const Bytes rest = joined({entry(kConstant, 1), {7}});
  const std::size_t size = 3 * kLine;
  const auto encoded = [&](std::uint8_t map, std::size_t kept) {
    return joined({header(1, 1, static_cast<std::uint32_t>(kept)), {map}, rest});
  };
  const std::optional<Bytes> raw = decode(Element::kU8, encoded(0b101, 2 * kLine), size);
  CHECK(raw == joined({Bytes(kLine, 7), Bytes(kLine, 0), Bytes(kLine, 7)}));
  CHECK(refuses(Element::kU8, encoded(0b101, kLine), size));
  CHECK(refuses(Element::kU8, encoded(0b101, 3 * kLine), size));
  CHECK(refuses(Element::kU8, encoded(0b1101, 2 * kLine), size));
  CHECK(refuses(Element::kU8, encoded(0b1101, 3 * kLine), size));
  CHECK(refuses(Element::kU8, encoded(0b10000101, 2 * kLine), size));
}

TEST(a_map_may_keep_every_line_and_a_block_may_have_none) {
  const Bytes rest = joined({entry(kConstant, 1), {7}});
  CHECK(decode(Element::kU8, joined({header(1, 1, 128), {0b11}, rest}), 128) == Bytes(128, 7));
  CHECK(decode(Element::kU8, joined({header(1, 1, 63), rest}), 63) == Bytes(63, 7));
}

TEST(planes_that_lie_are_refused) {
  const Bytes plane = fixture::skewed_elements(200, 2, 1);
  const auto encoded = [&](const Bytes& head, const Bytes& payload) {
    return joined({header(0, 1, 200), head, payload});
  };
  const auto with_method = [&](std::uint8_t method, const Bytes& payload) {
    return encoded(entry(method, payload.size()), payload);
  };
  CHECK(decode(Element::kU8, with_method(kRaw, plane), 200) == plane);
  CHECK(refuses(Element::kU8, with_method(kRaw, Bytes(199)), 200));
  CHECK(refuses(Element::kU8, with_method(kRaw, Bytes(201)), 200));
  CHECK(refuses(Element::kU8, with_method(kConstant, {}), 200));
  CHECK(refuses(Element::kU8, with_method(kConstant, {1, 1}), 200));
  for (const std::uint8_t method : {5, 6, 128, 255}) {
    CHECK(refuses(Element::kU8, with_method(method, plane), 200));
    CHECK(refuses(Element::kU8, with_method(method, {1}), 200));
  }
  for (const std::size_t reserved : {1U, 2U, 3U}) {
    Bytes head = entry(kRaw, plane.size());
    head[reserved] = 1;
    CHECK(refuses(Element::kU8, encoded(head, plane), 200));
  }
  for (const std::uint32_t size : {0U, 199U, 201U, 0x7FFFFFFFU, 0xFFFFFFFFU}) {
    for (const std::uint8_t method : {kRaw, kZstd, kHuffman, kSevenBits})
      CHECK(refuses(Element::kU8, encoded(entry(method, size), plane), 200));
  }
}

TEST(seven_bits_that_lie_are_refused) {
  const auto encoded = [&](const Bytes& payload, std::uint32_t count) {
    return joined({header(0, 1, count), entry(kSevenBits, payload.size()), payload});
  };
  // 1, 2, ... 16 by hand: the first bit of a byte is its lowest.
  Bytes numbers(16);
  Bytes payload(14);
  for (std::size_t i = 0; i < 16; ++i) {
    numbers[i] = static_cast<std::uint8_t>(i + 1);
    for (std::size_t bit = 0; bit < 7; ++bit) {
      const std::size_t at = 7 * i + bit;
      payload[at / 8] =
          static_cast<std::uint8_t>(payload[at / 8] | (numbers[i] >> bit & 1) << at % 8);
    }
  }
  CHECK(decode(Element::kU8, encoded(payload, 16), 16) == numbers);
  CHECK(refuses(Element::kU8, encoded(joined({payload, {0}}), 16), 16));
  CHECK(refuses(Element::kU8, encoded(payload, 15), 15));
  for (std::uint32_t count = 1; count <= 40; ++count) {
    Bytes last((7 * count + 7) / 8);
    CHECK(decode(Element::kU8, encoded(last, count), count) == Bytes(count, 0));
    last.back() = 0x80;
    CHECK_EQ(refuses(Element::kU8, encoded(last, count), count), count % 8 != 0);
  }
}

TEST(frames_that_lie_are_refused) {
  const Bytes plane = fixture::skewed_elements(200, 2, 1);
  const auto encoded = [&](const Bytes& payload) {
    return joined({header(0, 1, 200), entry(kZstd, payload.size()), payload});
  };
  CHECK(decode(Element::kU8, encoded(frame(plane)), 200) == plane);
  CHECK(refuses(Element::kU8, encoded(frame(Bytes(199, 3))), 200));
  CHECK(refuses(Element::kU8, encoded(frame(Bytes(201, 3))), 200));
  CHECK(refuses(Element::kU8, encoded(frame(Bytes(2 * kMiB, 3))), 200));
  CHECK(refuses(Element::kU8, encoded({}), 200));
  CHECK(refuses(Element::kU8, encoded(plane), 200));
  const Bytes front(plane.begin(), plane.begin() + 150);
  const Bytes back(plane.begin() + 150, plane.end());
  CHECK(refuses(Element::kU8, encoded(joined({frame(front), frame(back)})), 200));
  const Bytes skippable = joined({{0x50, 0x2A, 0x4D, 0x18}, little_endian(1), {9}});
  CHECK(refuses(Element::kU8, encoded(joined({skippable, frame(plane)})), 200));
  CHECK(refuses(Element::kU8, encoded(joined({frame(plane), skippable})), 200));
}

// The scratch memory of the decoder is one block: a frame must not grow past it.
TEST(a_frame_that_is_longer_than_a_block_is_refused) {
  const Bytes payload = frame(Bytes(2 * kMiB, 3));
  CHECK(refuses(Element::kU8, joined({header(0, 1, kMiB), entry(kZstd, payload.size()), payload}),
                kMiB));
}

TEST(without_zstd_only_what_needs_it_is_an_error) {
  PlanesDecoder decoder(nullptr);
  const Bytes constant = joined({header(0, 1, 100), entry(kConstant, 1), {7}});
  CHECK(decode(decoder, Element::kU8, constant, 100) == Bytes(100, 7));
  const Bytes plane = fixture::skewed_elements(200, 2, 1);
  const Bytes with_frame =
      joined({header(0, 1, 200), entry(kZstd, frame(plane).size()), frame(plane)});
  CHECK_EQ(fixture::thrown_by([&] { decode(decoder, Element::kU8, with_frame, 200); }), "invalid");
}

TEST(a_library_that_is_not_there_is_not_opened) {
  CHECK(pysnap::Zstd::open({}) == nullptr);
  CHECK(pysnap::Zstd::open({"libpysnap-none.so", "libm.so.6"}) == nullptr);
  const std::shared_ptr<const pysnap::Zstd> second =
      pysnap::Zstd::open({"libpysnap-none.so", "libzstd.so.1"});
  CHECK(second != nullptr && second->name() == "libzstd.so.1");
}
