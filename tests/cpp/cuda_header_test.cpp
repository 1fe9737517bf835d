// Compares our prototypes of the CUDA driver with those of its header, where it is installed.

#include "cuda_driver.h"

#if __has_include(<cuda.h>)
#include <cuda.h>
#endif

#include <type_traits>

#include "check.h"

#if __has_include(<cuda.h>)

namespace {

using pysnap::CudaDriver;

// A function of cuda.h with our types in place of its enums.
template <typename Type>
struct Ours;
template <typename... Arguments>
struct Ours<CUresult (*)(Arguments...)> {
  template <typename Argument>
  using Type = std::conditional_t<
      std::is_same_v<Argument, CUresult>, pysnap::CudaResult,
      std::conditional_t<std::is_same_v<Argument, CUstreamCaptureMode*>, pysnap::CudaCaptureMode*,
                         std::conditional_t<std::is_same_v<Argument, CUstreamCaptureStatus*>,
                                            pysnap::CudaCaptureStatus*, Argument>>>;
  using Function = pysnap::CudaResult (*)(Type<Arguments>...);
};

#define SAME_TYPE(name) \
  static_assert(        \
      std::is_same_v<typename Ours<decltype(&::name)>::Function, decltype(CudaDriver::name)>)
SAME_TYPE(cuInit);
SAME_TYPE(cuGetErrorString);
SAME_TYPE(cuDeviceGetCount);
SAME_TYPE(cuDeviceGet);
SAME_TYPE(cuDeviceGetPCIBusId);
SAME_TYPE(cuDevicePrimaryCtxRetain);
SAME_TYPE(cuDevicePrimaryCtxRelease_v2);
SAME_TYPE(cuCtxPushCurrent_v2);
SAME_TYPE(cuCtxPopCurrent_v2);
SAME_TYPE(cuStreamCreate);
SAME_TYPE(cuStreamDestroy_v2);
SAME_TYPE(cuStreamQuery);
SAME_TYPE(cuStreamIsCapturing);
SAME_TYPE(cuThreadExchangeStreamCaptureMode);
SAME_TYPE(cuStreamWaitEvent);
SAME_TYPE(cuEventCreate);
SAME_TYPE(cuEventDestroy_v2);
SAME_TYPE(cuEventRecord);
SAME_TYPE(cuEventQuery);
SAME_TYPE(cuMemAlloc_v2);
SAME_TYPE(cuMemFree_v2);
SAME_TYPE(cuMemHostRegister_v2);
SAME_TYPE(cuMemHostUnregister);
SAME_TYPE(cuMemcpyDtoHAsync_v2);
SAME_TYPE(cuMemcpyHtoDAsync_v2);
SAME_TYPE(cuMemcpyDtoDAsync_v2);
SAME_TYPE(cuModuleLoadData);
SAME_TYPE(cuModuleUnload);
SAME_TYPE(cuModuleGetFunction);
SAME_TYPE(cuLaunchKernel);

static_assert(sizeof(CUresult) == sizeof(pysnap::CudaResult));
static_assert(CUDA_SUCCESS == pysnap::kCudaSuccess);
static_assert(CUDA_ERROR_NOT_READY == pysnap::kCudaNotReady);
static_assert(CUDA_ERROR_DEINITIALIZED == pysnap::kCudaDeinitialized);
static_assert(CUDA_ERROR_INVALID_CONTEXT == pysnap::kCudaInvalidContext);
static_assert(CUDA_ERROR_CONTEXT_IS_DESTROYED == pysnap::kCudaContextIsDestroyed);
static_assert(CU_STREAM_CAPTURE_MODE_RELAXED == pysnap::kCudaCaptureRelaxed);
static_assert(CU_STREAM_CAPTURE_STATUS_NONE == pysnap::kCudaNotCapturing);
static_assert(CU_STREAM_NON_BLOCKING == pysnap::kCudaNonBlockingStream);
static_assert(CU_EVENT_DISABLE_TIMING == pysnap::kCudaEventWithoutTiming);
static_assert(CU_MEMHOSTREGISTER_PORTABLE == pysnap::kCudaPortable);

constexpr bool kCompared = true;

}  // namespace

#else

namespace {
constexpr bool kCompared = false;
}

#endif

TEST(prototypes_were_compared_when_this_was_compiled) {
  if (!kCompared) std::printf("  not compared: there is no cuda.h\n");
}
