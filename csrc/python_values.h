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

// CPython up to 3.12 numbers whatever is done to any dict: where this dict's number is one that was
// read before, it is that dict, with the same keys and the same objects. (3.13 no longer counts what
// is done to an object's attributes, and 3.14 nothing.)
#if PY_VERSION_HEX < 0x030D0000
constexpr bool kDictsHaveVersions = true;
inline uint64_t version_of(PyObject* dict) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
}
#else
constexpr bool kDictsHaveVersions = false;
inline uint64_t version_of(PyObject*) { return 0; }
#endif

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

// The same of a state that is mostly the one read before.
class StateReader {
 public:
  const StateValues& read(PyObject* state, bool amsgrad) {
    const uint64_t version = version_of(state);
    if (!kDictsHaveVersions || version != version_ || amsgrad != amsgrad_) {
      values_ = state_values(state, amsgrad);
      version_ = version;
      amsgrad_ = amsgrad;
    }
    return values_;
  }

 private:
  StateValues values_;
  uint64_t version_ = 0;
  bool amsgrad_ = false;
};

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
