#include "places.h"

#include <algorithm>
#include <tuple>

namespace pysnap {

Places::Tensor Places::described(const dlpack::Tensor& tensor) {
  return {reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset, tensor.device_type,
          tensor.device_id,
          static_cast<std::uint32_t>(tensor.type_code) << 24 |
              static_cast<std::uint32_t>(tensor.type_bits) << 16 | tensor.type_lanes,
          tensor.dimensions};
}

std::optional<Places> Places::of(dlpack::TensorFromObject read, const std::vector<void*>& tensors) {
  Places places;
  places.tensors_.reserve(tensors.size());
  for (void* object : tensors) {
    dlpack::Tensor tensor{};
    if (read(object, &tensor) != 0) return std::nullopt;
    places.tensors_.push_back(described(tensor));
    for (const std::int64_t* numbers : {tensor.shape, tensor.strides})
      places.dimensions_.insert(places.dimensions_.end(), numbers, numbers + tensor.dimensions);
  }
  return places;
}

std::optional<bool> Places::are_of(dlpack::TensorFromObject read, const std::vector<void*>& tensors,
                                   Content content) const {
  if (tensors.size() != tensors_.size()) return false;
  const auto fields = [](const Tensor& t) {
    return std::tie(t.address, t.device_type, t.device_id, t.type, t.dimensions);
  };
  const std::int64_t* dimensions = dimensions_.data();
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    look_ahead(tensors.data(), tensors.size(), i, content);
    const Tensor& before = tensors_[i];
    dlpack::Tensor tensor{};
    if (read(tensors[i], &tensor) != 0) return std::nullopt;
    if (fields(described(tensor)) != fields(before)) return false;
    for (const std::int64_t* numbers : {tensor.shape, tensor.strides}) {
      if (!std::equal(numbers, numbers + before.dimensions, dimensions)) return false;
      dimensions += before.dimensions;
    }
  }
  return true;
}

}  // namespace pysnap
