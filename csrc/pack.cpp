#include "pack.h"

#include <cstring>

namespace pysnap {

PackWriter::PackWriter(const std::string& path, std::uint64_t expected, bool direct)
    : file_(File::create(path, direct)) {
  file_.reserve(expected);
}

std::uint64_t PackWriter::append(std::uint8_t* data, std::size_t stored) {
  const std::size_t padded = round_up(stored, kPageSize);
  std::memset(data + stored, 0, padded - stored);
  const std::uint64_t offset = end_.fetch_add(padded);
  file_.write_at(data, padded, offset);
  return offset;
}

std::uint64_t PackWriter::finish() {
  const std::uint64_t size = end_.load();
  file_.truncate(size);
  file_.sync();
  file_.close();
  return size;
}

}  // namespace pysnap
