// numa.h: which memory of a machine with several sockets is near a device.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace pysnap {

// The NUMA node of a PCI device, as `folder` of the system tells it; nothing where it does not.
std::optional<int> numa_node_of_pci(const std::string& bus_id,
                                    const std::string& folder = "/sys/bus/pci/devices");

// Has pages of the memory that are touched from now on come from that node, as long as it has any.
// Page-aligned. Does nothing where the system refuses: the memory is slower, nothing else.
void prefer_numa_node(void* memory, std::size_t size, int node) noexcept;

}  // namespace pysnap
