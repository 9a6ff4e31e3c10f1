// What the gather reads of an optimizer's dicts: hyper-parameters, and the tensors of a state.
#pragma once

#include <pybind11/pybind11.h>

#include "step_scalars.h"

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

inline PyObject* required(const py::dict& group, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(group.ptr(), key);
  if (value == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return value;
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

// A param group's hyper-parameters. One that is not a number of Python's, a tensor, is left to
// whoever knows whether the host may wait for it.
struct GroupValues {
  HyperParameters hyper{};
  PyObject *lr, *beta1, *beta2, *eps, *weight_decay, *initial_lr;  // borrowed from the group
  bool has_tensors = false, capturable = false;
};

inline GroupValues group_values(const py::dict& group, bool tracked) {
  const Keys& k = keys();
  const py::sequence betas = py::reinterpret_borrow<py::sequence>(required(group, k.betas));
  GroupValues v;
  HyperParameters& h = v.hyper;
  const auto read = [&v](PyObject* object, double& value) {
    if (PyFloat_Check(object) || PyLong_Check(object)) {
      value = as_double(object);
    } else {
      v.has_tensors = true;
    }
    return object;
  };
  v.lr = read(required(group, k.lr), h.lr);
  v.beta1 = read(py::object(betas[0]).ptr(), h.beta1);
  v.beta2 = read(py::object(betas[1]).ptr(), h.beta2);
  v.eps = read(required(group, k.eps), h.eps);
  v.weight_decay = read(required(group, k.weight_decay), h.weight_decay);
  h.maximize = as_bool(required(group, k.maximize));
  h.decay_by_schedule =
      PyUnicode_CompareWithASCIIString(required(group, k.decay_by), "schedule") == 0;
  v.initial_lr = h.decay_by_schedule ? required(group, k.initial_lr) : v.lr;
  if (tracked) {  // which has it, if there ever was a schedule
    PyObject* initial_lr = PyDict_GetItemWithError(group.ptr(), k.initial_lr);
    if (initial_lr == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (initial_lr != nullptr) v.initial_lr = initial_lr;
  }
  read(v.initial_lr, h.initial_lr);
  return v;
}

// For the host's arithmetic: waits for tensors on a GPU.
inline HyperParameters on_host(const GroupValues& v) {
  if (!v.has_tensors) return v.hyper;
  return {as_double(v.lr),           as_double(v.beta1),        as_double(v.beta2),
          as_double(v.eps),          as_double(v.weight_decay), as_double(v.initial_lr),
          v.hyper.decay_by_schedule, v.hyper.maximize};
}

}  // namespace adamprox
