#include "huffman.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pysnap {

namespace {

constexpr std::size_t kSymbols = 256;
constexpr std::size_t kStreams = kHuffmanStreams;

// Layout of a payload.
constexpr std::size_t kFlags = 0;  // bit 0: there is an escape
constexpr std::size_t kEscape = 1;
constexpr std::size_t kLiterals = 4;
constexpr std::size_t kLengths = 8;
constexpr std::size_t kStreamSizes = kLengths + kSymbols / 2;
constexpr std::size_t kHeader = kStreamSizes + 4 * kStreams;

// Of a large plane, one piece in so many is counted: all would take as long as the encoding.
constexpr std::size_t kPiece = 64;
constexpr std::size_t kCountedPieces = 32;
constexpr std::size_t kCountedWhole = std::size_t{1} << 14;
// Where the sample shows fewer symbols, an escape would cost a large part of a bit.
constexpr std::size_t kFewSymbols = 8;

using Lengths = std::array<std::uint8_t, kSymbols>;
using Counts = std::array<std::uint32_t, kSymbols>;

std::uint32_t get_u32(const std::uint8_t* from) {
  std::uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

void put_u32(std::uint8_t* to, std::size_t value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value);
  std::memcpy(to, &word, sizeof(word));
}

std::uint64_t get_u64(const std::uint8_t* from) {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

// The symbols of stream s are those from segment_start(size, s) to segment_start(size, s + 1).
std::size_t segment_start(std::size_t size, std::size_t stream) {
  return stream == kStreams ? size : size / kStreams * stream;
}

unsigned reversed(unsigned code, unsigned length) {
  unsigned result = 0;
  for (unsigned i = 0; i < length; ++i) result |= (code >> i & 1) << (length - 1 - i);
  return result;
}

// The canonical codes, first bit lowest: shorter ones first, of one length in the order of symbols.
std::array<std::uint16_t, kSymbols> canonical_codes(const Lengths& lengths) {
  std::array<unsigned, kLongestCode + 2> next{};
  for (const unsigned length : lengths)
    if (length > 0) ++next[length + 1];
  for (unsigned length = 1; length <= kLongestCode + 1; ++length)
    next[length] = (next[length] + next[length - 1]) << 1;
  std::array<std::uint16_t, kSymbols> codes{};
  for (std::size_t symbol = 0; symbol < kSymbols; ++symbol) {
    const unsigned length = lengths[symbol];
    if (length > 0) codes[symbol] = static_cast<std::uint16_t>(reversed(next[length]++, length));
  }
  return codes;
}

// A code for what is to be encoded.
struct Code {
  Lengths lengths{};
  bool has_escape = false;
  std::uint8_t escape = 0;
};

void count(const std::uint8_t* plane, std::size_t size, std::size_t step, Counts& counts) {
  // Several tables: equal bytes in a row would wait for each other.
  std::array<Counts, 4> parts{};
  std::size_t start = 0;
  for (; start + kPiece <= size; start += step * kPiece) {
    for (std::size_t i = start; i < start + kPiece; i += 8) {
      const std::uint64_t word = get_u64(plane + i);
      for (unsigned k = 0; k < 8; ++k) ++parts[k % 4][word >> 8 * k & 255];
    }
  }
  if (step == 1)
    for (; start < size; ++start) ++parts[0][plane[start]];
  for (std::size_t symbol = 0; symbol < kSymbols; ++symbol) {
    counts[symbol] = parts[0][symbol] + parts[1][symbol] + parts[2][symbol] + parts[3][symbol];
  }
}

// Lengths of a complete code of at most kLongestCode bits for the symbols that are counted, two at
// least: Huffman's, then those that are too long are cut and room is made among the shorter ones.
Lengths code_lengths(const Counts& counts) {
  struct Leaf {
    std::uint32_t count;
    std::uint32_t symbol;
  };
  std::array<Leaf, kSymbols> leaves;
  std::size_t n = 0;
  for (std::size_t symbol = 0; symbol < kSymbols; ++symbol)
    if (counts[symbol] > 0) leaves[n++] = {counts[symbol], static_cast<std::uint32_t>(symbol)};
  std::sort(leaves.begin(), leaves.begin() + n, [](const Leaf& a, const Leaf& b) {
    return a.count != b.count ? a.count < b.count : a.symbol < b.symbol;
  });
  // The two rarest of leaves and trees are joined until one tree is left.
  std::array<std::uint32_t, kSymbols> weight;
  std::array<std::uint16_t, 2 * kSymbols> parent;  // of leaves, then of trees
  std::size_t leaf = 0, tree = 0;
  for (std::size_t made = 0; made + 1 < n; ++made) {
    weight[made] = 0;
    for (int child = 0; child < 2; ++child) {
      const bool is_leaf = leaf < n && (tree == made || leaves[leaf].count <= weight[tree]);
      weight[made] += is_leaf ? leaves[leaf].count : weight[tree];
      parent[is_leaf ? leaf++ : kSymbols + tree++] = static_cast<std::uint16_t>(made);
    }
  }
  std::array<std::uint8_t, kSymbols> depth{};  // of trees
  std::array<unsigned, kLongestCode + 1> number{};
  for (std::size_t i = n - 1; i-- > 0;)
    depth[i] = i == n - 2 ? 0 : static_cast<std::uint8_t>(depth[parent[kSymbols + i]] + 1);
  unsigned used = 0;  // of the 2^kLongestCode codes of full length
  for (std::size_t i = 0; i < n; ++i) {
    const unsigned length = std::min<unsigned>(depth[parent[i]] + 1U, kLongestCode);
    ++number[length];
    used += 1U << (kLongestCode - length);
  }
  while (used > 1U << kLongestCode) {
    // One of the longest moves beside a shorter one, which grows by a bit.
    unsigned length = kLongestCode - 1;
    while (number[length] == 0) --length;
    --number[kLongestCode];
    --number[length];
    number[length + 1] += 2;
    --used;
  }
  Lengths lengths{};
  std::size_t i = 0;
  for (unsigned length = kLongestCode; length > 0; --length)
    for (unsigned k = 0; k < number[length]; ++k)
      lengths[leaves[i++].symbol] = static_cast<std::uint8_t>(length);
  return lengths;
}

Code make_code(const std::uint8_t* plane, std::size_t size) {
  Code code;
  Counts counts;
  const bool whole = size <= kCountedWhole;
  count(plane, size, whole ? 1 : kCountedPieces, counts);
  if (!whole) {
    const auto seen = kSymbols - std::count(counts.begin(), counts.end(), 0U);
    if (static_cast<std::size_t>(seen) < kFewSymbols) {
      count(plane, size, 1, counts);
    } else if (static_cast<std::size_t>(seen) < kSymbols) {
      // How often what was not seen occurs: as often as what was seen once (Good and Turing).
      const auto once = std::count(counts.begin(), counts.end(), 1U);
      code.has_escape = true;
      code.escape =
          static_cast<std::uint8_t>(std::find(counts.begin(), counts.end(), 0U) - counts.begin());
      counts[code.escape] = 1 + static_cast<std::uint32_t>(once);
    }
  }
  code.lengths = code_lengths(counts);
  return code;
}

// What is written for each symbol; one without a code is written as the escape.
class Symbols {
 public:
  explicit Symbols(const Code& code) {
    const std::array<std::uint16_t, kSymbols> codes = canonical_codes(code.lengths);
    for (std::size_t symbol = 0; symbol < kSymbols; ++symbol) {
      const bool escaped = code.has_escape && (code.lengths[symbol] == 0 || symbol == code.escape);
      const std::size_t written = escaped ? code.escape : symbol;
      words_[symbol] = code.lengths[written] | static_cast<std::uint32_t>(codes[written]) << 8 |
                       (escaped ? kEscaped : 0);
      low_[symbol] = static_cast<std::uint8_t>(codes[written]);
      high_[symbol] = static_cast<std::uint8_t>(codes[written] >> 8 | code.lengths[written] << 3 |
                                                (escaped ? 0x80 : 0));
    }
  }

  static constexpr std::uint32_t kEscaped = 1U << 7;
  // The length in the low bits, the code from bit 8.
  const std::uint32_t* words() const { return words_.data(); }
  // Low byte of the code; and its high bits, the length from bit 3, and bit 7 of what is escaped.
  const std::uint8_t* low() const { return low_.data(); }
  const std::uint8_t* high() const { return high_.data(); }

 private:
  alignas(64) std::array<std::uint32_t, kSymbols> words_;
  alignas(64) std::array<std::uint8_t, kSymbols> low_;
  alignas(64) std::array<std::uint8_t, kSymbols> high_;
};

// A stream that is being written, with fewer than 8 bits that are not in memory yet.
struct BitWriter {
  std::uint8_t* next;
  std::uint64_t bits;
  std::uint64_t count;

  void flush() {
    std::memcpy(next, &bits, sizeof(bits));
    next += count >> 3;
    bits >>= count & ~std::uint64_t{7};
    count &= 7;
  }
};

// Appends `size` symbols; true if one of them was escaped.
inline __attribute__((always_inline)) bool write_piece(BitWriter& writer,
                                                       const std::uint32_t* words,
                                                       const std::uint8_t* symbols,
                                                       std::size_t size) {
  constexpr std::size_t kGroup = 5;  // codes of full length and 7 bits before them fit in a word
  static_assert(kGroup * kLongestCode + 7 < 64);
  std::uint32_t any = 0;
  BitWriter w = writer;
  std::size_t i = 0;
  const auto put = [&](std::uint8_t symbol) {
    const std::uint32_t word = words[symbol];
    any |= word;
    w.bits |= static_cast<std::uint64_t>(word >> 8) << w.count;
    w.count += word & 63;
  };
  for (; i + kGroup <= size; i += kGroup) {
    for (std::size_t k = 0; k < kGroup; ++k) put(symbols[i + k]);
    w.flush();
  }
  for (; i < size; ++i) put(symbols[i]);
  w.flush();
  writer = w;
  return (any & Symbols::kEscaped) != 0;
}

// Appends `size` symbols, and marks the pieces of them that have an escape.
inline __attribute__((always_inline)) void write_pieces(BitWriter& writer,
                                                        const std::uint32_t* words,
                                                        const std::uint8_t* symbols,
                                                        std::size_t size, std::uint8_t* escaped) {
  for (std::size_t start = 0; start < size; start += kPiece)
    *escaped++ = write_piece(writer, words, symbols + start, std::min(kPiece, size - start));
}

void write_pieces_portable(BitWriter& writer, const std::uint32_t* words,
                           const std::uint8_t* symbols, std::size_t size, std::uint8_t* escaped) {
  write_pieces(writer, words, symbols, size, escaped);
}

using Writers = std::array<BitWriter, kStreams>;

#if defined(__x86_64__)

// Shifts by a variable are one instruction there.
__attribute__((target("bmi2"))) void write_pieces_bmi2(BitWriter& writer,
                                                       const std::uint32_t* words,
                                                       const std::uint8_t* symbols,
                                                       std::size_t size, std::uint8_t* escaped) {
  write_pieces(writer, words, symbols, size, escaped);
}

// GCC 12 takes the undefined operands inside its own intrinsics for mistakes of their callers.
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define PYSNAP_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))

