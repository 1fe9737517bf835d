// dynamic_library.h: a shared library that is opened at run time, so that the build needs neither
// its headers nor the library.
#pragma once

#include <memory>
#include <string>

namespace pysnap {

// The library stays loaded for the life of the process: threads may still run in it when the owner
// goes.
class DynamicLibrary {
 public:
  // Null where the library cannot be opened.
  static std::unique_ptr<DynamicLibrary> open(const std::string& name);

  // Null where there is no such symbol.
  template <typename Function>
  Function* symbol(const char* name) const {
    return reinterpret_cast<Function*>(address(name));
  }

 private:
  explicit DynamicLibrary(void* handle) : handle_(handle) {}
  void* address(const char* name) const;

  void* handle_;
};

}  // namespace pysnap
