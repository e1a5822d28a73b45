// SPDX-License-Identifier: Apache-2.0
#include "unchanged.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "status.h"

namespace py = pybind11;

namespace mosaic::python {
namespace {

// What a weak reference refers to, nullptr if that is gone; else the object itself.
PyObject* referred(PyObject* object) {
  if (!PyWeakref_Check(object)) return object;
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(object, &found) < 0) throw py::error_already_set();
  Py_XDECREF(found);  // its identity is all that is asked for
  return found;
#else
  PyObject* found = PyWeakref_GET_OBJECT(object);
  return found == Py_None ? nullptr : found;
#endif
}

bool is_at(PyObject* tensor, uint64_t address) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  const auto place = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!place) throw py::error_already_set();
  return PyLong_AsUnsignedLongLong(place.ptr()) == address;
}

}  // namespace

bool unchanged(const py::object& holders, const py::tuple& names, const py::tuple& objects,
               const py::bytes& addresses, std::vector<py::object>* kept) {
  const bool one = PyDict_Check(holders.ptr());
  const auto count = static_cast<size_t>(PyTuple_GET_SIZE(names.ptr()));
  if (objects.size() != count || static_cast<size_t>(PyBytes_GET_SIZE(addresses.ptr())) != 8 * count ||
      !(one || (PyTuple_Check(holders.ptr()) && py::len(holders) == count))) {
    raise_invalid("unchanged: as many holders, objects and addresses as names are needed");
  }
  const char* places = PyBytes_AS_STRING(addresses.ptr());
  for (size_t i = 0; i < count; ++i) {
    PyObject* holder = one ? holders.ptr() : PyTuple_GET_ITEM(holders.ptr(), i);
    if (!PyDict_Check(holder)) raise_invalid("unchanged: a holder must be a dict");
    PyObject* found = PyDict_GetItemWithError(holder, PyTuple_GET_ITEM(names.ptr(), i));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    if ((found ? found : Py_None) != referred(PyTuple_GET_ITEM(objects.ptr(), i))) return false;
    uint64_t place;
    std::memcpy(&place, places + 8 * i, sizeof place);
    if (place != 0 && (!found || found == Py_None || !is_at(found, place))) return false;
    if (kept && found) kept->push_back(py::reinterpret_borrow<py::object>(found));
  }
  return true;
}

}  // namespace mosaic::python
