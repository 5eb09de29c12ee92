// Fills a struct from the keyword arguments of a Python call. visit_fields of the struct says which
// names there are; every name must be given, and no other. An absent tensor is None, a contiguous
// one its address, a strided one (address, stride_t, stride_b).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace rnnfast {

// The names of a struct's fields in their order, interned: those of a call are mostly the same
// objects, so that comparing addresses finds them.
template <class Problem>
const std::vector<PyObject*>& field_names() {
  static const std::vector<PyObject*> names = [] {
    std::vector<PyObject*> found;
    Problem problem;
    visit_fields(problem, [&](const char* name, auto&) {
      found.push_back(PyUnicode_InternFromString(name));
    });
    return found;
  }();
  return names;
}

class Keywords {
 public:
  // As METH_FASTCALL | METH_KEYWORDS passes them: `given` is null or a tuple of names.
  template <class Problem>
  static Problem read(const char* function, PyObject* const* values, Py_ssize_t positional,
                      PyObject* given) {
    Keywords keywords(function, field_names<Problem>(), values, given);
    if (positional != 0) keywords.fail("takes keyword arguments only");
    Problem problem;
    visit_fields(problem, [&](const char*, auto& field) {
      keywords.value_ = keywords.find(keywords.names_[keywords.field_++]);
      keywords.assign(field);
    });
    if (keywords.count_ != keywords.field_) keywords.fail_unknown();
    return problem;
  }

 private:
  Keywords(const char* function, const std::vector<PyObject*>& names, PyObject* const* values,
           PyObject* given)
      : function_(function),
        names_(names),
        values_(values),
        given_(given),
        count_(given != nullptr ? static_cast<std::size_t>(PyTuple_GET_SIZE(given)) : 0) {}

  const char* function_;
  const std::vector<PyObject*>& names_;
  PyObject* const* values_;
  PyObject* given_;
  std::size_t count_;
  std::size_t field_ = 0;  // the next one of names_
  std::size_t next_ = 0;   // where its value is, if the call names the fields in their order
  PyObject* value_ = nullptr;

  PyObject* given_name(std::size_t i) const {
    return PyTuple_GET_ITEM(given_, static_cast<Py_ssize_t>(i));
  }

  PyObject* find(PyObject* name) {
    for (std::size_t step = 0; step < count_; ++step) {
      const std::size_t i = next_ + step < count_ ? next_ + step : next_ + step - count_;
      if (given_name(i) != name) continue;
      next_ = i + 1;
      return values_[i];
    }
    for (std::size_t i = 0; i < count_; ++i)  // equal names that are not one object
      if (PyUnicode_Compare(given_name(i), name) == 0) return values_[i];
    fail("lacks the argument '" + text(name) + "'");
  }

  [[noreturn]] void fail_unknown() const {
    for (std::size_t i = 0; i < count_; ++i) {
      bool known = false;
      for (PyObject* name : names_) known = known || PyUnicode_Compare(given_name(i), name) == 0;
      if (!known) fail("has no argument '" + text(given_name(i)) + "'");
    }
    fail("was given an argument twice");
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw pybind11::type_error(std::string(function_) + "() " + what);
  }
  [[noreturn]] void refuse(const char* wanted) const {
    PyErr_Clear();
    fail("wants " + std::string(wanted) + " as '" + text(names_[field_ - 1]) + "', and got " +
         std::string(pybind11::repr(value_)));
  }
  static std::string text(PyObject* name) { return std::string(pybind11::str(name)); }

  std::int64_t integer(PyObject* from, const char* wanted) const {
    const std::int64_t number = PyLong_Check(from) ? PyLong_AsLongLong(from) : -1;
    if (number == -1 && (!PyLong_Check(from) || PyErr_Occurred())) refuse(wanted);
    return number;
  }
  template <class Pointer>
  Pointer address(PyObject* from, const char* wanted) const {
    void* const found = PyLong_Check(from) ? PyLong_AsVoidPtr(from) : nullptr;
    if (found == nullptr && (!PyLong_Check(from) || PyErr_Occurred())) refuse(wanted);
    return static_cast<Pointer>(found);
  }

  template <class T>
  void assign(T*& field) const {
    if (value_ != Py_None) field = address<T*>(value_, "None or an address");
  }
  template <class Pointer>
  void assign(cpu::Sequence<Pointer>& field) const {
    constexpr const char* kWanted = "None or (address, stride_t, stride_b)";
    if (value_ == Py_None) return;
    if (!PyTuple_Check(value_) || PyTuple_GET_SIZE(value_) != 3) refuse(kWanted);
    field = {address<Pointer>(PyTuple_GET_ITEM(value_, 0), kWanted),
             integer(PyTuple_GET_ITEM(value_, 1), kWanted),
             integer(PyTuple_GET_ITEM(value_, 2), kWanted)};
  }
  void assign(std::int64_t& field) const { field = integer(value_, "an integer"); }
  void assign(int& field) const { field = static_cast<int>(integer(value_, "an integer")); }
  void assign(bool& field) const {
    if (!PyBool_Check(value_)) refuse("True or False");
    field = value_ == Py_True;
  }
  void assign(double& field) const {
    field = PyFloat_AsDouble(value_);
    if (field == -1 && PyErr_Occurred()) refuse("a number");
  }
  // Alive while the call is.
  void assign(const char*& field) const {
    field = PyUnicode_Check(value_) ? PyUnicode_AsUTF8(value_) : nullptr;
    if (field == nullptr) refuse("a name");
  }
  void assign(cpu::Dtype& field) const {
    const char* name = nullptr;
    assign(name);
    field = cpu::dtype_named(name);
  }
};

}  // namespace rnnfast
