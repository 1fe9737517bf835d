#include "digest.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Names of functions and constants follow the specification; the seed is 0 and therefore left out.

namespace pysnap {
namespace {

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pysnap reads words as they lie in memory, which the format defines to be little endian"
#endif

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
__extension__ using u128 = unsigned __int128;

constexpr u64 kPrime32_1 = 0x9E3779B1U;
constexpr u64 kPrime32_2 = 0x85EBCA77U;
constexpr u64 kPrime32_3 = 0xC2B2AE3DU;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87U;
constexpr u64 kPrime64_2 = 0xC2B2AE3D27D4EB4FU;
constexpr u64 kPrime64_3 = 0x165667B19E3779F9U;
constexpr u64 kPrime64_4 = 0x85EBCA77C2B2AE63U;
constexpr u64 kPrime64_5 = 0x27D4EB2F165667C5U;
constexpr u64 kPrimeMx1 = 0x165667919E3779F9U;
constexpr u64 kPrimeMx2 = 0x9FB21C651E98DF25U;

constexpr std::size_t kSecretSize = 192;
constexpr std::size_t kLanes = 8;
constexpr std::size_t kStripeSize = kLanes * sizeof(u64);
constexpr std::size_t kStripesPerBlock = (kSecretSize - kStripeSize) / sizeof(u64);
constexpr std::size_t kBlockSize = kStripesPerBlock * kStripeSize;
// Up to here there are other ways.
constexpr std::size_t kShort = 240;
constexpr std::size_t kScrambleOffset = kSecretSize - kStripeSize;

alignas(64) constexpr u8 kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

u32 read32(const u8* from) {
  u32 word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

u64 read64(const u8* from) {
  u64 word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

u64 secret64(std::size_t offset) { return read64(kSecret + offset); }

u64 low32(u64 x) { return x & 0xFFFFFFFFU; }
u64 low64(u128 x) { return static_cast<u64>(x); }
u64 high64(u128 x) { return static_cast<u64>(x >> 64); }

u64 multiply_and_fold(u64 a, u64 b) {
  const u128 product = static_cast<u128>(a) * b;
  return low64(product) ^ high64(product);
}

u64 avalanche(u64 x) {
  x = (x ^ (x >> 37)) * kPrimeMx1;
  return x ^ (x >> 32);
}

u64 avalanche_xxh64(u64 x) {
  x = (x ^ (x >> 33)) * kPrime64_2;
  x = (x ^ (x >> 29)) * kPrime64_3;
  return x ^ (x >> 32);
}

Digest hash_empty() {
  return {avalanche_xxh64(secret64(64) ^ secret64(72)),
          avalanche_xxh64(secret64(80) ^ secret64(88))};
}

Digest hash_1_to_3(const u8* input, std::size_t size) {
  const u32 combined = static_cast<u32>(input[size - 1]) | static_cast<u32>(size) << 8 |
                       static_cast<u32>(input[0]) << 16 | static_cast<u32>(input[size / 2]) << 24;
  const u32 swapped = __builtin_bswap32(combined);
  const u32 rotated = swapped << 13 | swapped >> 19;
  return {avalanche_xxh64(read32(kSecret) ^ read32(kSecret + 4) ^ combined),
          avalanche_xxh64(read32(kSecret + 8) ^ read32(kSecret + 12) ^ rotated)};
}

Digest hash_4_to_8(const u8* input, std::size_t size) {
  const u64 combined = read32(input) | static_cast<u64>(read32(input + size - 4)) << 32;
  const u64 value = secret64(16) ^ secret64(24) ^ combined;
  const u128 product = static_cast<u128>(value) * (kPrime64_1 + (static_cast<u64>(size) << 2));
  const u64 high = high64(product) + (low64(product) << 1);
  u64 low = low64(product) ^ (high >> 3);
  low = (low ^ (low >> 35)) * kPrimeMx2;
  return {low ^ (low >> 28), avalanche(high)};
}

Digest hash_9_to_16(const u8* input, std::size_t size) {
  const u64 first = read64(input);
  const u64 last = read64(input + size - 8);
  const u64 value1 = secret64(32) ^ secret64(40) ^ first ^ last;
  const u64 value2 = secret64(48) ^ secret64(56) ^ last;
  const u128 product = static_cast<u128>(value1) * kPrime64_1;
  const u64 high = high64(product) + value2 + low32(value2) * (kPrime32_2 - 1);
  const u64 low = (low64(product) + (static_cast<u64>(size - 1) << 54)) ^ __builtin_bswap64(high);
  const u128 mixed = static_cast<u128>(low) * kPrime64_2;
  return {avalanche(low64(mixed)), avalanche(high64(mixed) + high * kPrime64_2)};
}

// The two accumulators of inputs of 17 to 240 bytes.
class MediumState {
 public:
  explicit MediumState(std::size_t size) : size_(size), first_(size * kPrime64_1) {}

  void mix_two_chunks(const u8* chunk1, const u8* chunk2, std::size_t secret_offset) {
    first_ = (first_ + mix_step(chunk1, secret_offset)) ^ (read64(chunk2) + read64(chunk2 + 8));
    second_ =
        (second_ + mix_step(chunk2, secret_offset + 16)) ^ (read64(chunk1) + read64(chunk1 + 8));
  }

  void avalanche_both() {
    first_ = avalanche(first_);
    second_ = avalanche(second_);
  }

  Digest finish() const {
    const u64 high = first_ * kPrime64_1 + second_ * kPrime64_4 + size_ * kPrime64_2;
    return {avalanche(first_ + second_), 0 - avalanche(high)};
  }

 private:
  static u64 mix_step(const u8* chunk, std::size_t secret_offset) {
    return multiply_and_fold(read64(chunk) ^ secret64(secret_offset),
                             read64(chunk + 8) ^ secret64(secret_offset + 8));
  }

  u64 size_;
  u64 first_;
  u64 second_ = 0;
};

Digest hash_17_to_128(const u8* input, std::size_t size) {
  MediumState state(size);
  for (std::size_t i = (size - 1) / 32 + 1; i-- > 0;) {
    state.mix_two_chunks(input + i * 16, input + size - i * 16 - 16, i * 32);
  }
  return state.finish();
}

Digest hash_129_to_240(const u8* input, std::size_t size) {
  MediumState state(size);
  for (std::size_t i = 0; i < 4; ++i) {
    state.mix_two_chunks(input + i * 32, input + i * 32 + 16, i * 32);
  }
  state.avalanche_both();
  for (std::size_t i = 4; i < size / 32; ++i) {
    state.mix_two_chunks(input + i * 32, input + i * 32 + 16, (i - 4) * 32 + 3);
  }
  state.mix_two_chunks(input + size - 16, input + size - 32, 103);
  return state.finish();
}

void accumulate(u64* acc, const u8* stripe, const u8* secret) {
  for (std::size_t i = 0; i < kLanes; i += 2) {
    const u64 even = read64(stripe + i * 8);
    const u64 odd = read64(stripe + i * 8 + 8);
    const u64 even_keyed = even ^ read64(secret + i * 8);
    const u64 odd_keyed = odd ^ read64(secret + i * 8 + 8);
    acc[i] += odd + low32(even_keyed) * (even_keyed >> 32);
    acc[i + 1] += even + low32(odd_keyed) * (odd_keyed >> 32);
  }
}

// A path's code for the rounds over whole blocks: all but the last kilobyte of a long input. `acc`
// is the array of kLanes accumulators.
using Rounds = void (*)(u64* acc, const u8* input, std::size_t blocks);

void rounds_portable(u64* acc, const u8* input, std::size_t blocks) {
  for (; blocks > 0; --blocks, input += kBlockSize) {
    for (std::size_t n = 0; n < kStripesPerBlock; ++n) {
      accumulate(acc, input + n * kStripeSize, kSecret + n * 8);
    }
    for (std::size_t i = 0; i < kLanes; ++i) {
      acc[i] = (acc[i] ^ (acc[i] >> 47) ^ secret64(kScrambleOffset + i * 8)) * kPrime32_1;
    }
  }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline __m256i load_avx2(const u8* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

__attribute__((target("avx2"))) inline __m256i accumulate_avx2(__m256i acc, const u8* stripe,
                                                               const u8* secret) {
  const __m256i data = load_avx2(stripe);
  const __m256i keyed = _mm256_xor_si256(data, load_avx2(secret));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i neighbours = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(acc, _mm256_add_epi64(product, neighbours));
}

__attribute__((target("avx2"))) inline __m256i scramble_avx2(__m256i acc, const u8* secret) {
  const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
  const __m256i shifted = _mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47));
  const __m256i keyed = _mm256_xor_si256(shifted, load_avx2(secret));
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) void rounds_avx2(u64* acc, const u8* input, std::size_t blocks) {
  __m256i* const stored = reinterpret_cast<__m256i*>(acc);
  __m256i acc0 = _mm256_loadu_si256(stored);
  __m256i acc1 = _mm256_loadu_si256(stored + 1);
  for (; blocks > 0; --blocks, input += kBlockSize) {
    for (std::size_t n = 0; n < kStripesPerBlock; ++n) {
      const u8* const stripe = input + n * kStripeSize;
      acc0 = accumulate_avx2(acc0, stripe, kSecret + n * 8);
      acc1 = accumulate_avx2(acc1, stripe + 32, kSecret + n * 8 + 32);
    }
    acc0 = scramble_avx2(acc0, kSecret + kScrambleOffset);
    acc1 = scramble_avx2(acc1, kSecret + kScrambleOffset + 32);
  }
  _mm256_storeu_si256(stored, acc0);
  _mm256_storeu_si256(stored + 1, acc1);
}

// GCC 12 warns of the deliberately undefined registers in its own AVX-512 header (GCC bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

__attribute__((target("avx512f"))) void rounds_avx512(u64* acc, const u8* input,
                                                      std::size_t blocks) {
  const __m512i prime = _mm512_set1_epi64(static_cast<long long>(kPrime32_1));
  __m512i lanes = _mm512_loadu_si512(acc);
  for (; blocks > 0; --blocks, input += kBlockSize) {
    for (std::size_t n = 0; n < kStripesPerBlock; ++n) {
      const __m512i data = _mm512_loadu_si512(input + n * kStripeSize);
      const __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(kSecret + n * 8));
      const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
      const __m512i neighbours = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
      lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(product, neighbours));
    }
    const __m512i shifted = _mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47));
    const __m512i keyed = _mm512_xor_si512(shifted, _mm512_loadu_si512(kSecret + kScrambleOffset));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
    lanes = _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
  }
  _mm512_storeu_si512(acc, lanes);
}

