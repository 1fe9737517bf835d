#include "cuda_driver.h"

#include <utility>

#include "error.h"

namespace pysnap {

namespace {

Error unavailable(const std::string& why) {
  return Error(ErrorKind::kInvalid, "CUDA devices cannot be used: " + why);
}

}  // namespace

std::shared_ptr<const CudaDriver> CudaDriver::open(const std::string& name) {
  std::unique_ptr<DynamicLibrary> library = DynamicLibrary::open(name);
  if (library == nullptr) throw unavailable(name + ", a part of NVIDIA's driver, cannot be opened");
  std::shared_ptr<CudaDriver> driver(new CudaDriver(std::move(library)));
  if (const std::string missing = driver->missing_symbol(); !missing.empty())
    throw unavailable(name + " has no " + missing + "; a newer NVIDIA driver is needed");
  if (const CudaResult result = driver->cuInit(0); result != kCudaSuccess)
    throw unavailable("cuInit failed: " + driver->describe(result));
  if (const CudaResult result = driver->cuDeviceGetCount(&driver->device_count_);
      result != kCudaSuccess) {
    throw unavailable("cuDeviceGetCount failed: " + driver->describe(result));
  }
  if (driver->device_count_ < 1) throw unavailable("the driver finds no device");
  return driver;
}

// Resolves every function; the name of one that the library lacks, else empty.
std::string CudaDriver::missing_symbol() {
  std::string missing;
  auto resolve = [&](const char* name, auto*& function) {
    function = library_->symbol<std::remove_reference_t<decltype(*function)>>(name);
    if (function == nullptr && missing.empty()) missing = name;
  };
  resolve("cuInit", cuInit);
  resolve("cuGetErrorString", cuGetErrorString);
  resolve("cuDeviceGetCount", cuDeviceGetCount);
  resolve("cuDeviceGet", cuDeviceGet);
  resolve("cuDeviceGetPCIBusId", cuDeviceGetPCIBusId);
  resolve("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain);
  resolve("cuDevicePrimaryCtxRelease_v2", cuDevicePrimaryCtxRelease_v2);
  resolve("cuCtxPushCurrent_v2", cuCtxPushCurrent_v2);
  resolve("cuCtxPopCurrent_v2", cuCtxPopCurrent_v2);
  resolve("cuStreamCreate", cuStreamCreate);
  resolve("cuStreamDestroy_v2", cuStreamDestroy_v2);
  resolve("cuStreamQuery", cuStreamQuery);
  resolve("cuStreamIsCapturing", cuStreamIsCapturing);
  resolve("cuThreadExchangeStreamCaptureMode", cuThreadExchangeStreamCaptureMode);
  resolve("cuStreamWaitEvent", cuStreamWaitEvent);
  resolve("cuEventCreate", cuEventCreate);
  resolve("cuEventDestroy_v2", cuEventDestroy_v2);
  resolve("cuEventRecord", cuEventRecord);
  resolve("cuEventQuery", cuEventQuery);
  resolve("cuMemAlloc_v2", cuMemAlloc_v2);
  resolve("cuMemFree_v2", cuMemFree_v2);
  resolve("cuMemHostRegister_v2", cuMemHostRegister_v2);
  resolve("cuMemHostUnregister", cuMemHostUnregister);
  resolve("cuMemcpyDtoHAsync_v2", cuMemcpyDtoHAsync_v2);
  resolve("cuMemcpyHtoDAsync_v2", cuMemcpyHtoDAsync_v2);
  resolve("cuMemcpyDtoDAsync_v2", cuMemcpyDtoDAsync_v2);
  resolve("cuModuleLoadData", cuModuleLoadData);
  resolve("cuModuleUnload", cuModuleUnload);
  resolve("cuModuleGetFunction", cuModuleGetFunction);
  resolve("cuLaunchKernel", cuLaunchKernel);
  return missing;
}

std::string CudaDriver::describe(CudaResult result) const {
  const char* words = nullptr;
  if (cuGetErrorString(result, &words) != kCudaSuccess || words == nullptr)
    return "error " + std::to_string(result);
  return std::string(words) + " (error " + std::to_string(result) + ")";
}

void CudaDriver::check(CudaResult result, const char* doing) const {
  if (result != kCudaSuccess)
    throw Error(ErrorKind::kDevice, std::string(doing) + " failed: " + describe(result));
}

std::optional<std::string> cuda_unavailable() {
  try {
    CudaDriver::open();
    return std::nullopt;
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace pysnap
