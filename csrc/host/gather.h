// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
//
//   collect   walks lists and dicts, and holds all that it finds; nothing is read through an address
//             before, since Python code may run in between (a tensor subclass, a number's __float__)
//   settle    finds local tensors of DTensors, and what is no ordinary tensor
//   resolve   reads addresses; on a CPU no Python code runs from here to the update
//
// gather.cpp is one file, however long, so that this order can be checked by reading it.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../device_table.h"
#include "groups.h"

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
  bool sharded = false;  // other ranks have parts of it
  int64_t cut = -1;      // then: each rank begins at a multiple of so many rows; or -1
  bool usable = true;
};

class Gather;

// A table, and what a step keeps beside it.
struct HeldTable : DeviceTable {
  HeldTable(Device device, Gather& g) : DeviceTable(device), gather(g) {}
  Gather& gather;
  py::object records = py::none();   // what table.records points to
  py::object uploaded = py::none();  // the backend's: metadata, with the memory behind it
};

// What cannot be used as it is. `key`: "param", "grad", "step", a state's, or "state" for all of them;
// "step on device"; "overlap": it shares memory with an earlier one.
struct Finding {
  int group, index;
  py::object param;
  std::string key;
};

class Gather {
 public:
  // Reads everything into tables and findings. recipes_on_...: whether the backend there follows recipes;
  // loss_scaling: whether there is a scale that the host does not know. cpu_threads, if it is not 0: takes
  // the step at once if all is there and on the CPU, and then returns true.
  bool read(const py::list& groups, const py::dict& state, const py::dict& stand_ins,
            bool recipes_on_gpu, bool recipes_on_cpu, bool loss_scaling, int cpu_threads);

  py::list groups() const;  // that were read: the optimizer's list may have changed since

  // Tells autograd that the params are written to, counts the step, and makes the scalars.
  void begin(HeldTable& table);
  void step_on_cpu(HeldTable& table, int threads);

  // Lets go of every tensor.
  void release();

  // A tensor of one number on that device is read there; any other number, here and now.
  Value value_of(const Device& device, const char* key, PyObject* object, double value);

  // Whether the norms of its blocks are taken after the step, since a block is not all in one table.
  bool is_deferred(const Member& m) const;

  std::vector<Member> members;
  std::vector<std::unique_ptr<HeldTable>> tables;  // one a device; some may have no rows
  std::vector<Finding> findings;
  std::vector<py::object> captured;  // what CUDA graphs of earlier steps read
  double update_seconds = 0;         // what the CPU's update took: the rest is host time

 private:
  void collect_groups(const py::list& groups);
  void collect(const py::dict& state, const py::dict& stand_ins);
  bool find_grad(Member& m, PyObject* stand_ins);
  void find_state(Member& m, PyObject* stand_ins);
  bool is_known(const TensorRef& tensor) const;
  bool is_ordinary(TensorRef& tensor);
  void settle(Member& m);
  bool settle(Member& m, TensorRef& tensor);
  void find_divided();
  void resolve();
  bool resolve(Member& m, Entry& entry, Device& device);
  bool read_tensors();
  void make_recipes(HeldTable& table);
  void refresh(HeldTable& table);
  HeldTable& table_on(const Device& device);
  void report(Member& m, const char* key);
  bool has(const Member& m, int state) const {
    return groups_[m.group].has(kStateKeys[state].flag);
  }

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
  GroupReader group_reader_;
  KeyOrder state_keys_{state_keys()};
  bool recipes_on_gpu_ = false, recipes_on_cpu_ = false, loss_scaling_ = false;
  std::vector<GroupValues> groups_;
  std::vector<PyObject*> held_, found_;
  std::deque<void*> slots_;  // which do not move, and stay: a step allocates nothing
  size_t used_slots_ = 0;
  bool returned_ = false;  // to Python since addresses were read
};

}  // namespace adamprox
