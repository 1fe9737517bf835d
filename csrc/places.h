// places.h: where the bytes of many tensors are, and what they mean, compared in one pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ahead.h"
#include "dlpack.h"

namespace pysnap {

// The memory of some tensors: address, device, type of element, shape and strides of each. It holds
// no tensor. Immutable, but whoever reads tensors needs the GIL.
class Places {
 public:
  Places() = default;  // of no tensor
  // Null where `read` refuses one of these Python objects; a Python exception is set then.
  static std::optional<Places> of(dlpack::TensorFromObject read, const std::vector<void*>& tensors);

  // Whether these tensors have the same memory, one by one, and it means the same. Null where
  // `read` refuses one; a Python exception is set then. `content` is where `read` will look, too.
  std::optional<bool> are_of(dlpack::TensorFromObject read, const std::vector<void*>& tensors,
                             Content content) const;

 private:
  // A tensor without its shape and strides, which are in dimensions_, one behind the other.
  struct Tensor {
    std::uint64_t address;
    std::int32_t device_type;
    std::int32_t device_id;
    std::uint32_t type;
    std::int32_t dimensions;
  };
  static Tensor described(const dlpack::Tensor& tensor);

  std::vector<Tensor> tensors_;
  std::vector<std::int64_t> dimensions_;
};

}  // namespace pysnap
