// Reads a param group's values, a param's state, and optimizer.state. Dicts are walked by CPython's
// public functions, and keys compared by address before by value; the order of a dict's keys is
// remembered from the last one, which mostly has the same. No Python code runs while a dict is walked.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>
#include <vector>

#include "../math/decay.h"

namespace adamprox {

namespace py = pybind11;

inline PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

inline double as_double(PyObject* value) {  // may run Python code, and wait for a GPU
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return result;
}

inline bool as_bool(PyObject* value) {  // may run Python code
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

inline py::object attribute(PyObject* object, PyObject* name) {  // may run Python code
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

// Prefetches a dict's keys and values, once the dict itself is in the cache.
inline void prefetch_entries(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const auto* keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 6; ++line) __builtin_prefetch(keys + 64 * line);
}

// Finds the index of a dict's keys among `names`, or -1.
class KeyOrder {
 public:
  explicit KeyOrder(std::vector<PyObject*> names) : names_(std::move(names)) {}

  // Fills values[i] with what `dict` has at names[i], borrowed, or null.
  void read(PyObject* dict, std::vector<PyObject*>& values) {
    values.assign(names_.size(), nullptr);
    PyObject *key, *value;
    size_t place = 0;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value); ++place) {
      if (place == order_.size()) order_.push_back({});
      Entry& entry = order_[place];
      if (entry.key.ptr() != key) entry = {py::reinterpret_borrow<py::object>(key), find(key)};
      if (entry.index >= 0) values[entry.index] = value;
    }
  }

  PyObject* name(size_t index) const { return names_[index]; }

 private:
  struct Entry {
    py::object key;  // held: what has its address is the same object
    int index;
  };

  int find(PyObject* key) const {
    for (size_t i = 0; i < names_.size(); ++i) {
      if (key == names_[i]) return static_cast<int>(i);
    }
    for (size_t i = 0; i < names_.size() && PyUnicode_CheckExact(key); ++i) {
      if (names_[i] && PyUnicode_Compare(key, names_[i]) == 0) return static_cast<int>(i);
    }
    return -1;
  }

  std::vector<PyObject*> names_;
  std::vector<Entry> order_;
};

// The keys of a param's state: its step count, then its states.
inline const std::vector<PyObject*>& state_names() {
  static const std::vector<PyObject*> all = [] {
    std::vector<PyObject*> names{interned("step")};
    for (const StateKey& key : kStateKeys) names.push_back(interned(key.key));
    return names;
  }();
  return all;
}

// How many keys of a param group are read: numbers, switches, the options of rules, params, decay.
constexpr int kGroupKeys = kNumbers + kFlags + kRules + 2;

// A param group's values. What is no plain number or switch of Python's (a tensor, a number of NumPy) is
// kept in `objects` until Python code may run.
struct GroupValues {
  PyObject* group = nullptr;  // held elsewhere
  HyperParameters h{};
  Decay rule{};
  py::object objects[kNumbers], flag_objects[kFlags], pair, params;
  bool has_objects = false;  // a number or a switch is not known yet
  bool has_tensors = false;  // a number may be read on a device
  // What was read the last time, if none of it can change by itself: held, so that the same address is the
  // same value.
  std::array<py::object, kGroupKeys> seen;
  bool is_known = false;

  bool has(int flag) const { return flag == kAlways || h.flag[flag]; }

  void forget() {
    if (has_objects) *this = {};
    params = {};
  }
};

inline bool alike(const GroupValues& a, const GroupValues& b) {
  if (a.has_tensors || b.has_tensors || a.rule != b.rule) return false;
  for (int n = 0; n < kNumbers; ++n) {
    if (a.h.number[n] != b.h.number[n]) return false;
  }
  for (int f = 0; f < kFlags; ++f) {
    if (a.h.flag[f] != b.h.flag[f]) return false;
  }
  return true;
}

class GroupReader {
 public:
  void read(PyObject* group, GroupValues& v) {
    if (!PyDict_Check(group)) throw py::type_error("param_groups must be dicts");
    order_.read(group, values_);
    v.params = py::reinterpret_borrow<py::object>(required(kParams));
    values_[kParams] = nullptr;
    bool same = v.is_known;
    for (int i = 0; same && i < kGroupKeys; ++i) same = values_[i] == v.seen[i].ptr();
    if (same) return;
    v.is_known = false;
    v.has_objects = v.has_tensors = false;
    v.pair = {};
    for (int n = 0; n < kNumbers; ++n) read_number(n, v);
    for (int f = 0; f < kFlags; ++f) read_flag(f, v);
    if (v.h.flag[kDecayBySchedule]) required(kInitialLr);
    const auto decay = py::reinterpret_borrow<py::object>(required(kDecay));
    const bool known = !v.has_objects && std::all_of(values_.begin(), values_.end(), is_constant);
    for (int i = 0; i < kGroupKeys; ++i) {
      v.seen[i] = known ? py::reinterpret_borrow<py::object>(values_[i]) : py::object();
    }
    read_rule(decay, v);  // or it throws, and nothing is known
    v.is_known = known;
  }

 private:
  // The places of what is read: numbers, switches, the options of rules, and then
  enum {
    kFlagsAt = kNumbers,
    kOptionsAt = kFlagsAt + kFlags,
    kParams = kOptionsAt + kRules,
    kDecay
  };

  static const std::vector<PyObject*>& names() {
    static const std::vector<PyObject*> all = [] {
      std::vector<PyObject*> names;
      for (const NumberKey& key : kNumberKeys) names.push_back(interned(key.key));
      for (const FlagKey& key : kFlagKeys) names.push_back(interned(key.key));
      for (const RuleKey& key : kRuleKeys)
        names.push_back(key.option ? interned(key.option) : nullptr);
      names.push_back(interned("params"));
      names.push_back(interned("decay"));
      return names;
    }();
    return all;
  }

