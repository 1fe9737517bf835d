#include "cuda_driver.h"

#include <string>

#include "check.h"
#include "cuda_fixture.h"
#include "error.h"

namespace {

using fixture::fake;
using fixture::HealthyDriver;
using pysnap::cuda_unavailable;
using pysnap::CudaDriver;

// What open() says; empty if it succeeds.
std::string refusal(const std::string& name) {
  try {
    CudaDriver::open(name);
    return "";
  } catch (const pysnap::Error& error) {
    CHECK(error.kind() == pysnap::ErrorKind::kInvalid);
    return error.what();
  }
}

}  // namespace

TEST(a_healthy_driver_opens) {
  const HealthyDriver driver;
  CHECK(!cuda_unavailable());
  CHECK_EQ(CudaDriver::open()->device_count(), 2);
}

TEST(a_driver_that_is_not_installed_is_named) {
  CHECK_EQ(refusal("libnowhere.so.1"),
           "CUDA devices cannot be used: libnowhere.so.1, a part of NVIDIA's driver, cannot be "
           "opened");
}

TEST(a_driver_that_lacks_a_function_is_named) {
  CHECK_EQ(refusal("libc.so.6"),
           "CUDA devices cannot be used: libc.so.6 has no cuInit; a newer NVIDIA driver is needed");
}

TEST(a_driver_that_does_not_start_says_why) {
  const HealthyDriver driver;
  fake().fail_call("cuInit", 1, 100);
  CHECK_EQ(cuda_unavailable().value_or(""),
           "CUDA devices cannot be used: cuInit failed: a fake error (error 100)");
  fake().fail_call("cuDeviceGetCount", 1, 3);
  CHECK_EQ(cuda_unavailable().value_or(""),
           "CUDA devices cannot be used: cuDeviceGetCount failed: a fake error (error 3)");
  fake().set_device_count(0);
  CHECK_EQ(cuda_unavailable().value_or(""),
           "CUDA devices cannot be used: the driver finds no device");
}

TEST(a_device_that_is_not_there_is_refused) {
  const HealthyDriver driver;
  for (const pysnap::DeviceIndex index : {-2, 2, 100})
    CHECK_EQ(fixture::thrown_by([&] { pysnap::open_device(index); }), "invalid");
  fake().set_device_count(0);
  CHECK_EQ(fixture::thrown_by([&] { pysnap::open_device(0); }), "invalid");
}
