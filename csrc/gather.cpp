#include "gather.h"

#include <algorithm>

#include "layout.h"
#include "python_values.h"

namespace adamprox {

Gather::Gather(Decay decay) : decay_(decay) {}

std::vector<Finding> Gather::read(const py::list& groups, const py::dict& state,
                                  const py::dict& staged) {
  release();
  PyObject *param, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &param, &value);) {
    entries_.push_back({param, value, false});
  }
  int index = 0;
  for (const py::handle group : groups) {
    read_group(index++, py::reinterpret_borrow<py::dict>(group), staged);
  }
  for (DeviceTable& t : tables) {
    t.table.decay = decay_;
  }
  return std::move(findings_);
}

void Gather::read_group(int index, const py::dict& group, const py::dict& staged) {
  const HyperParameters hyper = hyper_parameters(group);
  const bool amsgrad = as_bool(required(group, keys().amsgrad));
  for (DeviceTable& t : tables) t.cohorts.assign(t.table.scalars.size(), -1);
  const py::list params = py::reinterpret_borrow<py::list>(required(group, keys().params));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
    read_param(index, PyList_GET_ITEM(params.ptr(), i), hyper, amsgrad, staged);
  }
}

void Gather::read_param(int group, PyObject* param, const HyperParameters& hyper, bool amsgrad,
                        const py::dict& staged) {
  const Keys& k = keys();
  const py::object grad = grad_of(param);
  bool twice = false;
  PyObject* state = state_of(param, twice);
  if (twice) return report(group, param, "twice");
  if (grad.is_none()) {
    if (state != nullptr && PyDict_CheckExact(state)) {
      PyObject* counter = PyDict_GetItemWithError(state, k.step);
      if (counter != nullptr) skipped_states_.push_back(py::reinterpret_borrow<py::object>(state));
    }
    return;
  }
  if (state == nullptr || !PyDict_Check(state) || PyDict_GET_SIZE(state) == 0) {
    return report(group, param, "state");
  }

  PyObject* stand_ins = nullptr;
  if (PyDict_GET_SIZE(staged.ptr()) != 0) {
    stand_ins = PyDict_GetItemWithError(staged.ptr(), param);
    if (stand_ins == nullptr && PyErr_Occurred()) throw py::error_already_set();
  }
  const auto pick = [&](PyObject* key, PyObject* original) {
    PyObject* stand_in = stand_ins ? PyDict_GetItemWithError(stand_ins, key) : nullptr;
    return py::reinterpret_borrow<py::object>(stand_in != nullptr ? stand_in : original);
  };

  const StateValues values = state_values(state, amsgrad);
  Member member;
  member.group = group;
  member.state = py::reinterpret_borrow<py::object>(state);
  member.param = pick(k.param, param);
  member.grad = pick(k.grad, grad.ptr());
  member.exp_avg = pick(k.exp_avg, values.exp_avg);
  member.exp_avg_sq = pick(k.exp_avg_sq, values.exp_avg_sq);
  if (amsgrad) {
    member.max_exp_avg_sq = pick(k.max_exp_avg_sq, values.max_exp_avg_sq);
    if (!member.max_exp_avg_sq) return report(group, param, "max_exp_avg_sq");
  }

  dlpack::Tensor p;
  if (!read_tensor(member.param.ptr(), p) || !is_dense(p)) return report(group, param, "param");
  const DType dtype = real_dtype(p.dtype);
  bool aligned = is_aligned(p.data);

  // Reads one more tensor of this row; it must lie as the param does.
  const auto read = [&](const py::object& object, const char* key,
                        dlpack::DataType& type) -> void* {
    dlpack::Tensor t;
    if (object && read_tensor(object.ptr(), t) && same_layout(t, p) &&
        same_device(t.device, p.device)) {
      aligned &= is_aligned(t.data);
      type = t.dtype;
      return t.data;
    }
    report(group, param, key);
    return nullptr;
  };
  const auto read_state = [&](const py::object& object, const char* key, bool wide) -> void* {
    dlpack::DataType type = p.dtype;
    void* data = read(object, key, type);
    const dlpack::DataType expected = wide ? kFloat32 : p.dtype;
    if (type != expected) report(group, param, key);
    return data;
  };

  const size_t findings = findings_.size();
  dlpack::DataType grad_type = p.dtype, moment_type = p.dtype;
  void* grad_data = read(member.grad, "grad", grad_type);
  if (grad_type != p.dtype) report(group, param, "grad");
  void* exp_avg = read(member.exp_avg, "exp_avg", moment_type);
  const bool wide = moment_type != p.dtype;  // float32 moments of a 16-bit param
  if (wide && (p.dtype.bits != 16 || moment_type != kFloat32)) report(group, param, "exp_avg");
  void* exp_avg_sq = read_state(member.exp_avg_sq, "exp_avg_sq", wide);
  void* max_exp_avg_sq =
      amsgrad ? read_state(member.max_exp_avg_sq, "max_exp_avg_sq", wide) : nullptr;
  member.cohort = values.step != nullptr ? cohort_of(values.step) : -1;
  if (member.cohort < 0) report(group, param, "step");
  if (findings_.size() != findings) return;

  DeviceTable& device = table_on(p.device);
  TensorTable& table = device.table;
  const auto index = static_cast<int32_t>(table.rows.size());
  // Filled in where it lies: a copy would wait for the stores of its narrow fields.
  TensorRow& row = table.rows.emplace_back();
  row.param = p.data;
  row.exp_avg = exp_avg;
  row.exp_avg_sq = exp_avg_sq;
  row.max_exp_avg_sq = max_exp_avg_sq;
  row.numel = numel(p) * (p.dtype.code == dlpack::kComplex ? 2 : 1);
  row.scalars = scalars_of(device, member.cohort, hyper);
  row.first_chunk = static_cast<int32_t>(table.chunks.size());
  row.param_dtype = dtype;
  row.state_dtype = wide ? DType::kFloat32 : dtype;
  row.aligned = aligned;
  const auto chunks = static_cast<int32_t>(TensorTable::num_chunks(row.numel));
  for (int32_t i = 0; i < chunks; ++i) {
    Chunk& chunk = table.chunks.emplace_back();
    chunk.row = index;
    chunk.index = i;
  }
  table.numel += row.numel;
  table.grads.push_back(grad_data);
  device.members.push_back(static_cast<int>(members.size()));
  members.push_back(std::move(member));
}

