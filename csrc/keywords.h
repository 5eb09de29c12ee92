// Fills a struct from the keyword arguments of a Python call. visit_fields of the struct says which
// names there are; every name must be given, and no other. An absent tensor is None, a contiguous
// one its address, a strided one (address, stride_t, stride_b); an enumeration is a name, which
// from_name of its namespace knows.
#pragma once

#include <pybind11/pybind11.h>

#include <concepts>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace rnnfast {

// [T, B, ...] with its last axis dense.
template <class T>
concept Strided = requires(T tensor) {
  tensor.data;
  tensor.stride_t;
  tensor.stride_b;
};

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
  // As METH_FASTCALL | METH_KEYWORDS passes them, without the positional arguments that a function
  // takes: `given` is null or a tuple of names.
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
  template <Strided T>
  void assign(T& field) const {
    constexpr const char* kWanted = "None or (address, stride_t, stride_b)";
    if (value_ == Py_None) return;
    if (!PyTuple_Check(value_) || PyTuple_GET_SIZE(value_) != 3) refuse(kWanted);
    field = {address<decltype(field.data)>(PyTuple_GET_ITEM(value_, 0), kWanted),
             integer(PyTuple_GET_ITEM(value_, 1), kWanted),
             integer(PyTuple_GET_ITEM(value_, 2), kWanted)};
  }
  template <std::integral T>
  void assign(T& field) const {
    field = static_cast<T>(integer(value_, "an integer"));
    if (!std::cmp_equal(field, integer(value_, "an integer"))) refuse("a smaller integer");
  }
  void assign(bool& field) const {
    if (!PyBool_Check(value_)) refuse("True or False");
    field = value_ == Py_True;
  }
  template <std::floating_point T>
  void assign(T& field) const {
    const double number = PyFloat_AsDouble(value_);
    if (number == -1 && PyErr_Occurred()) refuse("a number");
    field = static_cast<T>(number);
  }
  // Alive while the call is.
  void assign(const char*& field) const {
    field = PyUnicode_Check(value_) ? PyUnicode_AsUTF8(value_) : nullptr;
    if (field == nullptr) refuse("a name");
  }
  template <class T>
    requires std::is_enum_v<T>
  void assign(T& field) const {
    const char* name = nullptr;
    assign(name);
    from_name(name, field);
  }
};

using FastCall = PyObject* (*)(PyObject* name, PyObject* const* values, Py_ssize_t positional,
                               PyObject* given);

// None, or the Python error that an exception of run() stands for.
template <class Run>
PyObject* none_or_error(Run run) {
  try {
    run();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// A plain function of Python, which gets its own name first: pybind11 would read so many arguments
// at twice the time.
template <FastCall kCall>
void define(pybind11::module_& module, const char* name) {
  static PyMethodDef method = {name, nullptr, METH_FASTCALL | METH_KEYWORDS, nullptr};
  method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kCall));
  const pybind11::str self(name);
  module.attr(name) =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace rnnfast
