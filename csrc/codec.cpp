#include "codec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "error.h"
#include "planes.h"
#include "seven_bits.h"

namespace pysnap {

namespace {

constexpr std::size_t kBlock = std::size_t{1} << 20;
constexpr std::size_t kLine = 64;
constexpr std::size_t kHeader = 8;
constexpr std::size_t kEntry = 8;
constexpr std::uint8_t kFlagMap = 1;
constexpr std::uint8_t kMethodRaw = 0;
constexpr std::uint8_t kMethodConstant = 1;
constexpr std::uint8_t kMethodZstd = 2;
constexpr std::uint8_t kMethodHuffman = 3;
constexpr std::uint8_t kMethodSevenBits = 4;

// Thresholds found by measurement on weights and Adam states; they change sizes and speed, never
// what a reader sees.
constexpr std::size_t kSampledLines = 128;
constexpr std::size_t kZeroLinesWorthMap = 13;
constexpr std::size_t kSampleRuns = 16;
constexpr std::size_t kSampleRunLength = 64;
constexpr std::size_t kSampled = kSampleRuns * kSampleRunLength;
constexpr double kEntropyWorthCoding = 7.5;
// Above it, matches are rare even in integers.
constexpr double kEntropyWithoutMatches = 6;
// Above it, a code saves little over seven bits, and takes longer.
constexpr double kEntropyOfSevenBits = 6.3;

bool is_float(Element element) { return element >= Element::kF16; }

bool is_zero_line(const std::uint8_t* line) {
  std::uint64_t any = 0;
  for (std::size_t i = 0; i < kLine; i += sizeof(any)) {
    std::uint64_t word;
    std::memcpy(&word, line + i, sizeof(word));
    any |= word;
  }
  return any == 0;
}

bool many_zero_lines(const std::uint8_t* raw, std::size_t lines) {
  if (lines < kSampledLines) return false;
  std::size_t zero = 0;
  for (std::size_t i = 0; i < kSampledLines; ++i)
    zero += is_zero_line(raw + i * lines / kSampledLines * kLine);
  return zero >= kZeroLinesWorthMap;
}

bool is_constant(const std::uint8_t* plane, std::size_t size) {
  return std::memcmp(plane, plane + 1, size - 1) == 0;
}

// Bits per byte, from a sample, with the Miller-Madow correction for its smallness.
double estimate_entropy(const std::uint8_t* sample, std::size_t size) {
  static const std::array<double, kSampled + 1> kCountTimesLog = [] {
    std::array<double, kSampled + 1> table{};
    for (std::size_t i = 1; i < table.size(); ++i)
      table[i] = static_cast<double>(i) * std::log2(static_cast<double>(i));
    return table;
  }();
  // Two, for a byte that follows itself would wait for the count of the one before.
  std::array<std::array<unsigned, 256>, 2> counts{};
  for (std::size_t i = 0; i < size; ++i) ++counts[i % 2][sample[i]];
  double sum = 0;
  unsigned symbols = 0;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    const unsigned count = counts[0][byte] + counts[1][byte];
    sum += kCountTimesLog[count];
    symbols += count > 0;
  }
  const double total = static_cast<double>(size);
  return (kCountTimesLog[size] - sum) / total + (symbols - 1) / (2 * total * std::log(2.0));
}

void put_u32(std::uint8_t* to, std::size_t value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value);
  std::memcpy(to, &word, sizeof(word));
}

std::uint32_t get_u32(const std::uint8_t* from) {
  std::uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

}  // namespace

std::size_t element_width(Element element) {
  constexpr std::array<std::size_t, kElementCount> kWidths = {1, 2, 4, 8, 2, 4, 8};
  return kWidths[static_cast<std::size_t>(element)];
}

// The output buffer and how much of it is used; a chunk that outgrows it is not worth encoding.
class PlanesEncoder::Output {
 public:
  Output(std::uint8_t* data, std::size_t capacity) : data_(data), capacity_(capacity) {}

  // Zeroed room for `size` bytes; null where there is none.
  std::uint8_t* take(std::size_t size) {
    if (size > capacity_ - used_) return nullptr;
    std::uint8_t* start = data_ + used_;
    std::memset(start, 0, size);
    used_ += size;
    return start;
  }
  bool append(const std::uint8_t* bytes, std::size_t size) {
    if (size > capacity_ - used_) return false;
    std::memcpy(data_ + used_, bytes, size);
    used_ += size;
    return true;
  }
  std::uint8_t* next() { return data_ + used_; }
  std::size_t left() const { return capacity_ - used_; }
  void advance(std::size_t size) { used_ += size; }
  std::size_t used() const { return used_; }
  std::uint8_t* at(std::size_t offset) { return data_ + offset; }