#pragma GCC diagnostic pop

#elif defined(__aarch64__)

inline uint64x2_t load_neon(const u8* from) { return vreinterpretq_u64_u8(vld1q_u8(from)); }

// Two pairs of lanes at a time, so that one pair of unzips feeds two widening multiplications.
inline void accumulate_neon(uint64x2_t* acc, const u8* stripe, const u8* secret) {
  for (std::size_t i = 0; i < 4; i += 2) {
    const uint64x2_t data0 = load_neon(stripe + i * 16);
    const uint64x2_t data1 = load_neon(stripe + i * 16 + 16);
    const uint32x4_t keyed0 = vreinterpretq_u32_u64(veorq_u64(data0, load_neon(secret + i * 16)));
    const uint32x4_t keyed1 =
        vreinterpretq_u32_u64(veorq_u64(data1, load_neon(secret + i * 16 + 16)));
    const uint32x4_t low = vuzp1q_u32(keyed0, keyed1);
    const uint32x4_t high = vuzp2q_u32(keyed0, keyed1);
    acc[i] = vmlal_u32(vaddq_u64(acc[i], vextq_u64(data0, data0, 1)), vget_low_u32(low),
                       vget_low_u32(high));
    acc[i + 1] = vmlal_high_u32(vaddq_u64(acc[i + 1], vextq_u64(data1, data1, 1)), low, high);
  }
}

