// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
//
//   collect   walks lists and dicts, and holds all that it finds; nothing is read through an address
//             before, since Python code may run in between (a tensor subclass, a number's __float__)
//   settle    finds local tensors of DTensors, and what is no ordinary tensor
//   resolve   reads addresses; no Python code runs from here to the update
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../device_table.h"
#include "dicts.h"
#include "dtensor.h"
#include "torch_abi.h"

namespace adamprox {

// A tensor of this step: a Python object, a handle that is ours, or both.
struct TensorRef {
  PyObject* object = nullptr;
  void* owned = nullptr;

  bool exists() const { return object != nullptr || owned != nullptr; }
  void* handle() const { return owned != nullptr ? owned : TorchAbi::handle_of(object); }
};

// One param of this step. Its tensors may be stand-ins, or local tensors.
struct Member {
  PyObject *owner, *state = nullptr;
  int group, index;
  TensorRef param{}, grad{}, step{}, states[kStates]{};
  bool sharded = false;    // other ranks have parts of it
  bool on_device = false;  // its scalars are made there
  bool usable = true;
};

// What the bindings keep beside a table.
struct HeldTable : DeviceTable {
  using DeviceTable::DeviceTable;
  py::object records;          // what table.records points to
  py::object uploaded;         // the metadata, with the memory behind it
  uintptr_t uploaded_for = 0;  // its stream, whose steps work there
};

// What cannot be used as it is. `key`: "param", "grad", "step", a state's, or "state" for all of them;
// "step on device"; "overlap": it shares memory with an earlier one.
struct Finding {
  int group, index;
  py::object param;
  std::string key;
};

struct Request {
  bool recipes_on_gpu = false, recipes_on_cpu = false;  // whether a backend there follows recipes
  bool loss_scaling = false;                            // which the host does not know
  int cpu_threads = 0;  // not 0: steps at once, if all is there and on the CPU
};

class Gather {
 public:
  // Reads everything into tables() and findings(). With Request::cpu_threads it also takes the step, if
  // there is nothing to find; then it returns true.
  bool read(const py::list& groups, const py::dict& state, const py::dict& stand_ins,
            const Request& request);

  const std::vector<Finding>& findings() const { return findings_; }
  std::vector<HeldTable*> tables();
  py::list groups() const;  // that were read: the optimizer's list may have changed since

  // Tells autograd that the params are written to, counts the step, and makes the scalars.
  void begin(HeldTable& table);
  void step_on_cpu(HeldTable& table, int threads);

  // Lets go of every tensor.
  void release();

  // A tensor of one number on that device is read there; any other number, here and now.
  Value value_of(const Device& device, PyObject* object, double value);

  bool is_deferred(const Member& m) const { return m.sharded && has_blocks(groups_[m.group].rule); }

  std::vector<Member> members;
  std::vector<py::object> captured;  // what CUDA graphs of earlier steps read
  double update_seconds = 0;         // what the CPU's update took: the rest is host time

 private:
  void collect(const py::list& groups, const py::dict& state, const py::dict& stand_ins);
  void collect_groups(const py::list& groups);
  bool find_grad(Member& m, PyObject* stand_ins);
  void find_state(Member& m, PyObject* stand_ins);
  void settle(Member& m);
  bool settle(Member& m, TensorRef& tensor);
  void resolve();
  bool resolve(Member& m, TensorRow& row, void*& grad, Device& device);
  StepCount read_count(const Member& m);
  void place_counts();
  void find_numbers(GroupValues& values, bool on_host);
  void number_values();
  void make_recipes(const Device& device);
  void refresh(HeldTable& table);
  HeldTable& table_on(const Device& device);
  void report(Member& m, const char* key);

  PyObject* hold(PyObject* object) {
    Py_INCREF(object);
    held_.push_back(object);
    return object;
  }
  template <typename T>
  void* own(T tensor_or_handle) {
    if (used_slots_ == slots_.size()) slots_.push_back(nullptr);
    abi_.own(tensor_or_handle, slots_[used_slots_]);
    return &slots_[used_slots_++];
  }

  const TorchAbi& abi_ = TorchAbi::get();
  Placements placements_;
  GroupReader group_reader_;
  KeyOrder state_order_{state_names()};
  Request request_;
  std::vector<GroupValues> groups_;
  std::vector<RowValues> row_values_;  // of groups that are alike, once
  std::vector<int> values_of_;         // one a member
  std::vector<std::unique_ptr<HeldTable>> tables_;
  std::vector<Finding> findings_;
  std::vector<PyObject*> held_, values_;
  std::deque<void*> slots_;  // which do not move, and stay: a step allocates nothing
  size_t used_slots_ = 0;
  bool returned_ = false;  // to Python since addresses were read
};

}  // namespace adamprox
