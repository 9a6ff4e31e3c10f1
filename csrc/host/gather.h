// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
//
//   collect   walks lists and dicts, and holds all that it finds; nothing is read through an address
//             before, since Python code may run in between (a tensor subclass, a number's __float__)
//   settle    finds local tensors of DTensors, and what is no ordinary tensor
//   resolve   reads addresses; no Python code runs from here to the update
//   begin     counts the step and makes the scalars
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../table.h"
#include "dicts.h"
#include "dtensor.h"
#include "overlaps.h"
#include "torch_abi.h"

namespace adamprox {

// A tensor of this step: a Python object, a handle, or both.
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

struct StepCount {
  void* at = nullptr;
  bool is_double = false;
  Device device{};
  double before = 0;  // this step, once it is counted

  // On the host.
  double read() const { return is_double ? *static_cast<double*>(at) : *static_cast<float*>(at); }
  void write(double value) const {
    if (is_double) {
      *static_cast<double*>(at) = value;
    } else {
      *static_cast<float*>(at) = static_cast<float>(value);
    }
  }
};

struct DeviceTable {
  Device device;
  TensorTable table;
  std::vector<int> members;                      // one a row
  std::vector<StepCount> counts;                 // one a row
  std::vector<int64_t> grad_bytes;               // one a row
  std::vector<std::pair<int, bool>> scalars_of;  // one a scalars: whose they are
  double loss_scale = 1;                         // the host's
  bool recipes = false;                          // whether the scalars are made on the device
  bool begun = false, launched = false;
  py::object records;  // what table.records points to

  // Kept from step to step. The rows as they were when the chunks were laid out:
  std::vector<TensorRow> known_rows;
  std::vector<void*> known_counts;
  WrittenMemory written;
  bool overlaps = false;
  // and as they were copied to the device, with the chunks; the copy, and its stream, whose steps work
  // in the memory behind it.
  std::vector<TensorRow> uploaded_rows;
  py::object uploaded;
  void* uploaded_for = nullptr;

  bool blocks() const { return table.num_of_blocks > 0; }
};

// What cannot be used as it is. `key`: "param", "grad", "step", a state's, or "state" for all of them;
// "step on device"; "overlap".
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
  std::vector<DeviceTable*> tables();

  // Tells autograd that the params are written to, counts the step, and makes the scalars; undo() takes
  // the count back, unless the step was launched.
  void begin(DeviceTable& table);
  void undo(DeviceTable& table);
  void step_on_cpu(DeviceTable& table, int threads);

  // Lets go of every tensor.
  void release();

  // A tensor of one number on the table's device is read there; any other number, here and now.
  Value value_of(const Device& device, PyObject* object, double value);

  bool is_deferred(const Member& m) const { return m.sharded && has_blocks(groups_[m.group].rule); }

  std::vector<Member> members;
  std::vector<py::object> captured;  // what CUDA graphs of earlier steps read
  double update_seconds = 0;         // what the CPU's update took: the rest is host time

 private:
  void collect(const py::list& groups, const py::dict& state, const py::dict& stand_ins);
  bool find_grad(Member& m, PyObject* stand_ins);
  void find_state(Member& m, PyObject* stand_ins);
  void settle(Member& m);
  bool settle(Member& m, TensorRef& tensor);
  void resolve();
  bool resolve(Member& m, TensorRow& row, void*& grad, Device& device, int64_t& grad_bytes);
  StepCount read_count(const Member& m);
  void place_counts();
  void find_numbers(GroupValues& values, bool on_host);
  void find_overlaps(size_t table);
  void split(size_t table, const std::vector<int>& turns);
  void refresh(DeviceTable& table);
  int32_t scalars_of(DeviceTable& table, const Member& m, double step);
  void follow_recipes(DeviceTable& table);
  DeviceTable& table_on(const Device& device);
  PyObject* hold(PyObject* object);
  template <typename T>
  void* own(T tensor_or_handle) {
    if (used_slots_ == slots_.size()) slots_.push_back(nullptr);
    void*& slot = slots_[used_slots_];
    abi_.own(tensor_or_handle, slot);
    ++used_slots_;
    return &slot;
  }
  void report(Member& m, const char* key);

  const TorchAbi& abi_ = TorchAbi::get();
  Placements placements_;
  GroupReader group_reader_;
  KeyOrder state_order_{[] {
    std::vector<PyObject*> names{interned("step")};
    for (const StateKey& key : kStateKeys) names.push_back(interned(key.key));
    return names;
  }()};
  Request request_;
  std::vector<GroupValues> groups_;
  std::vector<int> runs_;  // of each group: the first of those before it that are alike
  std::vector<std::unique_ptr<DeviceTable>> tables_;
  std::vector<Finding> findings_;
  std::vector<PyObject*> held_;
  std::deque<void*> slots_;  // which do not move, and stay: a step allocates nothing
  size_t used_slots_ = 0;
  std::vector<PyObject*> values_;
  BiasCorrections bias_;
  bool returned_ = false;  // to Python since addresses were read
};

}  // namespace adamprox
