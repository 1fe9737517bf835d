// cuda_driver.h: the part of the CUDA driver API that pysnap uses, opened at run time, so that one
// binary runs with and without a GPU and builds without CUDA's headers.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "dynamic_library.h"

// The names that cuda.h has for what its handles point to: with them, the types below are cuda.h's.
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
struct CUmod_st;
struct CUfunc_st;

namespace pysnap {

using CudaResult = int;  // cuda.h has an enum; the same to a caller
using CudaContext = CUctx_st*;
using CudaStream = CUstream_st*;
using CudaEvent = CUevent_st*;
using CudaModule = CUmod_st*;
using CudaFunction = CUfunc_st*;
using CudaCaptureMode = int;  // an enum in cuda.h, as the next
using CudaCaptureStatus = int;
using CudaAddress = unsigned long long;

constexpr CudaResult kCudaSuccess = 0;
constexpr CudaResult kCudaNotReady = 600;
// No copy of the context is under way any more.
constexpr CudaResult kCudaDeinitialized = 4;
constexpr CudaResult kCudaInvalidContext = 201;
constexpr CudaResult kCudaContextIsDestroyed = 709;
constexpr unsigned kCudaNonBlockingStream = 1;
constexpr unsigned kCudaEventWithoutTiming = 2;
constexpr unsigned kCudaPortable = 1;
constexpr CudaCaptureMode kCudaCaptureRelaxed = 2;
constexpr CudaCaptureStatus kCudaNotCapturing = 0;

// The functions of one driver, under the names of their symbols; tests/cpp/cuda_header_test.cpp
// compares them with cuda.h. Where there is a _v2, the plain name is an old function with 32-bit
// sizes. Immutable after open(), so threads share it.
class CudaDriver {
 public:
  // Opens and initialises the driver. Throws Error(kInvalid) that says why CUDA devices cannot be
  // used. A process that did this must not use CUDA in a forked child (nor does torch).
  static std::shared_ptr<const CudaDriver> open(const std::string& name = "libcuda.so.1");

  // At least 1.
  int device_count() const { return device_count_; }

  // Throws Error(kDevice), "<doing> failed: <the driver's words>", unless `result` is success.
  void check(CudaResult result, const char* doing) const;

  CudaResult (*cuInit)(unsigned) = nullptr;
  CudaResult (*cuGetErrorString)(CudaResult, const char**) = nullptr;
  CudaResult (*cuDeviceGetCount)(int*) = nullptr;
  CudaResult (*cuDeviceGet)(int*, int) = nullptr;
  CudaResult (*cuDeviceGetPCIBusId)(char*, int, int) = nullptr;
  CudaResult (*cuDevicePrimaryCtxRetain)(CudaContext*, int) = nullptr;
  CudaResult (*cuDevicePrimaryCtxRelease_v2)(int) = nullptr;
  CudaResult (*cuCtxPushCurrent_v2)(CudaContext) = nullptr;
  CudaResult (*cuCtxPopCurrent_v2)(CudaContext*) = nullptr;
  CudaResult (*cuStreamCreate)(CudaStream*, unsigned) = nullptr;
  CudaResult (*cuStreamDestroy_v2)(CudaStream) = nullptr;
  CudaResult (*cuStreamQuery)(CudaStream) = nullptr;
  CudaResult (*cuStreamIsCapturing)(CudaStream, CudaCaptureStatus*) = nullptr;
  CudaResult (*cuThreadExchangeStreamCaptureMode)(CudaCaptureMode*) = nullptr;
  CudaResult (*cuStreamWaitEvent)(CudaStream, CudaEvent, unsigned) = nullptr;
  CudaResult (*cuEventCreate)(CudaEvent*, unsigned) = nullptr;
  CudaResult (*cuEventDestroy_v2)(CudaEvent) = nullptr;
  CudaResult (*cuEventRecord)(CudaEvent, CudaStream) = nullptr;
  CudaResult (*cuEventQuery)(CudaEvent) = nullptr;
  CudaResult (*cuMemAlloc_v2)(CudaAddress*, std::size_t) = nullptr;
  CudaResult (*cuMemFree_v2)(CudaAddress) = nullptr;
  CudaResult (*cuMemHostRegister_v2)(void*, std::size_t, unsigned) = nullptr;
  CudaResult (*cuMemHostUnregister)(void*) = nullptr;
  CudaResult (*cuMemcpyDtoHAsync_v2)(void*, CudaAddress, std::size_t, CudaStream) = nullptr;
  CudaResult (*cuMemcpyHtoDAsync_v2)(CudaAddress, const void*, std::size_t, CudaStream) = nullptr;
  CudaResult (*cuMemcpyDtoDAsync_v2)(CudaAddress, CudaAddress, std::size_t, CudaStream) = nullptr;
  CudaResult (*cuModuleLoadData)(CudaModule*, const void*) = nullptr;
  CudaResult (*cuModuleUnload)(CudaModule) = nullptr;
  CudaResult (*cuModuleGetFunction)(CudaFunction*, CudaModule, const char*) = nullptr;
  CudaResult (*cuLaunchKernel)(CudaFunction, unsigned, unsigned, unsigned, unsigned, unsigned,
                               unsigned, unsigned, CudaStream, void**, void**) = nullptr;

 private:
  explicit CudaDriver(std::unique_ptr<DynamicLibrary> library) : library_(std::move(library)) {}
  std::string missing_symbol();
  std::string describe(CudaResult result) const;

  const std::unique_ptr<DynamicLibrary> library_;
  int device_count_ = 0;
};

// Why CUDA devices cannot be used, as a sentence; nothing where they can.
std::optional<std::string> cuda_unavailable();

}  // namespace pysnap
