#include "places.h"

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace {

using pysnap::Places;
using pysnap::dlpack::Tensor;

// What stands for a Python object here.
struct Object {
  std::uint64_t address = 4096;
  std::vector<std::int64_t> shape{2, 3};
  std::vector<std::int64_t> strides{3, 1};
  Tensor rest{nullptr, 1, 0, 0, 2, 32, 1, nullptr, nullptr, 0};
  bool refused = false;
};

int read(void* pointer, Tensor* tensor) {
  Object& object = *static_cast<Object*>(pointer);
  if (object.refused) return -1;
  *tensor = object.rest;
  tensor->data = reinterpret_cast<void*>(static_cast<std::uintptr_t>(object.address));
  tensor->dimensions = static_cast<std::int32_t>(object.shape.size());
  tensor->shape = object.shape.data();
  tensor->strides = object.strides.data();
  return 0;
}

// Need not be right.
std::uintptr_t address(void* pointer) {
  return static_cast<std::uintptr_t>(static_cast<Object*>(pointer)->address);
}

std::vector<void*> pointers(std::vector<Object>& objects) {
  std::vector<void*> all;
  for (Object& object : objects) all.push_back(&object);
  return all;
}

// Three tensors, one of them without dimensions.
std::vector<Object> some() {
  std::vector<Object> objects(3);
  objects[1].shape.clear();
  objects[1].strides.clear();
  objects[2].address = 8192;
  return objects;
}

template <typename Change>
bool is_seen(Change change) {
  std::vector<Object> objects = some();
  const std::optional<Places> places = Places::of(read, pointers(objects));
  for (Object& object : objects) {
    const Object before = object;
    change(object);
    const bool same = *places->are_of(read, pointers(objects), address);
    object = before;
    if (same) return false;
  }
  return *places->are_of(read, pointers(objects), address);
}

TEST(any_difference_of_any_tensor_is_seen) {
  CHECK(is_seen([](Object& o) { ++o.address; }));
  CHECK(is_seen([](Object& o) { o.rest.byte_offset = 8; }));
  CHECK(is_seen([](Object& o) { o.rest.device_type = 2; }));
  CHECK(is_seen([](Object& o) { o.rest.device_id = 1; }));
  CHECK(is_seen([](Object& o) { o.rest.type_code = 4; }));
  CHECK(is_seen([](Object& o) { o.rest.type_bits = 16; }));
  CHECK(is_seen([](Object& o) { o.rest.type_lanes = 2; }));
  CHECK(is_seen([](Object& o) {
    o.shape.push_back(1);
    o.strides.push_back(1);
  }));
}

TEST(other_shapes_and_strides_are_seen) {
  for (std::size_t at = 0; at < 2; ++at) {
    std::vector<Object> objects = some();
    const std::optional<Places> places = Places::of(read, pointers(objects));
    objects[2].shape[at] = 5;
    CHECK(!*places->are_of(read, pointers(objects), address));
    objects = some();
    objects[0].strides[at] = 5;
    CHECK(!*places->are_of(read, pointers(objects), address));
  }
}

TEST(an_address_and_an_offset_count_together) {
  std::vector<Object> objects = some();
  const std::optional<Places> places = Places::of(read, pointers(objects));
  objects[0].address -= 64;
  objects[0].rest.byte_offset = 64;
  CHECK(*places->are_of(read, pointers(objects), address));
}

TEST(every_tensor_of_many_is_looked_at) {
  std::vector<Object> objects(100);
  const std::optional<Places> places = Places::of(read, pointers(objects));
  CHECK(*places->are_of(read, pointers(objects), address));
  for (Object& object : objects) {
    object.rest.device_id = 1;
    CHECK(!*places->are_of(read, pointers(objects), address));
    object.rest.device_id = 0;
  }
}

TEST(fewer_or_more_tensors_are_others) {
  std::vector<Object> objects = some();
  const std::optional<Places> places = Places::of(read, pointers(objects));
  std::vector<void*> others = pointers(objects);
  others.pop_back();
  CHECK(!*places->are_of(read, others, address));
  others = pointers(objects);
  others.push_back(others[0]);
  CHECK(!*places->are_of(read, others, address));
  CHECK(*Places().are_of(read, {}, address));
}

TEST(a_refusal_is_told) {
  std::vector<Object> objects = some();
  const std::optional<Places> places = Places::of(read, pointers(objects));
  objects[2].refused = true;
  CHECK(!places->are_of(read, pointers(objects), address).has_value());
  CHECK(!Places::of(read, pointers(objects)).has_value());
}

}  // namespace