// A table of 256 bytes in registers.
struct ByteTable {
  __m512i part[4];

  PYSNAP_VBMI explicit ByteTable(const std::uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(bytes + 64 * i);
  }
  PYSNAP_VBMI __m512i look_up(__m512i index, __mmask64 upper) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
    return _mm512_mask_blend_epi8(upper, low, high);
  }
};

// Rows of 8 words become columns.
PYSNAP_VBMI inline void transpose(__m512i (&rows)[8]) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      fours[i + k] = _mm512_shuffle_i64x2(pairs[i + k], pairs[i + k + 2], 0x88);
      fours[i + k + 2] = _mm512_shuffle_i64x2(pairs[i + k], pairs[i + k + 2], 0xDD);
    }
  }
  // fours[k] holds columns k and k + 4 of the upper four rows, fours[k + 4] of the lower.
  for (int k = 0; k < 4; ++k) {
    rows[k] = _mm512_shuffle_i64x2(fours[k], fours[k + 4], 0x88);
    rows[k + 4] = _mm512_shuffle_i64x2(fours[k], fours[k + 4], 0xDD);
  }
}

// The codes of eight symbols of each stream, in words of 64 bits: the first four and the last four.
struct EightCodes {
  __m512i first, length_of_first;
  __m512i last, length_of_last;

