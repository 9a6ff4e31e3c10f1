// Walks optimizer.state beside the params, without hashing a tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace adamprox {

// The entries of the dict lie in the order in which the params took their first steps, which is
// mostly that of the param groups: the next entry is the one wanted. Where it is not, an index by
// address is made, once a step, and the walk goes on from where it leads.
class StateCursor {
 public:
  explicit StateCursor(PyObject* dict) : dict_(dict) {}

  // The state of `param`, borrowed, if it is the next entry and has not been taken; else null.
  PyObject* next(PyObject* param) {
    PyObject *key, *value;
    Py_ssize_t position = position_;
    if (!PyDict_Next(dict_, &position, &key, &value) || key != param) return nullptr;
    if (indexed_) {
      if (taken_[ordinal_]) return nullptr;
      taken_[ordinal_] = true;
    }
    position_ = position;
    ++ordinal_;
    ++count_;
    return value;
  }

  // The state of `param`, wherever it is. Null: it has none, or it was taken before (`twice`).
  PyObject* find(PyObject* param, bool& twice) {
    if (PyObject* state = next(param)) return state;
    if (!indexed_) make_index();
    const auto found = index_.find(param);
    if (found == index_.end()) return nullptr;
    twice = taken_[found->second.ordinal];
    ordinal_ = found->second.ordinal;
    position_ = found->second.position;
    return next(param);
  }

  bool all_taken() const { return count_ == PyDict_GET_SIZE(dict_); }

 private:
  struct Place {
    Py_ssize_t position, ordinal;
  };

  void make_index() {
    indexed_ = true;
    // Up to now every entry was taken in its turn.
    taken_.assign(PyDict_GET_SIZE(dict_), false);
    std::fill_n(taken_.begin(), ordinal_, true);
    PyObject* param;
    Place place{0, 0};
    for (Py_ssize_t after = 0; PyDict_Next(dict_, &after, &param, nullptr);) {
      index_[param] = place;
      place = {after, place.ordinal + 1};
    }
  }

  PyObject* dict_;
  Py_ssize_t position_ = 0, ordinal_ = 0, count_ = 0;  // `ordinal_`: which entry comes next
  bool indexed_ = false;
  std::unordered_map<PyObject*, Place> index_;
  std::vector<bool> taken_;
};

}  // namespace adamprox
