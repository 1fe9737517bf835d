#include "error.h"

#include <cerrno>
#include <system_error>

namespace pysnap {

namespace {

// Made at the start and never destroyed: to tell that there is no memory must need none.
const Error& no_memory = *new Error(Error::io("allocating memory for", "a chunk", ENOMEM));

}  // namespace

Error Error::io(const std::string& doing, const std::string& path, int error_number) {
  // std::generic_category().message is thread safe, strerror is not.
  Error error(ErrorKind::kIo,
              doing + " " + path + " failed: " + std::generic_category().message(error_number));
  error.error_number_ = error_number;
  error.path_ = path;
  return error;
}

Error Error::torn(std::size_t chunk) {
  Error error(ErrorKind::kTorn, "memory changed before it was copied");
  error.chunk_ = static_cast<std::int64_t>(chunk);
  return error;
}

Error Error::corrupt(const std::string& path, std::int64_t chunk, const std::string& what) {
  const std::string where = chunk < 0 ? path : path + ", chunk " + std::to_string(chunk);
  Error error(ErrorKind::kCorrupt, where + ": " + what);
  error.path_ = path;
  error.chunk_ = chunk;
  return error;
}

Error Error::from(const std::exception& caught) {
  if (const Error* error = dynamic_cast<const Error*>(&caught)) return *error;
  return no_memory;
}

}  // namespace pysnap