  // All eight, where they fit in a word.
  PYSNAP_VBMI __m512i codes() const {
    return _mm512_or_si512(first, _mm512_sllv_epi64(last, length_of_first));
  }
  PYSNAP_VBMI __m512i length() const { return _mm512_add_epi64(length_of_first, length_of_last); }
};

// From what Symbols has for each of them.
PYSNAP_VBMI inline EightCodes merge_codes(__m512i low, __m512i high) {
  const __m512i low_byte = _mm512_set1_epi16(0x00FF);
  const __m512i low_three = _mm512_set1_epi16(0x0700);
  const __m512i low_four = _mm512_set1_epi16(0x000F);
  const __m512i low_word = _mm512_set1_epi32(0xFFFF);
  const __m512i low_half = _mm512_set1_epi64(0xFFFFFFFF);
  // Codes and lengths of even and odd symbols, in words of 16 bits.
  const __m512i even_code = _mm512_or_si512(
      _mm512_and_si512(low, low_byte), _mm512_and_si512(_mm512_slli_epi16(high, 8), low_three));
  const __m512i odd_code =
      _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_and_si512(high, low_three));
  const __m512i even_length = _mm512_and_si512(_mm512_srli_epi16(high, 3), low_four);
  const __m512i odd_length = _mm512_and_si512(_mm512_srli_epi16(high, 11), low_four);
  // Of each four symbols: the first pair and the second, in words of 32 bits.
  const __m512i first_pair =
      _mm512_or_si512(_mm512_and_si512(even_code, low_word),
                      _mm512_sllv_epi32(_mm512_and_si512(odd_code, low_word),
                                        _mm512_and_si512(even_length, low_word)));
  const __m512i second_pair = _mm512_or_si512(
      _mm512_srli_epi32(even_code, 16),
      _mm512_sllv_epi32(_mm512_srli_epi32(odd_code, 16), _mm512_srli_epi32(even_length, 16)));
  const __m512i pair_length = _mm512_add_epi16(even_length, odd_length);
  const __m512i first_length = _mm512_and_si512(pair_length, low_word);
  const __m512i four_length = _mm512_add_epi32(first_length, _mm512_srli_epi32(pair_length, 16));
  const __m512i first =
      _mm512_or_si512(_mm512_and_si512(first_pair, low_half),
                      _mm512_sllv_epi64(_mm512_and_si512(second_pair, low_half),
                                        _mm512_and_si512(first_length, low_half)));
  const __m512i last = _mm512_or_si512(
      _mm512_srli_epi64(first_pair, 32),
      _mm512_sllv_epi64(_mm512_srli_epi64(second_pair, 32), _mm512_srli_epi64(first_length, 32)));
  return {first, _mm512_and_si512(four_length, low_half), last, _mm512_srli_epi64(four_length, 32)};
}