 private:
  std::uint8_t* data_;
  std::size_t capacity_;
  std::size_t used_ = 0;
};

PlanesEncoder::PlanesEncoder(std::shared_ptr<const Zstd> zstd, Effort effort)
    : effort_(effort), kept_(kBlock), plane_(kBlock) {
  if (effort == Effort::kSmall) trial_.resize(kBlock);
  if (zstd == nullptr) return;
  if (effort == Effort::kSmall) {
    entropy_.emplace(zstd, ZstdRecipe::kEntropy);
    thorough_.emplace(zstd, ZstdRecipe::kThorough);
  } else {
    matches_.emplace(zstd, ZstdRecipe::kMatches);
  }
}

std::size_t PlanesEncoder::encode(Element element, const std::uint8_t* raw, std::size_t size,
                                  std::uint8_t* out) {
  if (size == 0) return 0;
  const std::size_t width = element_width(element);
  const auto block_at = [&](std::size_t at) {
    const std::size_t here = std::min(kBlock, size - at);
    const Upcoming next{raw + at + here, std::min(kBlock, size - at - here)};
    return Block{element, raw + at, here / width, next};
  };
  const Outlook first = look_at(block_at(0));
  // Most chunks are of one kind: if nothing is to be gained at the start, noise is left at once.
  bool is_worth = first.is_good();
  for (std::size_t at = kBlock; at < size && !is_worth; at += kBlock)
    is_worth = look_at(block_at(at)).is_good();
  if (!is_worth) return 0;
  Output output(out, size - 1);
  for (std::size_t at = 0; at < size; at += kBlock) {
    const Block block = block_at(at);
    if (!encode_block(block, at == 0 ? first : look_at(block), output)) return 0;
  }
  return output.used();
}

bool PlanesEncoder::Outlook::is_good() const {
  return with_map || std::any_of(methods.begin(), methods.end(),
                                 [](std::uint8_t method) { return method != kMethodRaw; });
}

PlanesEncoder::Outlook PlanesEncoder::look_at(const Block& block) const {
  const std::size_t size = block.count * element_width(block.element);
  if (many_zero_lines(block.raw, size / kLine)) return {true, {}};
  return {false, choose(block)};
}

// The methods that are tried for the planes of a block, from the same sampled elements of each.
PlanesEncoder::Methods PlanesEncoder::choose(const Block& block) const {
  const std::size_t width = element_width(block.element);
  std::array<std::uint8_t, 8 * kSampled> samples;
  const std::size_t run = std::min(kSampleRunLength, block.count);
  for (std::size_t r = 0; r < kSampleRuns; ++r) {
    const std::size_t start = (block.count - run) * r / (kSampleRuns - 1);
    split_planes(block.element, block.raw + start * width, run, {0, width},
                 samples.data() + r * run, kSampled);
  }
  Methods methods{};
  for (std::size_t p = 0; p < width; ++p)
    methods[p] = choose(block.element, samples.data() + p * kSampled, kSampleRuns * run);
  return methods;
}

bool PlanesEncoder::encode_block(Block block, const Outlook& outlook, Output& out) {
  const std::size_t width = element_width(block.element);
  const std::size_t size = block.count * width;
  const std::size_t lines = size / kLine;
  std::uint8_t* header = out.take(kHeader);
  if (header == nullptr) return false;
  std::size_t kept = size;
  if (outlook.with_map) {
    std::uint8_t* map = out.take((lines + 7) / 8);
    if (map == nullptr) return false;
    kept = 0;
    for (std::size_t i = 0; i < lines; ++i) {
      if (is_zero_line(block.raw + i * kLine)) continue;
      map[i / 8] = static_cast<std::uint8_t>(map[i / 8] | 1u << i % 8);
      std::memcpy(kept_.data() + kept, block.raw + i * kLine, kLine);
      kept += kLine;
    }
    const std::size_t tail = size - lines * kLine;
    std::memcpy(kept_.data() + kept, block.raw + lines * kLine, tail);
    kept += tail;
    block = {block.element, kept_.data(), kept / width, block.next};
  }
  header[0] = outlook.with_map ? kFlagMap : 0;
  header[1] = static_cast<std::uint8_t>(width);
  put_u32(header + 4, kept);
  const std::size_t entries = out.used();
  if (out.take(kEntry * width) == nullptr) return false;
  const Methods methods = outlook.with_map ? choose(block) : outlook.methods;
  for (std::size_t p = 0; p < width;) {
    if (methods[p] != kMethodRaw) {
      if (!encode_plane(block, p, methods[p], out, entries + p * kEntry)) return false;
      ++p;
      continue;
    }
    // Raw planes in a row go to where they stay, all at once.
    std::size_t last = p + 1;
    while (last < width && methods[last] == kMethodRaw) ++last;
    const std::size_t room = (last - p) * block.count;
    if (room > out.left()) return false;
    split_planes(block.element, block.raw, block.count, {p, last}, out.next(), block.count);
    out.advance(room);
    for (; p < last; ++p) {
      out.at(entries + p * kEntry)[0] = kMethodRaw;
      put_u32(out.at(entries + p * kEntry) + 4, block.count);
    }
  }
  return true;
}