  // A list may change, and so may the items of a tuple.
  static bool is_constant(PyObject* value) {
    if (value == nullptr || value == Py_None || PyFloat_CheckExact(value)) return true;
    if (!PyTuple_CheckExact(value)) return PyLong_Check(value) || PyUnicode_CheckExact(value);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      PyObject* item = PyTuple_GET_ITEM(value, i);
      if (!PyFloat_CheckExact(item) && !PyLong_CheckExact(item)) return false;
    }
    return true;
  }

  PyObject* required(int which) const {
    if (values_[which] != nullptr) return values_[which];
    PyErr_SetObject(PyExc_KeyError, order_.name(which));
    throw py::error_already_set();
  }

  void read_number(int n, GroupValues& v) {
    const NumberKey& key = kNumberKeys[n];
    // Two names with one key: the walk has found the first of them.
    const int which = key.item == 1 ? n - 1 : n;
    v.objects[n] = {};
    PyObject* value = values_[which];
    if (key.optional && (value == nullptr || value == Py_None)) {
      v.h.number[n] = 0;
      if (n == kInitialLr) {
        v.h.number[n] = v.h.number[kLr];
        v.objects[n] = v.objects[kLr];
      }
      return;
    }
    value = required(which);
    if (key.item >= 0) {
      const bool tuple = PyTuple_CheckExact(value);
      if ((tuple || PyList_CheckExact(value)) && PySequence_Fast_GET_SIZE(value) == 2) {
        value = PySequence_Fast_GET_ITEM(value, key.item);
      } else {  // any other sequence
        v.pair = py::reinterpret_borrow<py::object>(value);
        v.has_objects = true;
        return;
      }
    }
    if (PyFloat_CheckExact(value)) {
      v.h.number[n] = PyFloat_AS_DOUBLE(value);
    } else if (PyLong_CheckExact(value)) {
      v.h.number[n] = as_double(value);
    } else {
      v.objects[n] = py::reinterpret_borrow<py::object>(value);
      v.has_objects = true;
    }
  }

  void read_flag(int f, GroupValues& v) {
    const FlagKey& key = kFlagKeys[f];
    PyObject* value = values_[kFlagsAt + f];
    for (int n = 0; n < kNumbers && value == nullptr; ++n) {  // a number's key, too
      if (order_.name(n) == order_.name(kFlagsAt + f)) value = values_[n];
    }
    v.flag_objects[f] = {};
    if (value == nullptr && key.kind == kNotNone) value = Py_None;
    if (value == nullptr) value = required(kFlagsAt + f);
    if (key.kind == kNotNone) {
      v.h.flag[f] = value != Py_None && value != Py_False;
    } else if (key.kind == kText) {
      v.h.flag[f] =
          PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, key.text) == 0;
    } else if (value == Py_True || value == Py_False || value == Py_None) {
      v.h.flag[f] = value == Py_True;
    } else {
      v.flag_objects[f] = py::reinterpret_borrow<py::object>(value);
      v.has_objects = true;
    }
  }

  // The last rule of that name whose option, if it has one, is on.
  void read_rule(const py::object& decay, GroupValues& v) {
    std::vector<std::pair<int, py::object>> candidates;  // held: to ask a value may run Python code
    for (int r = 0; r < kRules; ++r) {
      PyObject* option = kRuleKeys[r].option != nullptr ? values_[kOptionsAt + r] : Py_True;
      if (option == nullptr || option == Py_False || !PyUnicode_Check(decay.ptr()) ||
          PyUnicode_CompareWithASCIIString(decay.ptr(), kRuleKeys[r].decay) != 0) {
        continue;
      }
      candidates.emplace_back(r, py::reinterpret_borrow<py::object>(option));
    }
    int found = -1;
    for (const auto& [rule, option] : candidates) {
      if (option.ptr() == Py_True || as_bool(option.ptr())) found = rule;
    }
    if (found < 0) {
      std::string known;
      for (const RuleKey& key : kRuleKeys) {
        if (key.option == nullptr) known += (known.empty() ? "" : ", ") + std::string(key.decay);
      }
      throw py::value_error("Invalid decay: " + std::string(py::repr(decay)) +
                            ", expected one of " + known + "; nothing was updated");
    }
    v.rule = static_cast<Decay>(found);
  }

  KeyOrder order_{names()};
  std::vector<PyObject*> values_;
};

// Walks optimizer.state beside the params, without hashing a tensor: the entries lie in the order in
// which the params took their first steps, which is mostly that of the param groups. Where the next
// entry is another param's, an index by address is made, once a step.
class StateCursor {
 public:
  explicit StateCursor(PyObject* dict) : dict_(dict) {}

  // The state of `param`, borrowed, or null.
  PyObject* find(PyObject* param) {
    if (PyObject* state = next(param)) return state;
    if (index_.empty()) {
      PyObject* key;
      Py_ssize_t before = 0;
      for (Py_ssize_t after = 0; PyDict_Next(dict_, &after, &key, nullptr); before = after) {
        index_[key] = before;
      }
    }
    const auto found = index_.find(param);
    if (found == index_.end()) return nullptr;
    position_ = found->second;
    return next(param);
  }

 private:
  PyObject* next(PyObject* param) {
    PyObject *key, *value;
    Py_ssize_t position = position_;
    if (!PyDict_Next(dict_, &position, &key, &value) || key != param) return nullptr;
    position_ = position;
    return value;
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  std::unordered_map<PyObject*, Py_ssize_t> index_;
};

}  // namespace adamprox
