// Reads an optimizer's param groups and state, afresh at each step, into one table a device.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "step_scalars.h"
#include "tensor_reader.h"
#include "tensor_table.h"

namespace adamprox {

namespace py = pybind11;

// One param of this step, with everything it needs kept alive.
struct Member {
  py::object param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;  // the last one null or a tensor
  py::object state;                                             // the param's dict
  int group;
  int cohort;
};

struct DeviceTable {
  dlpack::Device device;
  TensorTable table;
  std::vector<int> members;  // one a row
  std::vector<int> cohorts;  // one a row of table.scalars, of the group that is being read
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

  // An empty result means that `tables` are ready and nothing has been written yet.
  // `staged` maps a param to copies of its tensors, by key, that stand in for them in this step.
  std::vector<Finding> read(const py::list& groups, const py::dict& state, const py::dict& staged);

  // Before the update: tells autograd that every param is written to.
  void mark_written() const;

  // After the update: counts the step, once a cohort.
  void count_step();

  // Lets go of every tensor.
  void release();

  const TensorReader& reader() const { return reader_; }

  double step_of(const Member& member) const { return cohorts_[member.cohort].step + 1; }

  std::vector<DeviceTable> tables;
  std::vector<Member> members;
  double update_seconds = 0;  // what the CPU's update took in the last step: the rest is host time

 private:
  // Params that share one step counter, a tensor.
  struct Cohort {
    py::object counter;
    void* data;
    bool is_double;
    double step;
  };

  struct TensorType {
    PyTypeObject* type;
    bool plain;  // its memory is its own: not a DTensor, a FakeTensor or another wrapper
    const PyGetSetDef* grad;  // the C getter of its grad, or null
  };

  struct StateEntry {
    PyObject* param;
    PyObject* state;
    bool used;
  };

  void read_group(int index, const py::dict& group, const py::dict& staged);
  void read_param(int group, PyObject* param, const HyperParameters& hyper, bool amsgrad,
                  const py::dict& staged);
  int32_t scalars_of(DeviceTable& device, int cohort, const HyperParameters& hyper);
  bool read_tensor(PyObject* object, dlpack::Tensor& out);
  const TensorType& type_of(PyObject* object);
  py::object grad_of(PyObject* param);
  PyObject* state_of(PyObject* param, bool& twice);
  int cohort_of(PyObject* counter);
  DeviceTable& table_on(const dlpack::Device& device);
  void report(int group, PyObject* param, const char* key);

  const Decay decay_;
  const TensorReader reader_;
  std::vector<TensorType> types_;
  std::vector<StateEntry> entries_;
  size_t next_entry_ = 0;
  std::unordered_map<PyObject*, size_t> entry_index_;
  std::vector<Cohort> cohorts_;
  std::unordered_map<PyObject*, int> cohort_index_;
  std::vector<py::object> skipped_states_;  // of params without a grad
  std::vector<Finding> findings_;
};

}  // namespace adamprox
