// Reads a param group's hyper-parameters: it knows in which order they lie in the group's dict, and
// that objects which are the same as at the last step, and cannot change, are worth the same.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "python_values.h"
#include "step_scalars.h"

namespace adamprox {

// A number that is not Python's, a tensor, is left to whoever knows whether the host may wait for it.
struct GroupValues {
  HyperParameters hyper{};
  PyObject *params, *lr, *beta1, *beta2, *eps, *weight_decay, *initial_lr;  // borrowed
  bool has_tensors, amsgrad, capturable;
};

// Whether params that share a step count have the same scalars in both groups. (`capturable` says only
// where that count lies.)
inline bool share_scalars(const GroupValues& a, const GroupValues& b) {
  return !a.has_tensors && !b.has_tensors && a.hyper == b.hyper;
}

// For the host's arithmetic: waits for tensors on a GPU.
inline HyperParameters on_host(const GroupValues& v) {
  if (!v.has_tensors) return v.hyper;
  return {as_double(v.lr),           as_double(v.beta1),        as_double(v.beta2),
          as_double(v.eps),          as_double(v.weight_decay), as_double(v.initial_lr),
          v.hyper.decay_by_schedule, v.hyper.maximize};
}

class GroupReader {
 public:
  const GroupValues& values() const { return values_; }

  const GroupValues& read(PyObject* group) {
    const uint64_t version = version_of(group);
    if (kDictsHaveVersions && version == version_) return values_;
    if (!find_objects(group)) {
      learn(group);
      find_objects(group);
    }
    version_ = parsed_ ? version : 0;
    return values_;
  }

 private:
  enum Which {
    kLr,
    kBetas,
    kEps,
    kWeightDecay,
    kAmsgrad,
    kMaximize,
    kDecayBy,
    kCapturable,
    kInitialLr,
    kParams,
    kOther
  };

  struct Entry {
    Which which;
    py::object key, value;  // held: what has the same address is the same object
  };

  static PyObject* name(int which) {
    const Keys& k = keys();
    PyObject* const names[] = {k.lr,       k.betas,    k.eps,        k.weight_decay, k.amsgrad,
                               k.maximize, k.decay_by, k.capturable, k.initial_lr,   k.params};
    return names[which];
  }

  void learn(PyObject* group) {
    entries_.clear();
    objects_ = {};
    parsed_ = false;
    PyObject* key;
    for (Py_ssize_t position = 0; PyDict_Next(group, &position, &key, nullptr);) {
      int which = 0;
      while (which < kOther && PyObject_RichCompareBool(key, name(which), Py_EQ) != 1) ++which;
      entries_.push_back({Which(which), py::reinterpret_borrow<py::object>(key), py::object()});
    }
  }

  // False: the dict has other keys than those known.
  bool find_objects(PyObject* group) {
    if (PyDict_GET_SIZE(group) != static_cast<Py_ssize_t>(entries_.size())) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    bool same = parsed_, constant = true;
    for (Entry& entry : entries_) {
      if (!PyDict_Next(group, &position, &key, &value) || key != entry.key.ptr()) return false;
      objects_[entry.which] = value;
      if (entry.which >= kParams || value == entry.value.ptr()) continue;
      same = false;
      const bool stays = is_constant(value);
      entry.value = stays ? py::reinterpret_borrow<py::object>(value) : py::object();
      constant &= stays;
    }
    parsed_ = false;
    if (!same) parse();
    values_.params = required(kParams);
    parsed_ = constant;
    return true;
  }

  // Of a tuple, parse() knows that it holds numbers of Python's, or else that there are tensors.
  static bool is_constant(PyObject* value) {
    return PyFloat_Check(value) || PyLong_Check(value) || PyUnicode_CheckExact(value) ||
           PyTuple_CheckExact(value);
  }

  PyObject* required(Which which) const {
    if (objects_[which] != nullptr) return objects_[which];
    PyErr_SetObject(PyExc_KeyError, name(which));
    throw py::error_already_set();
  }

  void parse() {
    GroupValues& v = values_;
    HyperParameters& h = v.hyper;
    const auto betas = py::reinterpret_borrow<py::sequence>(required(kBetas));
    if (betas.size() != 2) {
      throw py::type_error("Invalid betas: " + std::string(py::repr(betas)) +
                           ", expected two numbers");
    }
    v.has_tensors = false;
    const auto number = [&v](PyObject* object, double& value) {
      if (PyFloat_Check(object) || PyLong_Check(object)) {
        value = as_double(object);
      } else {
        v.has_tensors = true;
      }
      return object;
    };
    v.lr = number(required(kLr), h.lr);
    v.beta1 = number(py::object(betas[0]).ptr(), h.beta1);
    v.beta2 = number(py::object(betas[1]).ptr(), h.beta2);
    v.eps = number(required(kEps), h.eps);
    v.weight_decay = number(required(kWeightDecay), h.weight_decay);
    v.amsgrad = as_bool(required(kAmsgrad));
    v.capturable = as_bool(required(kCapturable));
    h.maximize = as_bool(required(kMaximize));
    h.decay_by_schedule = PyUnicode_CompareWithASCIIString(required(kDecayBy), "schedule") == 0;
    const bool scheduled = h.decay_by_schedule || objects_[kInitialLr] != nullptr;
    v.initial_lr = number(scheduled ? required(kInitialLr) : v.lr, h.initial_lr);
  }

  std::vector<Entry> entries_;
  std::array<PyObject*, kOther + 1> objects_{};  // the values, borrowed
  GroupValues values_{};
  bool parsed_ = false;   // whether values_ are those of objects_, and none can change by itself
  uint64_t version_ = 0;  // the dict's when they were read, if so
};

}  // namespace adamprox