// Fetched of what is read next: a part of a core's own cache, and so much for 512 symbols as comes
// while they are encoded.
constexpr std::size_t kFetched = std::size_t{256} << 10;
constexpr std::size_t kMostLines = 16;
constexpr std::size_t kLine = 64;

// Writes the first `pieces` pieces of every segment, one stream in each lane, and marks those that
// have an escape: escaped[stream * pieces_per_segment + piece].
PYSNAP_VBMI void write_pieces_vbmi(Writers& writers, const Symbols& symbols,
                                   const std::uint8_t* plane, std::size_t segment,
                                   std::size_t pieces, std::uint8_t* escaped,
                                   std::size_t pieces_per_segment, Upcoming upcoming) {
  const ByteTable low_table(symbols.low());
  const ByteTable high_table(symbols.high());
  __m512i bits = _mm512_setzero_si512();
  __m512i count = _mm512_setzero_si512();
  __m512i flags = _mm512_setzero_si512();
  alignas(64) std::uint64_t words[kStreams];
  alignas(64) std::uint64_t bytes[kStreams];
  std::uint8_t* next[kStreams];
  for (std::size_t s = 0; s < kStreams; ++s) next[s] = writers[s].next;

  const auto look_up = [&](__m512i row) PYSNAP_VBMI {
    const __mmask64 upper = _mm512_movepi8_mask(row);
    const __m512i high = high_table.look_up(row, upper);
    flags = _mm512_or_si512(flags, high);
    return merge_codes(low_table.look_up(row, upper), high);
  };
  // With the 7 bits that may wait, so many fit in a word.
  const auto fits = [](__m512i length) PYSNAP_VBMI {
    return _mm512_cmpgt_epu64_mask(length, _mm512_set1_epi64(56)) == 0;
  };
  const auto append = [&](__m512i codes, __m512i length) PYSNAP_VBMI {
    bits = _mm512_or_si512(bits, _mm512_sllv_epi64(codes, count));
    count = _mm512_add_epi64(count, length);
    const __m512i whole = _mm512_srli_epi64(count, 3);
    _mm512_store_si512(words, bits);
    _mm512_store_si512(bytes, whole);
    // GCC would take each word out of the registers instead, by the units that shift.
    asm("" : "+m"(words), "+m"(bytes));
    for (std::size_t s = 0; s < kStreams; ++s) {
      std::memcpy(next[s], &words[s], 8);
      next[s] += bytes[s];
    }
    bits = _mm512_srlv_epi64(bits, _mm512_slli_epi64(whole, 3));
    count = _mm512_and_si512(count, _mm512_set1_epi64(7));
  };
  const std::size_t lines = std::min(upcoming.size, kFetched) / kLine;
  const std::size_t lines_per_piece =
      std::min(lines / std::max<std::size_t>(pieces, 1), kMostLines);
  for (std::size_t piece = 0; piece < pieces; ++piece) {
    for (std::size_t i = 0; i < lines_per_piece; ++i)
      __builtin_prefetch(upcoming.data + (piece * lines_per_piece + i) * kLine);
    __m512i rows[8];
    for (std::size_t s = 0; s < kStreams; ++s)
      rows[s] = _mm512_loadu_si512(plane + s * segment + piece * kPiece);
    transpose(rows);
    flags = _mm512_setzero_si512();
    for (std::size_t i = 0; i < 8; i += 2) {
      const EightCodes a = look_up(rows[i]), b = look_up(rows[i + 1]);
      const __m512i a_codes = a.codes(), a_length = a.length();
      const __m512i b_codes = b.codes(), b_length = b.length();
      // Mostly, one append is enough for sixteen symbols: a sixth of the time less.
      const __m512i length = _mm512_add_epi64(a_length, b_length);
      if (__builtin_expect(fits(length), 1)) {
        append(_mm512_or_si512(a_codes, _mm512_sllv_epi64(b_codes, a_length)), length);
      } else if (__builtin_expect(fits(_mm512_max_epu64(a_length, b_length)), 1)) {
        append(a_codes, a_length);
        append(b_codes, b_length);
      } else {
        append(a.first, a.length_of_first);
        append(a.last, a.length_of_last);
        append(b.first, b.length_of_first);
        append(b.last, b.length_of_last);
      }
    }
    const __mmask64 any = _mm512_movepi8_mask(flags);
    if (any != 0) {
      for (std::size_t s = 0; s < kStreams; ++s)
        escaped[s * pieces_per_segment + piece] = (any >> 8 * s & 0xFF) != 0;
    }
  }
  _mm512_store_si512(words, bits);
  _mm512_store_si512(bytes, count);
  for (std::size_t s = 0; s < kStreams; ++s) writers[s] = {next[s], words[s], bytes[s]};
}

