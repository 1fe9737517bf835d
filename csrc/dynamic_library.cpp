#include "dynamic_library.h"

#include <dlfcn.h>

namespace pysnap {

std::unique_ptr<DynamicLibrary> DynamicLibrary::open(const std::string& name) {
  void* handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (handle == nullptr) return nullptr;
  return std::unique_ptr<DynamicLibrary>(new DynamicLibrary(handle));
}

void* DynamicLibrary::address(const char* name) const { return ::dlsym(handle_, name); }

}  // namespace pysnap
