#include "gather.h"

#include <algorithm>

#include "layout.h"
#include "python_values.h"

namespace adamprox {

Gather::Gather(Decay decay) : decay_(decay) {}

std::vector<Finding> Gather::read(const py::list& groups, const py::dict& state,
                                  const py::dict& staged) {
  release();
  StateCursor states(state.ptr());
  trail_.start();
  sharded = false;
  int index = 0;
  for (const py::handle group : groups) {
    read_group(index++, py::reinterpret_borrow<py::dict>(group), states, staged);
  }
  if (!states.all_taken()) find_skipped_states(states);
  only_on_cpu = true;
  for (DeviceTable& t : tables) {
    t.table.decay = decay_;
    only_on_cpu &= t.device.type == dlpack::kCPU || t.table.rows.empty();
  }
  return std::move(findings_);
}

void Gather::read_group(int index, const py::dict& group, StateCursor& states,
                        const py::dict& staged) {
  const HyperParameters hyper = hyper_parameters(group);
  const bool amsgrad = as_bool(required(group, keys().amsgrad));
  for (DeviceTable& t : tables) t.scalars_of_cohort.clear();
  PyObject* params = required(group, keys().params);
  if (!PyList_Check(params)) throw py::type_error("param_groups[...]['params'] must be a list");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    read_param(index, PyList_GET_ITEM(params, i), hyper, amsgrad, states, staged);
  }
}

void Gather::read_param(int group, PyObject* param, const HyperParameters& hyper, bool amsgrad,
                        StateCursor& states, const py::dict& staged) {
  const Keys& k = keys();
  Member member{};
  member.group = group;
  member.owner = param;
  PyObject* stand_ins = nullptr;
  if (PyDict_GET_SIZE(staged.ptr()) != 0) {
    stand_ins = PyDict_GetItemWithError(staged.ptr(), param);
    if (stand_ins == nullptr && PyErr_Occurred()) throw py::error_already_set();
  }
  const auto pick = [&](PyObject* key, PyObject* original) {
    PyObject* share = local(original, param);
    PyObject* stand_in = stand_ins ? PyDict_GetItemWithError(stand_ins, key) : nullptr;
    return stand_in != nullptr ? stand_in : share;
  };

  member.grad = pick(k.grad, nullptr);
  dlpack::Tensor g;
  const TensorReader::Grad grad = read_grad(member, g);
  if (grad == TensorReader::Grad::kNone) {
    skipped_.push_back({group, param, states.next(param)});
    return;
  }
  bool twice = false;
  PyObject* state = states.find(param, twice);
  if (twice) return report(group, param, "twice");
  if (state == nullptr || !PyDict_Check(state) || PyDict_GET_SIZE(state) == 0) {
    return report(group, param, "state");
  }
  trail_.visit(state);
  trail_.visit<192>(reinterpret_cast<PyDictObject*>(state)->ma_keys);
  const StateValues values = state_values(state, amsgrad);
  member.state = state;
  member.param = pick(k.param, param);
  member.exp_avg = pick(k.exp_avg, values.exp_avg);
  member.exp_avg_sq = pick(k.exp_avg_sq, values.exp_avg_sq);
  member.max_exp_avg_sq = amsgrad ? pick(k.max_exp_avg_sq, values.max_exp_avg_sq) : nullptr;

  dlpack::Tensor p;
  if (!read_tensor(member.param, p) || !is_dense(p)) return report(group, param, "param");
  const int64_t count = numel(p);
  const bool complex = p.dtype.code == dlpack::kComplex;
  // Lazy conjugation and negation do not show in the memory. A negated view of reals is dense only
  // if it has one element (it comes from the imaginary part of a conjugate).
  const bool may_be_lazy = complex || count == 1;
  const auto is_lazy = [&](PyObject* tensor) {
    return (complex && answers_true(tensor, k.is_conj)) || answers_true(tensor, k.is_neg);
  };
  if (may_be_lazy && is_lazy(member.param)) return report(group, param, "param");
  const DType dtype = real_dtype(p.dtype);
  const size_t findings = findings_.size();
  bool aligned = is_aligned(p.data);
  trail_.visit(p.data);
  // Every other tensor of this row must lie as the param does, and be of the type expected.
  const auto accept = [&](bool readable, const dlpack::Tensor& t, PyObject* tensor, const char* key,
                          const dlpack::DataType& type) -> void* {
    if (readable && t.dtype == type && same_layout(t, p) && same_device(t.device, p.device) &&
        !(may_be_lazy && is_lazy(tensor))) {
      aligned &= is_aligned(t.data);
      trail_.visit(t.data);
      return t.data;
    }
    report(group, param, key);
    return nullptr;
  };
  if (may_be_lazy && member.grad == nullptr) member.grad = grad_of(param);
  void* grad_data = accept(grad == TensorReader::Grad::kRead, g, member.grad, "grad", p.dtype);

  dlpack::Tensor t;
  bool readable = read_tensor(member.exp_avg, t);
  const bool wide = readable && p.dtype.bits == 16 && t.dtype == kFloat32;  // moments
  const dlpack::DataType& moment_type = wide ? kFloat32 : p.dtype;
  const auto read_moment = [&](PyObject* tensor, const char* key) {
    const bool readable = read_tensor(tensor, t);
    return accept(readable, t, tensor, key, moment_type);
  };
  void* exp_avg = accept(readable, t, member.exp_avg, "exp_avg", moment_type);
  void* exp_avg_sq = read_moment(member.exp_avg_sq, "exp_avg_sq");
  void* max_exp_avg_sq = amsgrad ? read_moment(member.max_exp_avg_sq, "max_exp_avg_sq") : nullptr;
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
  row.numel = count * (complex ? 2 : 1);
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
  members.push_back(member);
}