#pragma GCC diagnostic pop
#endif

}  // namespace

std::size_t HuffmanEncoder::encode(const std::uint8_t* plane, std::size_t size, std::uint8_t* out,
                                   std::size_t capacity, SimdPath path, Upcoming upcoming) {
  if (size < 2 || capacity <= kHeader) return 0;
  if (std::memcmp(plane, plane + 1, size - 1) == 0) return 0;
  const Code code = make_code(plane, size);
  const Symbols symbols(code);

  const std::size_t segment = size / kStreams;
  const std::size_t longest = segment_start(size, kStreams) - segment_start(size, kStreams - 1);
  // A flush writes a whole word.
  const std::size_t room = (longest * kLongestCode + 7) / 8 + 8;
  if (streams_.size() < kStreams * room) streams_.resize(kStreams * room);
  const std::size_t pieces = (longest + kPiece - 1) / kPiece;
  escaped_.assign(kStreams * pieces, 0);

  Writers writers;
  for (std::size_t s = 0; s < kStreams; ++s) writers[s] = {streams_.data() + s * room, 0, 0};
  std::size_t done = 0;  // pieces of every segment
  auto write_rest = write_pieces_portable;
#if defined(__x86_64__)
  if (path == SimdPath::kAvx512 && cpu_has_vbmi()) {
    done = segment / kPiece;
    write_pieces_vbmi(writers, symbols, plane, segment, done, escaped_.data(), pieces, upcoming);
  }
  if (path != SimdPath::kPortable && __builtin_cpu_supports("bmi2")) write_rest = write_pieces_bmi2;
#endif
  static_cast<void>(path);
  static_cast<void>(upcoming);
  std::size_t total = kHeader;
  for (std::size_t s = 0; s < kStreams; ++s) {
    const std::size_t start = segment_start(size, s) + done * kPiece;
    write_rest(writers[s], symbols.words(), plane + start, segment_start(size, s + 1) - start,
               escaped_.data() + s * pieces + done);
    writers[s].next += writers[s].count > 0;
    total += static_cast<std::size_t>(writers[s].next - (streams_.data() + s * room));
  }
  if (total > capacity) return 0;

  std::memset(out, 0, kHeader);
  out[kFlags] = code.has_escape;
  out[kEscape] = code.escape;
  for (std::size_t symbol = 0; symbol < kSymbols; ++symbol) {
    out[kLengths + symbol / 2] = static_cast<std::uint8_t>(out[kLengths + symbol / 2] |
                                                           code.lengths[symbol] << symbol % 2 * 4);
  }
  std::uint8_t* next = out + kHeader;
  for (std::size_t s = 0; s < kStreams; ++s) {
    const std::uint8_t* stream = streams_.data() + s * room;
    const std::size_t length = static_cast<std::size_t>(writers[s].next - stream);
    put_u32(out + kStreamSizes + 4 * s, length);
    std::memcpy(next, stream, length);
    next += length;
  }
  if (!code.has_escape) return total;
  const std::size_t before = total;
  for (std::size_t s = 0; s < kStreams; ++s) {
    for (std::size_t piece = 0; piece < pieces; ++piece) {
      if (!escaped_[s * pieces + piece]) continue;
      const std::size_t start = segment_start(size, s) + piece * kPiece;
      const std::size_t end = std::min(start + kPiece, segment_start(size, s + 1));
      for (std::size_t i = start; i < end; ++i) {
        if ((symbols.words()[plane[i]] & Symbols::kEscaped) == 0) continue;
        if (total == capacity) return 0;
        out[total++] = plane[i];
      }
    }
  }
  put_u32(out + kLiterals, total - before);
  return total;
}

