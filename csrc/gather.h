// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "group_reader.h"
#include "known_param.h"
#include "local_tensor.h"
#include "python_values.h"
#include "state_cursor.h"
#include "step_scalars.h"
#include "tensor_reader.h"
#include "tensor_table.h"
#include "tensor_types.h"

namespace adamprox {

// One param of this step, and what it is read from; borrowed until hold().
struct Member {
  PyObject* param;    // or its stand-in or share, as with the others
  PyObject* grad;     // null: param's own, of which no Python object has been asked for yet
  void* grad_handle;  // what the reader has of it instead
  PyObject *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last one null or a tensor
  PyObject* state;                                  // the param's dict
  PyObject* owner;                                  // the param itself
  int group;
  int cohort;
};

class PayloadUploads;

struct DeviceTable {
  dlpack::Device device;
  TensorTable table;
  std::vector<int> members;  // one a row
  // By cohort: which scalars it has, and in which run of groups that share them.
  std::vector<std::pair<int64_t, int32_t>> scalars_of_cohort;
  // The rows as they were last copied to the device, with the chunks, which follow from them; the
  // copy, and the stream whose steps work in the memory behind it.
  std::vector<TensorRow> uploaded_rows;
  py::object uploaded;
  void* uploaded_at = nullptr;
  void* uploaded_for = nullptr;
  std::shared_ptr<PayloadUploads> uploads;  // made when first needed
  py::object records;                       // what table.records points to

  bool rows_are_uploaded() const {
    const std::vector<TensorRow>& rows = table.rows;
    return uploaded && rows.size() == uploaded_rows.size() &&
           std::memcmp(rows.data(), uploaded_rows.data(), rows.size() * sizeof(TensorRow)) == 0;
  }
};

// What the gather cannot use as it is; Python mends it (a state to be made, a layout to be
// copied) or raises. `key` names a tensor of the param ("grad", "exp_avg", ...), "state", or
// "twice" for a param that was read before.
struct Finding {
  int group;
  py::object param;
  std::string key;
};

// Which tables may have recipes, since the backend that will run them follows some; and whether they
// must, for a loss scale that the host does not know.
struct Recipes {
  bool on_gpu = false, on_cpu = false, loss_scaling = false;
};

class Gather {
 public:
  explicit Gather(Decay decay);

  // An empty result means that `tables` are ready and nothing has been written yet; they are good
  // for as long as the GIL is held, or until release() after hold().
  // `staged` maps a param to copies of its tensors, by key, that stand in for them in this step.
  std::vector<Finding> read(const py::list& groups, const py::dict& state, const py::dict& staged,
                            Recipes recipes);

  // Keeps every tensor of the step alive; or only what count_step() needs.
  void hold();
  void hold_counters();

  // Before the update: tells autograd that every param is written to, and lets params without a grad
  // leave their cohorts.
  void begin_step();

  // After the update: counts the step, once a cohort; not those that the update itself has counted.
  void count_step();

  // Lets go of every tensor.
  void release();

  const TensorReader& reader() const { return reader_; }

  // A tensor of one number on the table's device.
  Number number_at(const DeviceTable& table, const py::object& tensor) {
    return number(table.device, tensor.ptr(), 0);
  }

  // Whether the step takes a norm of which other ranks have a part.
  bool norms_across_ranks() const { return sharded && decay_ == Decay::kProxL2; }

  double step_of(const Member& member) const { return cohorts_[member.cohort].step + 1; }

  std::vector<DeviceTable> tables;
  std::vector<Member> members;
  std::vector<py::object> captured;  // what CUDA graphs of earlier steps read
  bool only_on_cpu = false;          // whether all that the last read() found is there
  bool by_cuda = false;       // whether CUDA has run the last step, given nothing but the rows
  bool sharded = false;       // whether a param in it has other ranks' shares
  double update_seconds = 0;  // what the CPU's update took in the last step: the rest is host time

 private:
  // Params that share one step counter, a tensor.
  struct Cohort {
    PyObject* counter;
    void* data;
    bool is_double;
    double step;  // NaN where the host does not read it
    dlpack::Device device;
    bool in_recipes;
  };

  struct Skipped {  // a param without a grad
    int group;
    PyObject* param;
    PyObject* state;  // null: it has none
  };

  void read_group(int index, PyObject* group, StateCursor& states, const py::dict& staged);
  void read_param(int group, PyObject* param, const GroupValues& values, StateCursor& states,
                  const py::dict& staged);
  using Data = std::array<void*, KnownParam::kTensors>;  // null where there is no tensor
  bool has_grad(Member& member);
  bool recognise(KnownParam& known, const Member& member, bool amsgrad, Data& data) const;
  bool understand(KnownParam& known, Member& member, bool amsgrad, Data& data);
  void append(const KnownParam& known, const Member& member, const GroupValues& values,
              const Data& data);
  void find_skipped_states(StateCursor& states);
  bool needs_recipe(const dlpack::Device& device, int cohort, const GroupValues& values) const;
  const char* misplaced_count(const dlpack::Device& device, int cohort,
                              const GroupValues& values) const;
  int32_t scalars_of(DeviceTable& device, int cohort, const GroupValues& values);
  Recipe recipe(const dlpack::Device& device, Cohort& cohort, const GroupValues& values);
  Number number(const dlpack::Device& device, PyObject* object, double value);
  PyObject* local(PyObject* object, PyObject* param);
  bool read_tensor(PyObject* object, dlpack::Tensor& out);
  PyObject* grad_of(PyObject* param);
  int cohort_of(PyObject* counter);
  DeviceTable& table_on(const dlpack::Device& device);
  void let_skipped_leave();
  void report(int group, PyObject* param, const char* key);

  const Decay decay_;
  TensorReader reader_;
  TensorTypes types_;
  Placements placements_;
  std::vector<Cohort> cohorts_;
  std::unordered_map<PyObject*, int> cohort_index_;
  std::vector<Skipped> skipped_;
  Recipes recipes_;
  int64_t run_ = 0;  // of groups with the same hyper-parameters, one after the other
  BiasCorrections bias_;
  std::vector<py::object> held_;
  std::vector<GroupReader> group_readers_;
  std::vector<KnownParam> known_;  // as members were at the last step
  std::vector<Finding> findings_;
};

}  // namespace adamprox
