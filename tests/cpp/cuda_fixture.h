// What the tests of the CUDA path need: the fake driver, and tensors in its memory.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "engine.h"
#include "fake_cuda/fake_cuda.h"
#include "fixture.h"
#include "restore.h"

namespace fixture {

inline const FakeCuda& fake() {
  static const FakeCuda* const controls = [] {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    void* symbol = library != nullptr ? ::dlsym(library, "fake_cuda") : nullptr;
    if (symbol == nullptr)
      throw std::runtime_error("run this by ctest: libcuda.so.1 is not the fake one");
    return reinterpret_cast<decltype(&fake_cuda)>(symbol)();
  }();
  return *controls;
}

// Declared first in a test: healthy devices at its start, and at its end nothing left and no rule
// of the driver broken.
class HealthyDriver {
 public:
  HealthyDriver() { fake().reset(); }
  HealthyDriver(const HealthyDriver&) = delete;
  HealthyDriver& operator=(const HealthyDriver&) = delete;
  ~HealthyDriver() {
    fake().release();
    fake().finish();
    CHECK_EQ(fake().violation(), "");
    CHECK_EQ(fake().leaks(), "");
  }
};

// Tensors on devices and on the host in turn, and the stream that they make.
class DeviceState {
 public:
  // `devices` are taken in turn; the streams are the default ones where `default_streams`.
  DeviceState(const std::vector<std::size_t>& sizes,
              const std::vector<pysnap::DeviceIndex>& devices, bool default_streams = false) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const pysnap::DeviceIndex device = devices[i % devices.size()];
      Bytes bytes = skewed_elements(sizes[i], 4, i);
      stream_.insert(stream_.end(), bytes.begin(), bytes.end());
      if (device == pysnap::kHost) {
        host_.push_back(std::move(bytes));
        extents_.push_back(
            {reinterpret_cast<std::uintptr_t>(host_.back().data()), sizes[i], device});
      } else {
        const std::uint64_t address = fake().allocate(device, sizes[i]);
        fake().poke(address, bytes.data(), bytes.size());
        extents_.push_back({address, sizes[i], device});
      }
    }
    for (pysnap::DeviceIndex device : devices) {
      const bool known = std::any_of(streams_.begin(), streams_.end(),
                                     [&](const auto& stream) { return stream.first == device; });
      if (device != pysnap::kHost && !known)
        streams_.push_back({device, default_streams ? 0 : fake().make_stream(device)});
    }
  }

  const std::vector<pysnap::Extent>& extents() const { return extents_; }
  const Bytes& stream() const { return stream_; }
  const pysnap::Streams& streams() const { return streams_; }

  std::vector<pysnap::Span> spans(std::size_t chunk) const {
    std::vector<pysnap::Span> spans;
    for (std::size_t at = 0; at < stream_.size(); at += chunk) {
      spans.push_back(
          {static_cast<std::uint32_t>(std::min(chunk, stream_.size() - at)), pysnap::Element::kU8});
    }
    return spans;
  }

  // The whole stream.
  std::vector<pysnap::Target> targets() const {
    std::vector<pysnap::Target> targets;
    std::uint64_t offset = 0;
    for (const pysnap::Extent& extent : extents_) {
      targets.push_back({offset, extent.address, extent.length, extent.device});
      offset += extent.length;
    }
    return targets;
  }

  // What the next training step does: queued on the streams of the devices, at once on the host.
  void fill(std::uint8_t byte) {
    for (Bytes& tensor : host_) std::fill(tensor.begin(), tensor.end(), byte);
    for (const auto& [device, stream] : streams_) {
      for (const pysnap::Extent& extent : extents_) {
        if (extent.device == device)
          fake().fill(device, stream, extent.address, byte, extent.length);
      }
    }
  }

  // The memory is given back at once, as to another process.
  void free() {
    for (const pysnap::Extent& extent : extents_) {
      if (extent.device != pysnap::kHost) fake().free(extent.address);
    }
    host_.clear();
    extents_.clear();
  }

  // What is in the tensors now, whatever is queued.
  Bytes now() const {
    Bytes bytes;
    for (const pysnap::Extent& extent : extents_) {
      Bytes tensor(extent.length);
      if (extent.device == pysnap::kHost) {
        const auto* data = reinterpret_cast<const std::uint8_t*>(extent.address);
        std::copy(data, data + extent.length, tensor.begin());
      } else {
        fake().peek(extent.address, tensor.data(), tensor.size());
      }
      bytes.insert(bytes.end(), tensor.begin(), tensor.end());
    }
    return bytes;
  }

 private:
  std::vector<Bytes> host_;
  std::vector<pysnap::Extent> extents_;
  Bytes stream_;
  pysnap::Streams streams_;
};

// Tiny ones among others, some longer than a chunk of 16 KiB, one of no bytes.
inline std::vector<std::size_t> mixed_sizes() {
  std::vector<std::size_t> sizes(150, 4);
  for (std::size_t size : {50'000, 3, 0, 16'384, 1, 1000, 70'001}) sizes.push_back(size);
  sizes.insert(sizes.end(), 150, 8);
  return sizes;
}

}  // namespace fixture
