// zstd.h: the part of libzstd that pysnap uses, opened at run time.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "dynamic_library.h"

namespace pysnap {

// The functions of one libzstd (stable API, 1.4 or later). Immutable after open(), so threads share
// it.
class Zstd {
 public:
  // The first of `names` that opens and has every function; null where none does.
  static std::shared_ptr<const Zstd> open(const std::vector<std::string>& names);

  const std::string& name() const { return name_; }

 private:
  friend class ZstdCompressor;
  friend class ZstdDecompressor;
  Zstd() = default;

  std::string name_;
  std::unique_ptr<DynamicLibrary> library_;
  void* (*create_compressor_)() = nullptr;
  std::size_t (*free_compressor_)(void*) = nullptr;
  std::size_t (*set_parameter_)(void*, int, int) = nullptr;
  std::size_t (*compress_)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  void* (*create_decompressor_)() = nullptr;
  std::size_t (*free_decompressor_)(void*) = nullptr;
  std::size_t (*find_frame_size_)(const void*, std::size_t) = nullptr;
  std::size_t (*decompress_)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  unsigned (*is_error_)(std::size_t) = nullptr;
};

// What a plane is compressed for: `kEntropy` turns zstd into a Huffman coder that looks for no
// matches, for bytes that have a skewed distribution and no repeats; `kMatches` is level 1, and
// `kThorough` a level that takes twenty times as long.
enum class ZstdRecipe { kEntropy, kMatches, kThorough };

// One thread's compressor.
class ZstdCompressor {
 public:
  ZstdCompressor(std::shared_ptr<const Zstd> zstd, ZstdRecipe recipe);
  // The length of the frame, or 0 where it does not fit into `capacity`.
  std::size_t compress(const void* data, std::size_t size, void* out, std::size_t capacity);

 private:
  std::shared_ptr<const Zstd> zstd_;
  std::unique_ptr<void, std::size_t (*)(void*)> context_;
};

// One thread's decompressor.
class ZstdDecompressor {
 public:
  explicit ZstdDecompressor(std::shared_ptr<const Zstd> zstd);
  // False unless `frame` is one frame that decodes to exactly `size` bytes. Never writes past out +
  // size.
  bool decompress(const void* frame, std::size_t frame_size, void* out, std::size_t size);

 private:
  std::shared_ptr<const Zstd> zstd_;
  std::unique_ptr<void, std::size_t (*)(void*)> context_;
};

}  // namespace pysnap