namespace {

// A stream that is being read.
struct BitReader {
  const std::uint8_t* data;
  std::size_t size;      // bytes
  std::size_t position;  // bits
  std::uint8_t* out;
  std::uint8_t* end;

  // At least 57 bits from the position on; 8 bytes there are in the stream.
  std::uint64_t peek() const { return get_u64(data + position / 8) >> position % 8; }
  // The same near the end of the stream, with zeros behind it.
  std::uint64_t peek_at_end() const {
    const std::size_t byte = position / 8;
    std::uint64_t word = 0;
    if (byte < size) std::memcpy(&word, data + byte, std::min<std::size_t>(8, size - byte));
    return word >> position % 8;
  }
};

constexpr unsigned kMostSymbols = 6;  // of an entry
constexpr std::uint64_t kLengthAndNumber = 0xFF000000000000FF;
constexpr std::uint64_t kFiveSymbols = 0x0000FFFFFFFFFF00;
constexpr unsigned kLookUps = 57 / kLongestCode;  // between two reads of the stream
constexpr std::size_t kLastTable = std::size_t{1} << kLongestCode;
constexpr std::uint64_t kMask = (1U << kLongestCode) - 1;

// How often the stream may be read without a look at its end.
std::size_t safe_rounds(const BitReader& reader) {
  const std::size_t bytes = reader.size - std::min(reader.size, reader.position / 8);
  const std::size_t room = static_cast<std::size_t>(reader.end - reader.out);
  return std::min((bytes - std::min<std::size_t>(8, bytes)) / 7,
                  (room - std::min<std::size_t>(8, room)) / (kLookUps * kMostSymbols));
}

inline __attribute__((always_inline)) void look_up(BitReader& reader, const std::uint64_t* table,
                                                   std::uint64_t& bits) {
  const std::uint64_t entry = table[bits & kMask];
  const std::uint64_t symbols = entry >> 8;
  std::memcpy(reader.out, &symbols, sizeof(symbols));
  reader.out += entry >> 56;
  reader.position += entry & 63;
  bits >>= entry & 63;
}

void read_one(BitReader& reader, const std::uint64_t* table, std::size_t rounds) {
  BitReader a = reader;
  for (; rounds > 0; --rounds) {
    std::uint64_t bits = a.peek();
    for (unsigned i = 0; i < kLookUps; ++i) look_up(a, table, bits);
  }
  reader = a;
}

// Four streams at once, for the CPU works on one while it waits for another.
void read_four(BitReader* const* readers, const std::uint64_t* table, std::size_t rounds) {
  BitReader a = *readers[0], b = *readers[1], c = *readers[2], d = *readers[3];
  for (; rounds > 0; --rounds) {
    std::uint64_t a_bits = a.peek(), b_bits = b.peek(), c_bits = c.peek(), d_bits = d.peek();
    for (unsigned i = 0; i < kLookUps; ++i) {
      look_up(a, table, a_bits);
      look_up(b, table, b_bits);
      look_up(c, table, c_bits);
      look_up(d, table, d_bits);
    }
  }
  *readers[0] = a, *readers[1] = b, *readers[2] = c, *readers[3] = d;
}

// Reads every stream up to near its end. Streams are of different lengths: another takes the place
// of one that is done.
void read_fast(std::array<BitReader, kStreams>& readers, const std::uint64_t* table) {
  BitReader* active[4] = {&readers[0], &readers[1], &readers[2], &readers[3]};
  BitReader* waiting = active[3] + 1;
  for (;;) {
    std::size_t rounds = SIZE_MAX;
    for (BitReader*& reader : active) {
      std::size_t safe = safe_rounds(*reader);
      while (safe == 0 && waiting < readers.data() + kStreams) {
        reader = waiting++;
        safe = safe_rounds(*reader);
      }
      rounds = std::min(rounds, safe);
    }
    if (rounds == 0) break;
    read_four(active, table, rounds);
  }
  for (BitReader& reader : readers) {
    while (const std::size_t rounds = safe_rounds(reader)) read_one(reader, table, rounds);
  }
}

}  // namespace

