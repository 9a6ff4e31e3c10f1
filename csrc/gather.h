// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "local_tensor.h"
#include "state_cursor.h"
#include "step_scalars.h"
#include "tensor_reader.h"
#include "tensor_table.h"
#include "tensor_types.h"
#include "trail.h"

namespace adamprox {

namespace py = pybind11;

// One param of this step, and what it is read from; borrowed until hold().
struct Member {
  PyObject* param;  // or its stand-in or share, as with the others
  PyObject* grad;   // null: param's own, of which no Python object has been asked for yet
  PyObject *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last one null or a tensor
  PyObject* state;                                  // the param's dict
  PyObject* owner;                                  // the param itself
  int group;
  int cohort;
};

struct DeviceTable {
  dlpack::Device device;
  TensorTable table;
  std::vector<int> members;  // one a row
  // Which scalars the cohorts of the group that is being read have.
  std::vector<std::pair<int, int32_t>> scalars_of_cohort;
  // The rows and chunks as they were last copied to the device, and the copy.
  std::string uploaded_bytes;
  py::object uploaded;
};

// What the gather cannot use as it is; Python mends it (a state to be made, a layout to be
// copied) or raises. `key` names a tensor of the param ("grad", "exp_avg", ...), "state", or
// "twice" for a param that was read before.
struct Finding {
  int group;
  py::object param;
  std::string key;
};

class Gather {
 public:
  explicit Gather(Decay decay);

  // An empty result means that `tables` are ready and nothing has been written yet; they are good
  // for as long as the GIL is held, or until release() after hold().
  // `staged` maps a param to copies of its tensors, by key, that stand in for them in this step.
  std::vector<Finding> read(const py::list& groups, const py::dict& state, const py::dict& staged);

  // Keeps every tensor of the step alive.
  void hold();

  // Before the update: tells autograd that every param is written to.
  void mark_written() const;

  // After the update: counts the step, once a cohort.
  void count_step();

  // Lets go of every tensor.
  void release();

  const TensorReader& reader() const { return reader_; }

  // Whether the step takes a norm of which other ranks have a part.
  bool norms_across_ranks() const { return sharded && decay_ == Decay::kProxL2; }

  double step_of(const Member& member) const { return cohorts_[member.cohort].step + 1; }

  std::vector<DeviceTable> tables;
  std::vector<Member> members;
  bool only_on_cpu = false;   // whether all that the last read() found is there
  bool sharded = false;       // whether a param in it has other ranks' shares
  double update_seconds = 0;  // what the CPU's update took in the last step: the rest is host time

 private:
  // Params that share one step counter, a tensor.
  struct Cohort {
    PyObject* counter;
    void* data;
    bool is_double;
    double step;
  };

  struct Skipped {  // a param without a grad
    int group;
    PyObject* param;
    PyObject* state;  // null: it has none
  };

  void read_group(int index, const py::dict& group, StateCursor& states, const py::dict& staged);
  void read_param(int group, PyObject* param, const HyperParameters& hyper, bool amsgrad,
                  StateCursor& states, const py::dict& staged);
  void find_skipped_states(StateCursor& states);
  int32_t scalars_of(DeviceTable& device, int cohort, const HyperParameters& hyper);
  PyObject* local(PyObject* object, PyObject* param);
  bool read_tensor(PyObject* object, dlpack::Tensor& out);
  TensorReader::Grad read_grad(Member& member, dlpack::Tensor& out);
  PyObject* grad_of(PyObject* param);
  int cohort_of(PyObject* counter);
  DeviceTable& table_on(const dlpack::Device& device);
  void report(int group, PyObject* param, const char* key);

  const Decay decay_;
  const TensorReader reader_;
  TensorTypes types_;
  Placements placements_;
  std::vector<Cohort> cohorts_;
  std::unordered_map<PyObject*, int> cohort_index_;
  std::vector<Skipped> skipped_;
  BiasCorrections bias_;
  std::vector<py::object> held_;
  Trail trail_;  // of what read() touches
  std::vector<Finding> findings_;
};

}  // namespace adamprox
