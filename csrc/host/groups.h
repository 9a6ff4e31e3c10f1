// The values of a param group: first all of them are held, then numbers, switches and a rule are made of
// them, which may run Python code.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "../math/decay.h"
#include "dicts.h"
#include "torch_abi.h"

namespace adamprox {

// What is read of a group: its numbers, its switches, its decay and its params.
enum { kFlagsAt = kNumbers, kDecayAt = kFlagsAt + kFlags, kParamsAt, kGroupKeys };

inline std::vector<PyObject*> group_keys() {
  std::vector<PyObject*> keys;
  for (const NumberKey& key : kNumberKeys) keys.push_back(interned(key.key));
  for (const FlagKey& key : kFlagKeys) keys.push_back(interned(key.key));
  keys.push_back(interned("decay"));
  keys.push_back(interned("params"));
  return keys;
}

inline std::vector<PyObject*> state_keys() {  // of a param's state: its step count, then its states
  std::vector<PyObject*> keys{interned("step")};
  for (const StateKey& key : kStateKeys) keys.push_back(interned(key.key));
  return keys;
}

struct GroupValues {
  PyObject* group = nullptr;  // held elsewhere
  HyperParameters h{};
  Decay rule{};
  bool has_tensors = false;
  bool on_host = false;  // then `h` has their numbers
  bool lasting = false;  // no value can change by itself: what has its address is the same value
  bool divided = false;  // it is one block, and not all in one table
  std::array<py::object, kGroupKeys> held;
  py::object tensors[kNumbers];  // numbers that may be read on a device, and are not in `h`

  bool has(int flag) const { return flag == kAlways || h.flag[flag]; }

  void release() {
    held[kParamsAt] = {};
    if (!lasting) *this = {};
  }
};

class GroupReader {
 public:
  void hold(PyObject* group, GroupValues& v) {
    if (!PyDict_Check(group)) throw py::type_error("param_groups must be dicts");
    keys_.read(group, found_);
    v.group = group;
    for (int i = 0; i < kParamsAt; ++i) v.lasting &= found_[i] == v.held[i].ptr();
    for (int i = v.lasting ? kParamsAt : 0; i < kGroupKeys; ++i) {
      v.held[i] = py::reinterpret_borrow<py::object>(found_[i]);
    }
  }

  void interpret(GroupValues& v) const {
    PyObject* params = required(v, kParamsAt).ptr();
    if (!PyList_Check(params) && !PyTuple_Check(params)) {
      throw py::type_error(
          "Invalid params: expected a list or a tuple in each of param_groups; nothing was "
          "updated");
    }
    if (v.lasting) return;
    v.has_tensors = v.on_host = false;
    for (int n = 0; n < kNumbers; ++n) read_number(n, v);
    for (int f = 0; f < kFlags; ++f) v.h.flag[f] = is_on(f, v);
    if (v.h.flag[kDecayBySchedule] && !v.held[kInitialLr]) {
      throw py::value_error(
          "decay_by='schedule' needs 'initial_lr' in the param group; nothing was updated");
    }
    v.rule = rule_of(v);  // or it throws
    v.lasting = std::all_of(v.held.begin(), v.held.begin() + kParamsAt, is_constant);
  }

  // May run Python code, and wait for a GPU.
  static double number(const char* key, const py::object& value) {
    const double result = PyFloat_AsDouble(value.ptr());
    if (result != -1.0 || PyErr_Occurred() == nullptr) return result;
    if (TorchAbi::get().is_tensor(value.ptr())) {  // of several elements
      clear(PyExc_ValueError);
      throw py::value_error(invalid(key, value) + "one number; nothing was updated");
    }
    clear(PyExc_TypeError);
    throw py::type_error(invalid(key, value) + "a number; nothing was updated");
  }

 private:
  static std::string invalid(const std::string& key, const py::object& value) {
    return "Invalid " + key + ": " + std::string(py::repr(value)) + ", expected ";
  }