// The method that is tried for a plane, from a sample of it.
std::uint8_t PlanesEncoder::choose(Element element, const std::uint8_t* sample,
                                   std::size_t size) const {
  if (size == 0) return kMethodRaw;
  if (is_constant(sample, size)) return kMethodConstant;
  const double entropy = estimate_entropy(sample, size);
  const bool is_wide = entropy >= kEntropyWorthCoding;
  // Integers that count look like noise to the sample.
  if (is_wide && (effort_ == Effort::kFast || is_float(element))) return kMethodRaw;
  if (entropy > kEntropyOfSevenBits &&
      std::all_of(sample, sample + size, [](std::uint8_t byte) { return byte < 0x80; }))
    return kMethodSevenBits;
  const bool has_matches = !is_float(element) && entropy < kEntropyWithoutMatches;
  return has_matches && matches_ ? kMethodZstd : kMethodHuffman;
}

bool PlanesEncoder::encode_plane(const Block& block, std::size_t p, std::uint8_t method,
                                 Output& out, std::size_t entry) {
  const std::size_t start = out.used();
  split_planes(block.element, block.raw, block.count, {p, p + 1}, plane_.data(), block.count);
  method = encode_plane(method, plane_.data(), block.count, block.next, out);
  if (method == kMethodRaw && !out.append(plane_.data(), block.count)) return false;
  out.at(entry)[0] = method;
  put_u32(out.at(entry) + 4, out.used() - start);
  return true;
}

// Returns the method that was used; nothing is written where that is raw.
std::uint8_t PlanesEncoder::encode_plane(std::uint8_t method, const std::uint8_t* plane,
                                         std::size_t size, Upcoming upcoming, Output& out) {
  if (method == kMethodConstant) {
    if (is_constant(plane, size)) return out.append(plane, 1) ? kMethodConstant : kMethodRaw;
    // It is nearly constant: repeats are longer than one bit each can tell.
    method = matches_ ? kMethodZstd : kMethodHuffman;
  }
  if (effort_ == Effort::kSmall) return encode_smallest(plane, size, out);
  const std::size_t room = std::min(out.left(), size - 1);
  std::size_t written = 0;
  if (method == kMethodSevenBits) {
    written = seven_bits_size(size);
    if (written <= room && pack_seven_bits(plane, size, out.next())) {
      out.advance(written);
      return method;
    }
    method = kMethodHuffman;
  }
  written = method == kMethodZstd
                ? matches_->compress(plane, size, out.next(), room)
                : huffman_.encode(plane, size, out.next(), room, best_simd_path(), upcoming);
  out.advance(written);
  return written > 0 ? method : kMethodRaw;
}

std::uint8_t PlanesEncoder::encode_smallest(const std::uint8_t* plane, std::size_t size,
                                            Output& out) {
  std::uint8_t best = kMethodRaw;
  std::size_t smallest = std::min(out.left() + 1, size);
  const auto keep = [&](std::uint8_t method, std::size_t written) {
    if (written == 0 || written >= smallest) return;
    best = method;
    smallest = written;
    std::memcpy(out.next(), trial_.data(), written);
  };
  keep(kMethodHuffman, huffman_.encode(plane, size, trial_.data(), size - 1));
  if (size >= 2 && pack_seven_bits(plane, size, trial_.data()))
    keep(kMethodSevenBits, seven_bits_size(size));
  for (std::optional<ZstdCompressor>* zstd : {&entropy_, &thorough_}) {
    if (*zstd) keep(kMethodZstd, (*zstd)->compress(plane, size, trial_.data(), size - 1));
  }
  if (best != kMethodRaw) out.advance(smallest);
  return best;
}

