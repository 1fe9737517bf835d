#include "zstd.h"

#include <new>
#include <utility>

namespace pysnap {

namespace {

// Parameter numbers of zstd.h; fixed by its ABI.
constexpr int kCompressionLevel = 100;
constexpr int kHashLog = 102;
constexpr int kMinMatch = 105;
constexpr int kTargetLength = 106;
constexpr int kStrategy = 107;
constexpr int kLiteralCompressionMode = 1002;

template <typename Function>
bool resolve(const DynamicLibrary& library, const char* name, Function*& function) {
  function = library.symbol<Function>(name);
  return function != nullptr;
}

}  // namespace

std::shared_ptr<const Zstd> Zstd::open(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    std::unique_ptr<DynamicLibrary> library = DynamicLibrary::open(name);
    if (library == nullptr) continue;
    std::shared_ptr<Zstd> zstd(new Zstd);
    if (resolve(*library, "ZSTD_createCCtx", zstd->create_compressor_) &&
        resolve(*library, "ZSTD_freeCCtx", zstd->free_compressor_) &&
        resolve(*library, "ZSTD_CCtx_setParameter", zstd->set_parameter_) &&
        resolve(*library, "ZSTD_compress2", zstd->compress_) &&
        resolve(*library, "ZSTD_createDCtx", zstd->create_decompressor_) &&
        resolve(*library, "ZSTD_freeDCtx", zstd->free_decompressor_) &&
        resolve(*library, "ZSTD_findFrameCompressedSize", zstd->find_frame_size_) &&
        resolve(*library, "ZSTD_decompressDCtx", zstd->decompress_) &&
        resolve(*library, "ZSTD_isError", zstd->is_error_)) {
      zstd->name_ = name;
      zstd->library_ = std::move(library);
      return zstd;
    }
  }
  return nullptr;
}

ZstdCompressor::ZstdCompressor(std::shared_ptr<const Zstd> zstd, ZstdRecipe recipe)
    : zstd_(std::move(zstd)), context_(zstd_->create_compressor_(), zstd_->free_compressor_) {
  if (context_ == nullptr) throw std::bad_alloc();
  auto set = [&](int parameter, int value) {
    zstd_->set_parameter_(context_.get(), parameter, value);
  };
  set(kCompressionLevel, recipe == ZstdRecipe::kThorough ? 9 : 1);
  if (recipe == ZstdRecipe::kEntropy) {
    // Short hash, long minimal match and a huge step: the match finder runs through and only
    // literals are coded. A library that refuses a parameter still writes valid frames.
    set(kStrategy, 1);
    set(kHashLog, 6);
    set(kMinMatch, 7);
    set(kTargetLength, 131072);
    set(kLiteralCompressionMode, 1);
  }
}

std::size_t ZstdCompressor::compress(const void* data, std::size_t size, void* out,
                                     std::size_t capacity) {
  std::size_t written = zstd_->compress_(context_.get(), out, capacity, data, size);
  return zstd_->is_error_(written) ? 0 : written;
}

ZstdDecompressor::ZstdDecompressor(std::shared_ptr<const Zstd> zstd)
    : zstd_(std::move(zstd)), context_(zstd_->create_decompressor_(), zstd_->free_decompressor_) {
  if (context_ == nullptr) throw std::bad_alloc();
}

bool ZstdDecompressor::decompress(const void* frame, std::size_t frame_size, void* out,
                                  std::size_t size) {
  // The library itself would also decode several frames, one after the other.
  return zstd_->find_frame_size_(frame, frame_size) == frame_size &&
         zstd_->decompress_(context_.get(), out, size, frame, frame_size) == size;
}

}  // namespace pysnap