// False unless the lengths are those of a complete code.
bool HuffmanDecoder::build(const Lengths& lengths) {
  unsigned used = 0;
  for (const unsigned length : lengths) {
    if (length > kLongestCode) return false;
    if (length > 0) used += 1U << (kLongestCode - length);
  }
  if (used != 1U << kLongestCode) return false;
  const std::array<std::uint16_t, kSymbols> codes = canonical_codes(lengths);
  // The entries for `bits` bits begin at table_[1 << bits]. A code in front of an entry for fewer
  // bits is one for more.
  table_[1] = 0;
  for (unsigned bits = 1; bits <= kLongestCode; ++bits) {
    Entry* entries = &table_[std::size_t{1} << bits];
    std::fill_n(entries, std::size_t{1} << bits, Entry{0});
    for (std::size_t symbol = 0; symbol < kSymbols; ++symbol) {
      const unsigned length = lengths[symbol];
      if (length == 0 || length > bits) continue;
      const Entry first = Entry{1} << 56 | static_cast<Entry>(symbol) << 8 | length;
      const unsigned left = bits - length;
      for (std::size_t i = 0; i < std::size_t{1} << left; ++i) {
        Entry rest = table_[(std::size_t{1} << left) + i];
        for (unsigned fewer = left; rest >> 56 == kMostSymbols;) {
          --fewer;
          rest = table_[(std::size_t{1} << fewer) + (i & ((std::size_t{1} << fewer) - 1))];
        }
        entries[codes[symbol] + (i << length)] =
            first + (rest & kLengthAndNumber) + ((rest & kFiveSymbols) << 8);
      }
    }
  }
  return true;
}

