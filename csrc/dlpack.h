// dlpack.h: the part of DLPack's C exchange that pysnap uses, so that one binary reads the tensors
// of any torch that has it (2.10 and newer) and builds without torch. The layout is fixed by the
// standard for one major version (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace pysnap::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
// Of the capsule that a tensor's type has as `__dlpack_c_exchange_api__`.
constexpr const char* kCapsuleName = "dlpack_exchange_api";

// What a tensor object says of its memory; `shape` and `strides` (in elements) belong to it.
struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t dimensions;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// Fills `tensor` from a Python object of the type whose table this is in. Needs the GIL. Nonzero,
// with a Python exception set, for an object without memory that can be described so.
using TensorFromObject = int (*)(void* object, Tensor* tensor);

// The table of functions in the capsule.
struct Exchange {
  std::uint32_t major;
  std::uint32_t minor;
  Exchange* previous;
  void* unused[3];
  TensorFromObject tensor_from_object;  // may be null
  void* current_stream;
};

}  // namespace pysnap::dlpack
