#include "numa.h"

#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

#include "check.h"
#include "fixture.h"

namespace {

std::optional<int> node_written_as(const std::string& text) {
  const fixture::TemporaryDirectory folder;
  const std::string device = folder / "0000:3b:00.0";
  std::filesystem::create_directory(device);
  std::ofstream(device + "/numa_node") << text;
  // As the driver writes it.
  return pysnap::numa_node_of_pci("0000:3B:00.0", folder / "");
}

}  // namespace

TEST(the_node_of_a_device_is_what_the_system_says) {
  CHECK(node_written_as("0\n") == 0);
  CHECK(node_written_as("17\n") == 17);
}

TEST(where_the_system_does_not_know_there_is_none) {
  for (const char* text : {"-1\n", "", "x", "4096\n"}) CHECK(!node_written_as(text).has_value());
  CHECK(!pysnap::numa_node_of_pci("0000:3B:00.0", "/nonexistent").has_value());
}
