// What the gather reads of Python's objects.
#pragma once

#include <pybind11/pybind11.h>

namespace adamprox {

namespace py = pybind11;

// Interned once, so that a dict look-up costs a few nanoseconds.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Keys {
  PyObject *params = interned("params"), *grad = interned("grad"), *step = interned("step"),
           *exp_avg = interned("exp_avg"), *exp_avg_sq = interned("exp_avg_sq"),
           *max_exp_avg_sq = interned("max_exp_avg_sq"), *param = interned("param"),
           *lr = interned("lr"), *betas = interned("betas"), *eps = interned("eps"),
           *weight_decay = interned("weight_decay"), *amsgrad = interned("amsgrad"),
           *maximize = interned("maximize"), *decay_by = interned("decay_by"),
           *initial_lr = interned("initial_lr"), *is_conj = interned("is_conj"),
           *is_neg = interned("is_neg"), *clone = interned("clone"),
           *capturable = interned("capturable");
};

inline const Keys& keys() {
  static const Keys instance;
  return instance;
}

struct StateValues {  // borrowed; null where missing
  PyObject *step = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr, *max_exp_avg_sq = nullptr;
};

// Walks the few entries of a param's state instead of looking each one up; keys that are not the
// interned strings (a state that came from a file) are looked up.
inline StateValues state_values(PyObject* state, bool amsgrad) {
  const Keys& k = keys();
  StateValues v;
  PyObject *key, *value;
  int found = 0;
  const int wanted = amsgrad ? 4 : 3;
  for (Py_ssize_t position = 0; found < wanted && PyDict_Next(state, &position, &key, &value);) {
    ++found;
    if (key == k.exp_avg)
      v.exp_avg = value;
    else if (key == k.exp_avg_sq)
      v.exp_avg_sq = value;
    else if (key == k.step)
      v.step = value;
    else if (key == k.max_exp_avg_sq)
      v.max_exp_avg_sq = value;
  }
  const auto look_up = [state](PyObject*& found, PyObject* name) {
    if (found == nullptr) found = PyDict_GetItemWithError(state, name);
  };
  look_up(v.step, k.step);
  look_up(v.exp_avg, k.exp_avg);
  look_up(v.exp_avg_sq, k.exp_avg_sq);
  if (amsgrad) look_up(v.max_exp_avg_sq, k.max_exp_avg_sq);
  return v;
}

inline double as_double(PyObject* value) {  // a float, an int or a tensor of one element
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

inline bool as_bool(PyObject* value) {
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

inline bool answers_true(PyObject* object, PyObject* method) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, method));
  if (!answer) throw py::error_already_set();
  return as_bool(answer.ptr());
}

}  // namespace adamprox