// The encoded bytes that are left.
class PlanesDecoder::Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : next_(data), left_(size) {}

  // The next `size` bytes; null where there are not that many.
  const std::uint8_t* take(std::size_t size) {
    if (size > left_) return nullptr;
    const std::uint8_t* start = next_;
    next_ += size;
    left_ -= size;
    return start;
  }
  std::size_t left() const { return left_; }

 private:
  const std::uint8_t* next_;
  std::size_t left_;
};

PlanesDecoder::PlanesDecoder(std::shared_ptr<const Zstd> zstd) : kept_(kBlock), planes_(kBlock) {
  if (zstd != nullptr) zstd_.emplace(std::move(zstd));
}

bool PlanesDecoder::decode(Element element, const std::uint8_t* encoded, std::size_t stored,
                           std::uint8_t* raw, std::size_t size) {
  if (size % element_width(element) != 0) return false;
  Input input(encoded, stored);
  for (std::size_t done = 0; done < size; done += kBlock) {
    if (!decode_block(element, input, raw + done, std::min(kBlock, size - done))) return false;
  }
  return input.left() == 0;
}

bool PlanesDecoder::decode_block(Element element, Input& in, std::uint8_t* raw, std::size_t size) {
  const std::size_t width = element_width(element);
  const std::uint8_t* header = in.take(kHeader);
  if (header == nullptr || header[0] > kFlagMap || header[1] != width || header[2] != 0 ||
      header[3] != 0)
    return false;
  const bool with_map = header[0] == kFlagMap;
  const std::size_t kept = get_u32(header + 4);
  const std::size_t lines = size / kLine;
  const std::size_t map_size = (lines + 7) / 8;
  const std::uint8_t* map = nullptr;
  std::size_t expected = size;
  if (with_map) {
    map = in.take(map_size);
    if (map == nullptr) return false;
    expected = size - lines * kLine;
    for (std::size_t i = 0; i < lines; ++i) expected += (map[i / 8] >> i % 8 & 1) * kLine;
    if (lines % 8 != 0 && map[map_size - 1] >> lines % 8 != 0) return false;
  }
  if (kept != expected) return false;

  const std::uint8_t* entries = in.take(kEntry * width);
  if (entries == nullptr) return false;
  const std::size_t count = kept / width;
  std::array<const std::uint8_t*, 8> planes{};
  for (std::size_t p = 0; p < width; ++p) {
    const std::uint8_t* entry = entries + p * kEntry;
    const std::size_t payload_size = get_u32(entry + 4);
    const std::uint8_t* payload = in.take(payload_size);
    if (payload == nullptr || entry[1] != 0 || entry[2] != 0 || entry[3] != 0) return false;
    planes[p] = decode_plane(entry[0], payload, payload_size, planes_.data() + p * count, count);
    if (planes[p] == nullptr) return false;
  }
  if (!with_map) {
    merge_planes(element, planes.data(), count, raw);
    return true;
  }
  merge_planes(element, planes.data(), count, kept_.data());
  const std::uint8_t* next = kept_.data();
  for (std::size_t i = 0; i < lines; ++i) {
    if (map[i / 8] >> i % 8 & 1) {
      std::memcpy(raw + i * kLine, next, kLine);
      next += kLine;
    } else {
      std::memset(raw + i * kLine, 0, kLine);
    }
  }
  std::memcpy(raw + lines * kLine, next, size - lines * kLine);
  return true;
}

const std::uint8_t* PlanesDecoder::decode_plane(std::uint8_t method, const std::uint8_t* payload,
                                                std::size_t payload_size, std::uint8_t* scratch,
                                                std::size_t size) {
  // Each plane has one encoding where there is nothing to encode.
  if (size == 0 && method != kMethodRaw) return nullptr;
  switch (method) {
    case kMethodRaw:
      return payload_size == size ? payload : nullptr;
    case kMethodConstant:
      if (payload_size != 1) return nullptr;
      std::memset(scratch, payload[0], size);
      return scratch;
    case kMethodZstd:
      if (!zstd_) {
        throw Error(ErrorKind::kInvalid,
                    "a chunk is compressed with zstd and no libzstd is found; install the "
                    "zstandard package");
      }
      return zstd_->decompress(payload, payload_size, scratch, size) ? scratch : nullptr;
    case kMethodHuffman:
      return huffman_.decode(payload, payload_size, scratch, size) ? scratch : nullptr;
    case kMethodSevenBits:
      if (payload_size != seven_bits_size(size)) return nullptr;
      return unpack_seven_bits(payload, size, scratch) ? scratch : nullptr;
    default:
      return nullptr;
  }
}

}  // namespace pysnap