// The scalars that the params of the group being read share where they are at the same step.
int32_t Gather::scalars_of(DeviceTable& device, int cohort, const HyperParameters& hyper) {
  const auto known = std::find(device.cohorts.rbegin(), device.cohorts.rend(), cohort);
  if (known != device.cohorts.rend()) {
    return static_cast<int32_t>(device.cohorts.rend() - known) - 1;
  }
  device.table.scalars.push_back(step_scalars(decay_, hyper, cohorts_[cohort].step + 1));
  device.cohorts.push_back(cohort);
  return static_cast<int32_t>(device.table.scalars.size()) - 1;
}

bool Gather::read_tensor(PyObject* object, dlpack::Tensor& out) {
  if (!type_of(object).plain || !reader_.read(object, out)) return false;
  // Lazy conjugation and negation do not show in the memory. A negated view of reals is dense only
  // if it has one element (it comes from the imaginary part of a conjugate).
  const bool complex = out.dtype.code == dlpack::kComplex;
  if (complex && answers_true(object, keys().is_conj)) return false;
  return !((complex || numel(out) == 1) && answers_true(object, keys().is_neg));
}

const Gather::TensorType& Gather::type_of(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  for (const TensorType& known : types_) {
    if (known.type == type) return known;
  }
  const py::module_ torch = py::module_::import("torch");
  const py::handle t(reinterpret_cast<PyObject*>(type));
  const bool plain =
      PyObject_IsSubclass(t.ptr(), torch.attr("Tensor").ptr()) == 1 &&
      t.attr("__torch_dispatch__").is(torch.attr("_C").attr("_disabled_torch_dispatch_impl"));
  const py::object grad = py::getattr(t, keys().grad, py::none());
  const bool getset = Py_IS_TYPE(grad.ptr(), &PyGetSetDescr_Type);
  t.inc_ref();  // another type must not take its address
  types_.push_back(
      {type, plain,
       getset ? reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset : nullptr});
  return types_.back();
}