// Of the params without a grad: those that took part in earlier steps have a state.
void Gather::find_skipped_states(StateCursor& states) {
  for (Skipped& s : skipped_) {
    bool twice = false;
    if (s.state == nullptr) s.state = states.find(s.param, twice);
    if (twice) report(s.group, s.param, "twice");
  }
}

// The scalars that the params of the group being read share where they are at the same step.
int32_t Gather::scalars_of(DeviceTable& device, int cohort, const HyperParameters& hyper) {
  for (const auto& [known, scalars] : device.scalars_of_cohort) {
    if (known == cohort) return scalars;
  }
  bias_.update(hyper, cohorts_[cohort].step + 1);
  device.table.scalars.push_back(step_scalars(decay_, hyper, bias_));
  const auto index = static_cast<int32_t>(device.table.scalars.size()) - 1;
  device.scalars_of_cohort.emplace_back(cohort, index);
  return index;
}

// What has the memory: of a DTensor, its share on this rank, if it is dealt out as the param is.
PyObject* Gather::local(PyObject* object, PyObject* param) {
  if (object == nullptr || !types_.of(object).distributed) return object;
  if (object == param) {
    const Placements::Kind kind = placements_.kind_of(param);
    if (kind == Placements::Kind::kOther) return object;
    sharded |= kind == Placements::Kind::kShard;
  } else if (!types_.of(param).distributed || !Placements::alike(object, param)) {
    return object;
  }
  return held_.emplace_back(Placements::share_of(object)).ptr();
}

bool Gather::read_tensor(PyObject* object, dlpack::Tensor& out) {
  if (object == nullptr || !types_.of(object).plain) return false;
  reader_.visit(object, trail_);
  return reader_.read(object, out);
}

TensorReader::Grad Gather::read_grad(Member& member, dlpack::Tensor& out) {
  if (member.grad == nullptr) {
    if (reader_.reads_grads() && types_.of(member.owner).plain) {
      return reader_.read_grad(member.owner, out, trail_);
    }
    member.grad = local(grad_of(member.owner), member.owner);
  }
  if (member.grad == Py_None) return TensorReader::Grad::kNone;
  return read_tensor(member.grad, out) ? TensorReader::Grad::kRead
                                       : TensorReader::Grad::kUnreadable;
}

// param.grad, held; where the type's own getter is a C function, without looking it up each time.
PyObject* Gather::grad_of(PyObject* param) {
  const PyGetSetDef* getset = types_.of(param).grad;
  PyObject* grad = getset != nullptr ? getset->get(param, getset->closure)
                                     : PyObject_GetAttr(param, keys().grad);
  if (grad == nullptr) throw py::error_already_set();
  return held_.emplace_back(py::reinterpret_steal<py::object>(grad)).ptr();
}

void Gather::hold() {
  const auto keep = [this](PyObject* object) {
    if (object != nullptr) held_.push_back(py::reinterpret_borrow<py::object>(object));
  };
  for (Member& m : members) {
    if (m.grad == nullptr) m.grad = grad_of(m.owner);
    for (PyObject* o : {m.param, m.grad, m.exp_avg, m.exp_avg_sq, m.max_exp_avg_sq, m.state}) {
      keep(o);
    }
  }
  for (const Skipped& s : skipped_) keep(s.state);
  for (const Cohort& c : cohorts_) keep(c.counter);
}

int Gather::cohort_of(PyObject* counter) {
  if (!cohorts_.empty() && cohorts_.back().counter == counter) {
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
  cohorts_.push_back({counter, t.data, is_double, step});
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
  for (const Member& member : members) {
    reader_.mark_written(member.param);
    if (member.owner != member.param) reader_.mark_written(member.owner);
  }
}

void Gather::count_step() {
  const Keys& k = keys();
  const auto set_counter = [&](PyObject* state, PyObject* counter) {
    if (PyDict_SetItem(state, k.step, counter) != 0) throw py::error_already_set();
  };
  // A param that was skipped leaves its cohort, with a counter that stays behind.
  std::unordered_map<PyObject*, py::object> left_behind;
  for (const Skipped& skipped : skipped_) {
    if (skipped.state == nullptr || !PyDict_Check(skipped.state)) continue;
    PyObject* counter = PyDict_GetItemWithError(skipped.state, k.step);
    if (counter == nullptr || cohort_index_.find(counter) == cohort_index_.end()) continue;
    py::object& copy = left_behind[counter];
    if (!copy) copy = py::reinterpret_borrow<py::object>(counter).attr("clone")();
    set_counter(skipped.state, copy.ptr());
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
    t.scalars_of_cohort.clear();
  }
  members.clear();
  cohorts_.clear();
  cohort_index_.clear();
  skipped_.clear();
  findings_.clear();
  held_.clear();
}

}  // namespace adamprox