bool HuffmanDecoder::decode(const std::uint8_t* payload, std::size_t payload_size,
                            std::uint8_t* plane, std::size_t size) {
  if (payload_size < kHeader || payload[kFlags] > 1 || payload[2] != 0 || payload[3] != 0)
    return false;
  const bool has_escape = payload[kFlags] == 1;
  const std::uint8_t escape = payload[kEscape];
  const std::size_t literals = get_u32(payload + kLiterals);
  Lengths lengths;
  for (std::size_t symbol = 0; symbol < kSymbols; ++symbol)
    lengths[symbol] = payload[kLengths + symbol / 2] >> symbol % 2 * 4 & 15;
  if (!has_escape && (escape != 0 || literals != 0)) return false;
  if (has_escape && lengths[escape] == 0) return false;
  if (!build(lengths)) return false;

  std::array<BitReader, kStreams> readers;
  const std::uint8_t* next = payload + kHeader;
  std::size_t left = payload_size - kHeader;
  for (std::size_t s = 0; s < kStreams; ++s) {
    const std::size_t length = get_u32(payload + kStreamSizes + 4 * s);
    if (length > left) return false;
    readers[s] = {next, length, 0, plane + segment_start(size, s),
                  plane + segment_start(size, s + 1)};
    next += length;
    left -= length;
  }
  if (left != literals) return false;

  read_fast(readers, &table_[kLastTable]);
  for (BitReader& reader : readers) {
    while (reader.out < reader.end) {
      const std::uint8_t symbol =
          static_cast<std::uint8_t>(table_[kLastTable + (reader.peek_at_end() & kMask)] >> 8);
      reader.position += lengths[symbol];
      *reader.out++ = symbol;
      if (reader.position > 8 * reader.size) return false;
    }
    if ((reader.position + 7) / 8 != reader.size || reader.peek_at_end() != 0) return false;
  }
  if (!has_escape) return true;
  std::uint8_t* at = plane;
  for (; left > 0; --left, ++at) {
    at = static_cast<std::uint8_t*>(
        std::memchr(at, escape, static_cast<std::size_t>(plane + size - at)));
    if (at == nullptr) return false;
    *at = *next++;
  }
  return std::memchr(at, escape, static_cast<std::size_t>(plane + size - at)) == nullptr;
}

}  // namespace pysnap
