// piece_kernel.h: copies between addresses of one device, many in one launch.
//
// Thousands of tensors have a few bytes each (a step count, a scale). A copy of each by the driver
// costs the caller 2 us and more, and the bus another; this costs some 5 us per 170 of them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda_driver.h"

namespace pysnap {

struct Piece {
  std::uint64_t from;
  std::uint64_t to;
  std::uint64_t length;
};

// What the kernel gets by value, so that nothing has to be kept until it has run. CUDA allows
// 4096 bytes.
constexpr std::size_t kPiecesPerLaunch = 170;
using Pieces = std::array<Piece, kPiecesPerLaunch>;
static_assert(sizeof(Pieces) <= 4096);

// The kernel, loaded into the context that is current; destroyed with the same one current.
// Immutable, so threads share it.
class PieceKernel {
 public:
  // Nothing where the driver refuses it: without a compiler for PTX, for instance. Loads it, and
  // launches it once on `stream`, as the first launch may wait for the device.
  static std::optional<PieceKernel> load(const CudaDriver& driver, CudaStream stream);

  PieceKernel(PieceKernel&& other) noexcept;
  PieceKernel& operator=(PieceKernel&&) = delete;
  ~PieceKernel();

  // Queues the copies on `stream`. Pieces must not overlap others' targets. Throws Error(kDevice).
  void copy(const std::vector<Piece>& pieces, CudaStream stream) const;

 private:
  PieceKernel(const CudaDriver& driver, CudaModule module) : driver_(driver), module_(module) {}
  CudaResult launch(const Piece* pieces, std::size_t count, CudaStream stream) const;

  const CudaDriver& driver_;
  CudaModule module_;
  CudaFunction function_ = nullptr;
};

}  // namespace pysnap