  // A list may change, and so may the items of a tuple.
  static bool is_constant(py::handle value) {
    if (value && PyTuple_CheckExact(value.ptr())) {
      return std::all_of(value.begin(), value.end(), is_constant);
    }
    return !value || value.is_none() || PyBool_Check(value.ptr()) ||
           PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr()) ||
           PyUnicode_CheckExact(value.ptr());
  }

  const py::object& required(const GroupValues& v, int which) const {
    if (v.held[which]) return v.held[which];
    PyErr_SetObject(PyExc_KeyError, keys_.name(which));
    throw py::error_already_set();
  }

  void read_number(int n, GroupValues& v) const {
    const NumberKey& key = kNumberKeys[n];
    v.h.number[n] = n == kInitialLr ? v.h.number[kLr] : key.missing;
    v.tensors[n] = n == kInitialLr ? v.tensors[kLr] : py::object();
    if (key.optional && (!v.held[n] || v.held[n].is_none())) return;
    py::object value = required(v, n);
    if (n == kBlock) {
      v.h.number[n] = rows_of_block(value);
      return;
    }
    if (key.item >= 0) {
      const auto pair = py::reinterpret_steal<py::tuple>(PySequence_Tuple(value.ptr()));
      if (!pair) clear(PyExc_TypeError);
      if (!pair || pair.size() != 2) {
        throw py::type_error(invalid(key.key, value) + "two numbers; nothing was updated");
      }
      value = pair[key.item];
      if (key.optional && value.is_none()) return;
    }
    const bool tensor = TorchAbi::get().is_tensor(value.ptr());
    v.has_tensors |= tensor;
    v.tensors[n] = tensor ? value : py::object();
    if (!tensor) v.h.number[n] = number(key.key, value);
  }

  static double rows_of_block(const py::object& value) {
    for (const BlockName& block : kBlockNames) {
      if (is_text(value, block.name)) return block.rows;
    }
    const auto rows = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!rows) clear(PyExc_TypeError);
    if (rows && !PyBool_Check(value.ptr()) && rows >= py::int_(1)) {
      const double number = PyLong_AsDouble(rows.ptr());
      if (number != -1.0) return number;
      clear(PyExc_OverflowError);
      return INFINITY;  // more than any tensor has
    }
    throw py::value_error(invalid("block", value) +
                          "'tensor', 'row', 'group' or a number of rows, " +
                          "1 or more; nothing was updated");
  }

  bool is_on(int f, const GroupValues& v) const {  // may run Python code
    const FlagKey& key = kFlagKeys[f];
    const py::object& value = key.optional ? v.held[kFlagsAt + f] : required(v, kFlagsAt + f);
    if (!value) return false;
    if (key.kind == kNotNone) return !value.is_none() && value.ptr() != Py_False;
    if (key.kind == kTruth) return bool(py::bool_(value));
    if (is_text(value, key.text) || is_text(value, key.other)) return is_text(value, key.text);
    throw py::value_error(invalid(key.key, value) + "'" + key.other + "' or '" + key.text +
                          "'; nothing was updated");
  }

  // The error that there is, if it is of that kind; any other one goes on.
  static void clear(PyObject* kind) {
    if (!PyErr_ExceptionMatches(kind)) throw py::error_already_set();
    PyErr_Clear();
  }

  static bool is_text(const py::object& value, const char* text) {
    return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
  }

  // The last rule of that name whose switch, if it has one, is on.
  Decay rule_of(const GroupValues& v) const {
    const py::object& decay = required(v, kDecayAt);
    for (int r = kRules; r-- > 0;) {
      if (is_text(decay, kRuleKeys[r].decay) && v.has(kRuleKeys[r].flag)) {
        return static_cast<Decay>(r);
      }
    }
    std::string known;
    for (const RuleKey& key : kRuleKeys) {
      if (key.flag == kAlways) known += (known.empty() ? "" : ", ") + std::string(key.decay);
    }
    throw py::value_error(invalid("decay", decay) + "one of " + known + "; nothing was updated");
  }

  KeyOrder keys_{group_keys()};
  std::vector<PyObject*> found_;
};

}  // namespace adamprox
