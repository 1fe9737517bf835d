// error.h: the one exception type of the C++ half.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace pysnap {

enum class ErrorKind {
  kInvalid,  // the caller passed something that cannot be
  kIo,       // the operating system refused; error_number() and path() say what and where
  kDevice,   // a CUDA device or its driver refused, or a copy there failed
  kTorn,     // memory changed before it was copied; chunk() says where
  kCorrupt,  // stored bytes are not what was written; path() and chunk() say where
  kClosed,   // the engine is closed, the job was aborted, or this is a forked child
};

// what() is one sentence that a user can read. Copyable, so that a background failure can be kept
// and thrown again.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}

  // "<doing> <path> failed: <strerror>".
  static Error io(const std::string& doing, const std::string& path, int error_number);
  static Error torn(std::size_t chunk);
  // "<path>, chunk <chunk>: <what>"; "<path>: <what>" where `chunk` is -1.
  static Error corrupt(const std::string& path, std::int64_t chunk, const std::string& what);
  // What was caught where nothing may be thrown: an Error as it is, anything else as lack of
  // memory.
  static Error from(const std::exception& caught);

  ErrorKind kind() const { return kind_; }
  int error_number() const { return error_number_; }
  const std::string& path() const { return path_; }
  std::int64_t chunk() const { return chunk_; }  // -1 where none is concerned

 private:
  ErrorKind kind_;
  int error_number_ = 0;
  std::string path_;
  std::int64_t chunk_ = -1;
};

}  // namespace pysnap