inline uint64x2_t scramble_neon(uint64x2_t acc, const u8* secret) {
  const uint32x2_t prime = vdup_n_u32(static_cast<u32>(kPrime32_1));
  const uint64x2_t keyed = veorq_u64(veorq_u64(acc, vshrq_n_u64(acc, 47)), load_neon(secret));
  const uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(keyed, 32), prime), 32);
  return vmlal_u32(high, vmovn_u64(keyed), prime);
}

void rounds_neon(u64* acc, const u8* input, std::size_t blocks) {
  uint64x2_t lanes[4];
  for (std::size_t i = 0; i < 4; ++i) lanes[i] = vld1q_u64(acc + i * 2);
  for (; blocks > 0; --blocks, input += kBlockSize) {
    for (std::size_t n = 0; n < kStripesPerBlock; ++n) {
      accumulate_neon(lanes, input + n * kStripeSize, kSecret + n * 8);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      lanes[i] = scramble_neon(lanes[i], kSecret + kScrambleOffset + i * 16);
    }
  }
  for (std::size_t i = 0; i < 4; ++i) vst1q_u64(acc + i * 2, lanes[i]);
}

#endif

Rounds rounds_of(SimdPath path) noexcept {
  if (!cpu_runs(path)) return rounds_portable;
#if defined(__x86_64__)
  if (path == SimdPath::kAvx2) return rounds_avx2;
  if (path == SimdPath::kAvx512) return rounds_avx512;
#elif defined(__aarch64__)
  if (path == SimdPath::kNeon) return rounds_neon;
#endif
  return rounds_portable;
}

