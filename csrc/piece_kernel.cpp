#include "piece_kernel.h"

#include <algorithm>
#include <utility>

namespace pysnap {

namespace {

constexpr unsigned kThreads = 256;
// Bytes of the longest piece that one block of threads copies; how many blocks share a piece.
constexpr std::uint64_t kPerBlock = std::uint64_t{16} << 10;
constexpr std::uint64_t kMostBlocks = 64;

// For every device since Maxwell and every driver since CUDA 9. In C:
//
//   void copy_pieces(Pieces pieces) {
//     Piece piece = pieces[blockIdx.x];
//     step = gridDim.y * blockDim.x;  i = blockIdx.y * blockDim.x + threadIdx.x;
//     if ((piece.from | piece.to) % 16 == 0) {  // whole vectors of 16 bytes, then the rest
//       for (v = i; v < piece.length / 16; v += step) copy vector v;
//       i += piece.length / 16 * 16;
//     }
//     for (; i < piece.length; i += step) copy byte i;
//   }
constexpr const char* kSource = R"(
.version 6.0
.target sm_50
.address_size 64

.visible .entry copy_pieces(.param .align 8 .b8 pieces[4080])
{
  .reg .pred %p;
  .reg .b16 %byte;
  .reg .b32 %x, %y, %threads, %thread, %rows, %a, %b, %c, %d;
  .reg .b64 %piece, %from, %to, %length, %step, %i, %v, %vectors, %low, %at, %source, %target;

  mov.u32 %x, %ctaid.x;
  mov.u32 %y, %ctaid.y;
  mov.u32 %rows, %nctaid.y;
  mov.u32 %threads, %ntid.x;
  mov.u32 %thread, %tid.x;

  mov.b64 %piece, pieces;
  mul.wide.u32 %at, %x, 24;
  add.u64 %piece, %piece, %at;
  ld.param.u64 %from, [%piece];
  ld.param.u64 %to, [%piece+8];
  ld.param.u64 %length, [%piece+16];
  cvta.to.global.u64 %from, %from;
  cvta.to.global.u64 %to, %to;

  mul.wide.u32 %step, %rows, %threads;
  mul.wide.u32 %i, %y, %threads;
  cvt.u64.u32 %at, %thread;
  add.u64 %i, %i, %at;

  or.b64 %low, %from, %to;
  and.b64 %low, %low, 15;
  setp.ne.u64 %p, %low, 0;
  @%p bra bytes;

  shr.u64 %vectors, %length, 4;
  mov.u64 %v, %i;
next_vector:
  setp.ge.u64 %p, %v, %vectors;
  @%p bra behind_vectors;
  shl.b64 %at, %v, 4;
  add.u64 %source, %from, %at;
  add.u64 %target, %to, %at;
  ld.global.v4.b32 {%a, %b, %c, %d}, [%source];
  st.global.v4.b32 [%target], {%a, %b, %c, %d};
  add.u64 %v, %v, %step;
  bra next_vector;
behind_vectors:
  shl.b64 %at, %vectors, 4;
  add.u64 %i, %i, %at;

bytes:
  setp.ge.u64 %p, %i, %length;
  @%p bra done;
  add.u64 %source, %from, %i;
  add.u64 %target, %to, %i;
  ld.global.u8 %byte, [%source];
  st.global.u8 [%target], %byte;
  add.u64 %i, %i, %step;
  bra bytes;
done:
  ret;
}
)";

}  // namespace

std::optional<PieceKernel> PieceKernel::load(const CudaDriver& driver, CudaStream stream) {
  CudaModule module = nullptr;
  if (driver.cuModuleLoadData(&module, kSource) != kCudaSuccess) return std::nullopt;
  PieceKernel kernel(driver, module);
  const Piece nothing{0, 0, 0};
  if (driver.cuModuleGetFunction(&kernel.function_, module, "copy_pieces") != kCudaSuccess ||
      kernel.launch(&nothing, 1, stream) != kCudaSuccess) {
    return std::nullopt;
  }
  return kernel;
}

PieceKernel::PieceKernel(PieceKernel&& other) noexcept
    : driver_(other.driver_),
      module_(std::exchange(other.module_, nullptr)),
      function_(other.function_) {}

PieceKernel::~PieceKernel() {
  if (module_ != nullptr) driver_.cuModuleUnload(module_);
}

void PieceKernel::copy(const std::vector<Piece>& pieces, CudaStream stream) const {
  for (std::size_t i = 0; i < pieces.size(); i += kPiecesPerLaunch) {
    const std::size_t count = std::min(kPiecesPerLaunch, pieces.size() - i);
    driver_.check(launch(&pieces[i], count, stream), "a copy in device memory");
  }
}

CudaResult PieceKernel::launch(const Piece* pieces, std::size_t count, CudaStream stream) const {
  Pieces parameter{};
  std::copy_n(pieces, count, parameter.begin());
  std::uint64_t longest = 0;
  for (std::size_t i = 0; i < count; ++i) longest = std::max(longest, pieces[i].length);
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::uint64_t>(longest / kPerBlock, 1, kMostBlocks));
  void* parameters[] = {&parameter};
  return driver_.cuLaunchKernel(function_, static_cast<unsigned>(count), blocks, 1, kThreads, 1, 1,
                                0, stream, parameters, nullptr);
}

}  // namespace pysnap
