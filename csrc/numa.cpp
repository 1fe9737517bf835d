#include "numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <fstream>

namespace pysnap {

namespace {

// Of linux/mempolicy.h, which belongs to another package than the C library.
constexpr int kPreferred = 1;
constexpr int kMostNodes = 1024;
constexpr int kBits = 8 * sizeof(unsigned long);

}  // namespace

std::optional<int> numa_node_of_pci(const std::string& bus_id, const std::string& folder) {
  std::string name = bus_id;
  // The driver writes its digits in upper case, the system in lower case.
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char digit) { return static_cast<char>(std::tolower(digit)); });
  std::ifstream file(folder + "/" + name + "/numa_node");
  int node = -1;
  file >> node;
  // The system writes -1 where it does not know.
  return file && node >= 0 && node < kMostNodes ? std::optional<int>(node) : std::nullopt;
}

void prefer_numa_node(void* memory, std::size_t size, int node) noexcept {
  unsigned long nodes[kMostNodes / kBits] = {};
  nodes[node / kBits] = 1UL << (node % kBits);
  // The system counts one bit less than it is told.
  ::syscall(SYS_mbind, memory, size, kPreferred, nodes, kMostNodes + 1UL, 0U);
}

}  // namespace pysnap
