#include "bindings_objects.h"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ahead.h"
#include "dlpack.h"
#include "error.h"
#include "places.h"

namespace py = pybind11;

namespace pysnap {
namespace {

// What the first field of a Python object points to, if that is a pointer; of a tensor of torch,
// that is where nearly every question is answered.
std::uintptr_t first_field(void* pointer) {
  auto* object = static_cast<PyObject*>(pointer);
  std::uintptr_t field = 0;
  if (Py_TYPE(object)->tp_basicsize >= Py_ssize_t{sizeof(PyObject) + sizeof(field)})
    std::memcpy(&field, object + 1, sizeof(field));
  return field;
}

// Of a list or a tuple, which holds the objects.
std::vector<void*> pointers_to(const py::handle& sequence) {
  PyObject** const first = PySequence_Fast_ITEMS(sequence.ptr());
  return std::vector<void*>(first, first + PySequence_Fast_GET_SIZE(sequence.ptr()));
}

py::list map_ahead(const py::function& function, const py::list& objects) {
  const py::tuple held(objects);  // whatever the function does to the list
  const std::vector<void*> pointers = pointers_to(held);
  py::list results;
  for (std::size_t at = 0; at < pointers.size(); ++at) {
    look_ahead(pointers.data(), pointers.size(), at, first_field);
    PyObject* result = PyObject_CallOneArg(function.ptr(), static_cast<PyObject*>(pointers[at]));
    if (result == nullptr) throw py::error_already_set();
    results.append(py::reinterpret_steal<py::object>(result));
  }
  return results;
}

// Places of tensors that are of a type with this table. Torch is not known here, only its table.
class TensorPlaces {
 public:
  TensorPlaces(const py::capsule& exchange, const py::list& tensors) {
    const auto* table = exchange.get_pointer<const dlpack::Exchange>();
    const char* name = exchange.name();
    if (name == nullptr || std::string(name) != dlpack::kCapsuleName ||
        table->major != dlpack::kMajorVersion || table->tensor_from_object == nullptr)
      throw Error(ErrorKind::kInvalid, "this is not DLPack's exchange of version 1");
    read_ = table->tensor_from_object;
    std::optional<Places> places = Places::of(read_, pointers_to(tensors));
    if (!places) throw py::error_already_set();
    places_ = std::move(*places);
  }

  bool are_of(const py::list& tensors) const {
    const std::optional<bool> same = places_.are_of(read_, pointers_to(tensors), first_field);
    if (!same) throw py::error_already_set();
    return *same;
  }

 private:
  dlpack::TensorFromObject read_;
  Places places_;
};

// The containers of one depth of a state (skeleton.py): how long each is, which are mappings, their
// keys and the types of what is in them, one container after the other.
class Level {
 public:
  // Of lists, tuples, dicts and OrderedDicts; `keys` are str and int.
  Level(std::vector<Py_ssize_t> lengths, std::vector<bool> is_mapping, py::list keys,
        py::list kinds)
      : lengths_(std::move(lengths)),
        is_mapping_(std::move(is_mapping)),
        keys_(std::move(keys)),
        kinds_(std::move(kinds)) {
    Py_ssize_t all = 0, named = 0;
    for (std::size_t i = 0; i < lengths_.size() && i < is_mapping_.size(); ++i) {
      all += lengths_[i];
      named += is_mapping_[i] ? lengths_[i] : 0;
    }
    if (is_mapping_.size() != lengths_.size() || all != PyList_GET_SIZE(kinds_.ptr()) ||
        named != PyList_GET_SIZE(keys_.ptr()))
      throw Error(ErrorKind::kInvalid, "a level has other lengths than containers");
  }

  // What is in other containers of the same types, one after the other; None where it is not of the
  // same types, or not under the same keys. No code of Python runs meanwhile.
  py::object open(const py::list& containers) const {
    if (containers.size() != lengths_.size()) return py::none();
    Found found{*this, py::list(kinds_.size())};
    for (std::size_t i = 0; i < lengths_.size(); ++i) {
      PyObject* container = PyList_GET_ITEM(containers.ptr(), static_cast<Py_ssize_t>(i));
      const Py_ssize_t length = PyObject_Size(container);
      if (length < 0) throw py::error_already_set();
      if (length != lengths_[i]) return py::none();
      const bool same = is_mapping_[i] ? found.add_mapping(container) : found.add_items(container);
      if (!same) return py::none();
    }
    return std::move(found.children);
  }

 private:
  struct Found {
    const Level& level;
    py::list children;
    Py_ssize_t child = 0;
    Py_ssize_t key = 0;

    bool add_mapping(PyObject* mapping) {
      if (!PyDict_CheckExact(mapping)) {
        // The order of an OrderedDict is its own.
        const auto keys = py::reinterpret_steal<py::list>(PyMapping_Keys(mapping));
        if (!keys) throw py::error_already_set();
        const auto values = py::reinterpret_steal<py::list>(PyMapping_Values(mapping));
        if (!values) throw py::error_already_set();
        // One that a method of dict has changed has more than its order knows.
        if (PyList_GET_SIZE(keys.ptr()) != PyObject_Size(mapping)) return false;
        for (std::size_t i = 0; i < keys.size(); ++i)
          if (!add_key(keys[i].ptr())) return false;
        return add_items(values.ptr());
      }
      PyObject *name, *value;
      for (Py_ssize_t at = 0; PyDict_Next(mapping, &at, &name, &value) != 0;)
        if (!add_key(name) || !add(value)) return false;
      return true;
    }

    // Of a list or a tuple.
    bool add_items(PyObject* sequence) {
      if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) return false;
      PyObject** items = PySequence_Fast_ITEMS(sequence);
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence); ++i)
        if (!add(items[i])) return false;
      return true;
    }

    bool add(PyObject* value) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != PyList_GET_ITEM(level.kinds_.ptr(), child))
        return false;
      Py_INCREF(value);
      PyList_SET_ITEM(children.ptr(), child++, value);
      return true;
    }

    // Of the same type, too, for True equals 1.
    bool add_key(PyObject* name) {
      PyObject* before = PyList_GET_ITEM(level.keys_.ptr(), key++);
      return name == before || (Py_TYPE(name) == Py_TYPE(before) &&
                                PyObject_RichCompareBool(name, before, Py_EQ) == 1);
    }
  };

  const std::vector<Py_ssize_t> lengths_;
  const std::vector<bool> is_mapping_;
  const py::list keys_;
  const py::list kinds_;
};

}  // namespace

void bind_objects(py::module_& module) {
  py::class_<TensorPlaces>(module, "TensorPlaces")
      .def(py::init<const py::capsule&, const py::list&>(), py::arg("exchange"), py::arg("tensors"))
      .def("are_of", &TensorPlaces::are_of, py::arg("tensors"));

  module.def("map_ahead", &map_ahead, py::arg("function"), py::arg("objects"));
  py::class_<Level>(module, "Level")
      .def(py::init<std::vector<Py_ssize_t>, std::vector<bool>, py::list, py::list>(),
           py::arg("lengths"), py::arg("is_mapping"), py::arg("keys"), py::arg("kinds"))
      .def("open", &Level::open, py::arg("containers"));
}

}  // namespace pysnap
