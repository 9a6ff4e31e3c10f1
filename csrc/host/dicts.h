// Every assumption about CPython's dicts: param groups, a param's state, and optimizer.state are walked by
// public functions. A key is compared by its address first, then by its value. No Python code runs while
// a dict is walked.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace adamprox {

namespace py = pybind11;

inline PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

inline PyObject* item(PyObject* dict, PyObject* key) {  // borrowed, or null
  PyObject* value = dict != nullptr ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Prefetches a dict's keys and values, once the dict itself is in the cache.
inline void prefetch_entries(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const auto* keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 6; ++line) __builtin_prefetch(keys + 64 * line);
}

// Reads the values at some keys of one dict after another. It remembers the order of a dict's keys: the
// next one mostly has the same.
class KeyOrder {
 public:
  explicit KeyOrder(std::vector<PyObject*> names) : names_(std::move(names)) {
    for (size_t i = 0; i < names_.size(); ++i) {
      const int first = find(names_[i]);
      if (first != static_cast<int>(i)) copies_.emplace_back(i, first);
    }
  }

  // Fills values[i] with what `dict`, if it is not null, has at names[i]: borrowed, or null.
  void read(PyObject* dict, std::vector<PyObject*>& values) {
    values.assign(names_.size(), nullptr);
    PyObject *key, *value;
    size_t place = 0;
    for (Py_ssize_t at = 0; dict != nullptr && PyDict_Next(dict, &at, &key, &value); ++place) {
      if (place == order_.size()) order_.push_back({});
      Entry& entry = order_[place];
      if (entry.key.ptr() != key) {
        // Letting go of a string runs no Python code.
        const bool is_string = PyUnicode_CheckExact(key);
        entry = {py::reinterpret_borrow<py::object>(is_string ? key : nullptr), find(key)};
      }
      if (entry.index >= 0) values[entry.index] = value;
    }
    for (const auto& [copy, first] : copies_) values[copy] = values[first];
  }

  PyObject* name(size_t index) const { return names_[index]; }

 private:
  struct Entry {
    py::object key;  // a string, held: what has its address is the same object; or null
    int index;
  };

  int find(PyObject* key) const {  // or -1
    for (size_t i = 0; i < names_.size(); ++i) {
      if (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, names_[i]) == 0) return int(i);
    }
    return -1;
  }

  std::vector<PyObject*> names_;             // interned
  std::vector<std::pair<int, int>> copies_;  // a name that is there twice: its places
  std::vector<Entry> order_;
};

// Walks optimizer.state beside the params, without hashing a tensor: the entries lie in the order in
// which the params took their first steps, which is mostly that of the param groups. Where the next
// entry is another param's, an index by address is made, once a step.
class StateCursor {
 public:
  explicit StateCursor(PyObject* dict) : dict_(dict) {}

  // The state of `param`, borrowed, or null.
  PyObject* find(PyObject* param) {
    PyObject *key, *value;
    for (bool looked_up = false;; looked_up = true) {
      Py_ssize_t next = position_;
      if (PyDict_Next(dict_, &next, &key, &value) && key == param) {
        position_ = next;
        return value;
      }
      if (looked_up || PyDict_GET_SIZE(dict_) == 0) return nullptr;
      if (index_.empty()) make_index();
      const auto found = index_.find(param);
      if (found == index_.end()) return nullptr;
      position_ = found->second;
    }
  }

 private:
  void make_index() {
    PyObject* key;
    Py_ssize_t before = 0;
    for (Py_ssize_t after = 0; PyDict_Next(dict_, &after, &key, nullptr); before = after) {
      index_[key] = before;
    }
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0;
  std::unordered_map<PyObject*, Py_ssize_t> index_;
};

}  // namespace adamprox