Rounds best_rounds() noexcept {
  static const Rounds rounds = rounds_of(best_simd_path());
  return rounds;
}

u64 final_merge(const u64* acc, u64 result, std::size_t secret_offset) {
  for (std::size_t i = 0; i < kLanes; i += 2) {
    result += multiply_and_fold(acc[i] ^ secret64(secret_offset + i * 8),
                                acc[i + 1] ^ secret64(secret_offset + i * 8 + 8));
  }
  return avalanche(result);
}

Digest hash_short(const u8* input, std::size_t size) noexcept {
  if (size > 128) return hash_129_to_240(input, size);
  if (size > 16) return hash_17_to_128(input, size);
  if (size > 8) return hash_9_to_16(input, size);
  if (size > 3) return hash_4_to_8(input, size);
  if (size > 0) return hash_1_to_3(input, size);
  return hash_empty();
}

}  // namespace

Digest xxh3_128(const void* data, std::size_t size) noexcept {
  return GrowingDigest(data, size).finish();
}

Digest xxh3_128(const void* data, std::size_t size, SimdPath path) noexcept {
  return GrowingDigest(data, size, path).finish();
}

GrowingDigest::GrowingDigest(const void* data, std::size_t size) noexcept
    : GrowingDigest(data, size, best_rounds()) {}

GrowingDigest::GrowingDigest(const void* data, std::size_t size, SimdPath path) noexcept
    : GrowingDigest(data, size, rounds_of(path)) {}

GrowingDigest::GrowingDigest(const void* data, std::size_t size, Rounds rounds) noexcept
    : data_(static_cast<const u8*>(data)),
      size_(size),
      rounds_(rounds),
      lanes_{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
             kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1} {}

void GrowingDigest::advance(std::size_t size) noexcept {
  if (size_ <= kShort) return;
  // The last block, full or not, is left to finish().
  const std::size_t blocks = std::min(size, size_ - 1) / kBlockSize;
  if (blocks <= blocks_) return;
  rounds_(lanes_.data(), data_ + blocks_ * kBlockSize, blocks - blocks_);
  blocks_ = blocks;
}

Digest GrowingDigest::finish() noexcept {
  if (size_ <= kShort) return hash_short(data_, size_);
  advance(size_);
  // The last block is not scrambled, and its last stripe is the last 64 bytes of all.
  const u8* const last_block = data_ + blocks_ * kBlockSize;
  const std::size_t stripes = (size_ - 1) % kBlockSize / kStripeSize;
  for (std::size_t n = 0; n < stripes; ++n) {
    accumulate(lanes_.data(), last_block + n * kStripeSize, kSecret + n * 8);
  }
  accumulate(lanes_.data(), data_ + size_ - kStripeSize, kSecret + kSecretSize - 71);
  return {final_merge(lanes_.data(), size_ * kPrime64_1, 11),
          final_merge(lanes_.data(), ~(size_ * kPrime64_2), kSecretSize - 75)};
}

std::string to_hex(const Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(32);
  for (const u64 half : {digest.high, digest.low}) {
    for (int shift = 60; shift >= 0; shift -= 4) hex.push_back(kDigits[half >> shift & 15]);
  }
  return hex;
}

}  // namespace pysnap
