// bindings_objects.h: what a snapshot's plan asks of thousands of Python objects, in one call each.
#pragma once

#include <pybind11/pybind11.h>

namespace pysnap {

// Adds it to the module.
void bind_objects(pybind11::module_& module);

}  // namespace pysnap