// param.grad; where the type's own getter is a C function, without looking it up each time.
py::object Gather::grad_of(PyObject* param) {
  const PyGetSetDef* getset = type_of(param).grad;
  PyObject* grad = getset != nullptr ? getset->get(param, getset->closure)
                                     : PyObject_GetAttr(param, keys().grad);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

// optimizer.state[param] without hashing: entries are read in the order of the dict, which is that
// of the params as long as all of them took part in the first step.
PyObject* Gather::state_of(PyObject* param, bool& twice) {
  if (next_entry_ >= entries_.size() || entries_[next_entry_].param != param) {
    if (entry_index_.empty()) {
      for (size_t i = 0; i < entries_.size(); ++i) entry_index_[entries_[i].param] = i;
    }
    const auto found = entry_index_.find(param);
    if (found == entry_index_.end()) return nullptr;
    next_entry_ = found->second;
  }
  StateEntry& entry = entries_[next_entry_++];
  twice = entry.used;
  entry.used = true;
  return entry.state;
}

int Gather::cohort_of(PyObject* counter) {
  if (!cohorts_.empty() && cohorts_.back().counter.ptr() == counter) {
    return static_cast<int>(cohorts_.size()) - 1;
  }
  const auto known = cohort_index_.find(counter);
  if (known != cohort_index_.end()) return known->second;
  dlpack::Tensor t;
  if (!read_tensor(counter, t) || t.device.type != dlpack::kCPU || numel(t) != 1 ||
      t.dtype.code != dlpack::kFloat || t.dtype.bits < 32) {
    return -1;
  }
  const bool is_double = t.dtype.bits == 64;
  const double step =
      is_double ? *static_cast<double*>(t.data) : double{*static_cast<float*>(t.data)};
  const int index = static_cast<int>(cohorts_.size());
  cohorts_.push_back({py::reinterpret_borrow<py::object>(counter), t.data, is_double, step});
  cohort_index_[counter] = index;
  return index;
}

DeviceTable& Gather::table_on(const dlpack::Device& device) {
  for (DeviceTable& t : tables) {
    if (same_device(t.device, device)) return t;
  }
  tables.emplace_back();
  tables.back().device = device;
  return tables.back();
}

void Gather::report(int group, PyObject* param, const char* key) {
  findings_.push_back({group, py::reinterpret_borrow<py::object>(param), key});
}

void Gather::mark_written() const {
  for (const Member& member : members) reader_.mark_written(member.param.ptr());
}

void Gather::count_step() {
  const Keys& k = keys();
  const auto set_counter = [&](const py::object& state, const py::object& counter) {
    if (PyDict_SetItem(state.ptr(), k.step, counter.ptr()) != 0) throw py::error_already_set();
  };
  // A param that was skipped leaves its cohort, with a counter that stays behind.
  std::unordered_map<PyObject*, py::object> left_behind;
  for (const py::object& state : skipped_states_) {
    PyObject* counter = PyDict_GetItemWithError(state.ptr(), k.step);
    if (counter == nullptr || cohort_index_.find(counter) == cohort_index_.end()) continue;
    py::object& copy = left_behind[counter];
    if (!copy) copy = py::reinterpret_borrow<py::object>(counter).attr("clone")();
    set_counter(state, copy);
  }
  // Cohorts at the same step become one.
  std::vector<int> leaders(cohorts_.size());
  std::unordered_map<double, int> leader_at[2];
  for (size_t i = 0; i < cohorts_.size(); ++i) {
    Cohort& cohort = cohorts_[i];
    leaders[i] =
        leader_at[cohort.is_double].emplace(cohort.step, static_cast<int>(i)).first->second;
    if (leaders[i] != static_cast<int>(i)) continue;
    if (cohort.is_double) {
      *static_cast<double*>(cohort.data) = cohort.step + 1;
    } else {
      *static_cast<float*>(cohort.data) = static_cast<float>(cohort.step + 1);
    }
  }
  for (const Member& member : members) {
    const int leader = leaders[member.cohort];
    if (leader != member.cohort) set_counter(member.state, cohorts_[leader].counter);
  }
}

void Gather::release() {
  // The buffers stay, so that a step allocates nothing.
  for (DeviceTable& t : tables) {
    t.table.clear();
    t.members.clear();
    t.cohorts.clear();
  }
  members.clear();
  entries_.clear();
  entry_index_.clear();
  next_entry_ = 0;
  cohorts_.clear();
  cohort_index_.clear();
  skipped_states_.clear();
  findings_.clear();
}

}  // namespace adamprox
