#include "gather.h"

#include <algorithm>

#include "layout.h"

namespace adamprox {
namespace {

constexpr size_t kAhead = 4;  // how many params later what is fetched is read

// Scalars that the host has made are recipes too, where there are any.
void complete_recipes(TensorTable& table) {
  if (table.recipes.empty()) return;
  table.recipes.resize(table.scalars.size());
  for (size_t i = 0; i < table.recipes.size(); ++i) table.recipes[i].given = table.scalars[i];
  table.recipes_head.count = static_cast<int64_t>(table.recipes.size());
}

}  // namespace

Gather::Gather(Decay decay) : decay_(decay) {}

std::vector<Finding> Gather::read(const py::list& groups, const py::dict& state,
                                  const py::dict& staged, Recipes recipes) {
  release();
  recipes_ = recipes;
  StateCursor states(state.ptr());
  sharded = false;
  int index = 0;
  for (const py::handle group : groups) {
    read_group(index++, group.ptr(), states, staged);
  }
  if (!states.all_taken()) find_skipped_states(states);
  only_on_cpu = true;
  for (DeviceTable& t : tables) {
    t.table.decay = decay_;
    t.table.lay_out_chunks();
    complete_recipes(t.table);
    only_on_cpu &= t.device.type == dlpack::kCPU || t.table.rows.empty();
  }
  return std::move(findings_);
}

void Gather::read_group(int index, PyObject* group, StateCursor& states, const py::dict& staged) {
  if (!PyDict_Check(group)) throw py::type_error("param_groups must be dicts");
  const auto place = static_cast<size_t>(index);
  if (place == group_readers_.size()) group_readers_.emplace_back();
  const GroupValues& values = group_readers_[place].read(group);
  if (place == 0 || !share_scalars(group_readers_[place - 1].values(), values)) ++run_;
  if (!PyList_Check(values.params)) {
    throw py::type_error("param_groups[...]['params'] must be a list");
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(values.params); ++i) {
    read_param(index, PyList_GET_ITEM(values.params, i), values, states, staged);
  }
}

void Gather::read_param(int group, PyObject* param, const GroupValues& values, StateCursor& states,
                        const py::dict& staged) {
  const Keys& k = keys();
  const bool amsgrad = values.amsgrad;
  Member member{};
  member.group = group;
  member.owner = param;
  const bool distributed = types_.of(param).distributed;
  PyObject* stand_ins = nullptr;
  if (PyDict_GET_SIZE(staged.ptr()) != 0) {
    stand_ins = PyDict_GetItemWithError(staged.ptr(), param);
    if (stand_ins == nullptr && PyErr_Occurred()) throw py::error_already_set();
  }
  const auto pick = [&](PyObject* key, PyObject* original) {
    PyObject* share = distributed ? local(original, param) : original;
    PyObject* stand_in = stand_ins ? PyDict_GetItemWithError(stand_ins, key) : nullptr;
    return stand_in != nullptr ? stand_in : share;
  };

  member.grad = pick(k.grad, nullptr);
  if (!has_grad(member)) {
    skipped_.push_back({group, param, states.next(param)});
    return;
  }
  bool twice = false;
  PyObject* state = states.find(param, twice);
  if (twice) return report(group, param, "twice");
  if (state == nullptr || !PyDict_Check(state) || PyDict_GET_SIZE(state) == 0) {
    return report(group, param, "state");
  }
  const size_t place = members.size();
  if (place == known_.size()) known_.emplace_back();
  if (place + kAhead < known_.size()) known_[place + kAhead].fetch();
  KnownParam& known = known_[place];
  const StateValues found = known.state_reader.read(state, amsgrad);
  member.state = state;
  member.param = pick(k.param, param);
  member.exp_avg = pick(k.exp_avg, found.exp_avg);
  member.exp_avg_sq = pick(k.exp_avg_sq, found.exp_avg_sq);
  member.max_exp_avg_sq = amsgrad ? pick(k.max_exp_avg_sq, found.max_exp_avg_sq) : nullptr;

  Data data{};
  const bool usable =
      recognise(known, member, amsgrad, data) || understand(known, member, amsgrad, data);
  if (!usable) return;
  member.cohort = found.step != nullptr ? cohort_of(found.step) : -1;
  if (const char* where = misplaced_count(known.device, member.cohort, values)) {
    return report(group, param, where);
  }
  append(known, member, values, data);
}

// Whether nothing but addresses has changed since a step that found it good.
bool Gather::recognise(KnownParam& known, const Member& member, bool amsgrad, Data& data) const {
  using K = KnownParam;
  const auto same = [&](PyObject* tensor, K::Which which) {
    return reader_.is_as_seen(tensor, known.tensors[which], data[which]);
  };
  return known.owner == member.owner && known.amsgrad == amsgrad && member.grad_handle != nullptr &&
         reader_.handle_is_as_seen(member.grad_handle, known.tensors[K::kGrad], data[K::kGrad]) &&
         same(member.param, K::kParam) && same(member.exp_avg, K::kExpAvg) &&
         same(member.exp_avg_sq, K::kExpAvgSq) &&
         (!amsgrad || same(member.max_exp_avg_sq, K::kMaxExpAvgSq));
}

// Reads the tensors of a param, reports what is wrong with them, and remembers what is not.
bool Gather::understand(KnownParam& known, Member& member, bool amsgrad, Data& data) {
  const Keys& k = keys();
  known.owner = nullptr;
  const size_t findings = findings_.size();
  const auto refuse = [&](const char* key) { report(member.group, member.owner, key); };
  dlpack::Tensor p;
  if (!read_tensor(member.param, p) || !is_dense(p)) {
    refuse("param");
    return false;
  }
  const int64_t count = numel(p);
  const bool complex = p.dtype.code == dlpack::kComplex;
  // Lazy conjugation and negation do not show in the memory. A negated view of reals is dense only
  // if it has one element (it comes from the imaginary part of a conjugate).
  const bool may_be_lazy = complex || count == 1;
  const auto is_lazy = [&](PyObject* tensor) {
    return (complex && answers_true(tensor, k.is_conj)) || answers_true(tensor, k.is_neg);
  };
  if (may_be_lazy && is_lazy(member.param)) {
    refuse("param");
    return false;
  }
  // Every other tensor of this row must lie as the param does, and be of the type expected.
  const auto accept = [&](bool readable, const dlpack::Tensor& t, PyObject* tensor, const char* key,
                          const dlpack::DataType& type) -> void* {
    if (readable && t.dtype == type && same_layout(t, p) && same_device(t.device, p.device) &&
        !(may_be_lazy && is_lazy(tensor))) {
      return t.data;
    }
    refuse(key);
    return nullptr;
  };
  dlpack::Tensor t;
  bool readable = member.grad != nullptr ? read_tensor(member.grad, t)
                                         : reader_.read_handle(member.grad_handle, t);
  if (may_be_lazy && member.grad == nullptr) member.grad = grad_of(member.owner);
  data[KnownParam::kGrad] = accept(readable, t, member.grad, "grad", p.dtype);

  readable = read_tensor(member.exp_avg, t);
  const bool wide = readable && p.dtype.bits == 16 && t.dtype == kFloat32;  // moments
  const dlpack::DataType& moment_type = wide ? kFloat32 : p.dtype;
  const auto read_moment = [&](PyObject* tensor, const char* key) {
    const bool readable = read_tensor(tensor, t);
    return accept(readable, t, tensor, key, moment_type);
  };
  data[KnownParam::kParam] = p.data;
  data[KnownParam::kExpAvg] = accept(readable, t, member.exp_avg, "exp_avg", moment_type);
  data[KnownParam::kExpAvgSq] = read_moment(member.exp_avg_sq, "exp_avg_sq");
  if (amsgrad) {
    data[KnownParam::kMaxExpAvgSq] = read_moment(member.max_exp_avg_sq, "max_exp_avg_sq");
  }
  if (findings_.size() != findings) return false;

  known.device = p.device;
  known.row.numel = count * (complex ? 2 : 1);
  known.row.param_dtype = real_dtype(p.dtype);
  known.row.state_dtype = wide ? DType::kFloat32 : known.row.param_dtype;
  if (reader_.recognises() && member.grad_handle != nullptr && p.ndim <= int{kMostSeenDims}) {
    known.owner = member.owner;
    known.amsgrad = amsgrad;
    known.state = member.state;
    known.state_keys = reinterpret_cast<PyDictObject*>(member.state)->ma_keys;
    const std::array<PyObject*, KnownParam::kTensors> objects{
        member.param, nullptr, member.exp_avg, member.exp_avg_sq, member.max_exp_avg_sq};
    for (int i = 0; i < known.size(); ++i) {
      known.objects[i] = objects[i];
      if (objects[i] != nullptr) reader_.see(objects[i], known.tensors[i]);
    }
    reader_.see_handle(member.grad_handle, known.tensors[KnownParam::kGrad]);
  }
  return true;
}

void Gather::append(const KnownParam& known, const Member& member, const GroupValues& values,
                    const Data& data) {
  DeviceTable& device = table_on(known.device);
  TensorTable& table = device.table;
  // Filled in where it lies: a copy would wait for the stores of its narrow fields.
  TensorRow& row = table.rows.emplace_back(known.row);
  row.param = data[KnownParam::kParam];
  row.exp_avg = data[KnownParam::kExpAvg];
  row.exp_avg_sq = data[KnownParam::kExpAvgSq];
  row.max_exp_avg_sq = data[KnownParam::kMaxExpAvgSq];
  row.scalars = scalars_of(device, member.cohort, values);
  row.aligned = std::all_of(data.begin(), data.end(), is_aligned);
  table.numel += row.numel;
  table.grads.push_back(data[KnownParam::kGrad]);
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
  return object != nullptr && types_.of(object).plain && reader_.read(object, out);
}

bool Gather::has_grad(Member& member) {
  if (member.grad == nullptr) {
    if (reader_.reads_grads() && types_.of(member.owner).plain) {
      member.grad_handle = reader_.grad(member.owner);
      return member.grad_handle != nullptr;
    }
    member.grad = local(grad_of(member.owner), member.owner);
  }
  return member.grad != Py_None;
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
  hold_counters();
}

void Gather::hold_counters() {
  for (const Cohort& c : cohorts_) held_.push_back(py::reinterpret_borrow<py::object>(c.counter));
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

void Gather::begin_step() {
  let_skipped_leave();
  for (const Member& member : members) {
    reader_.mark_written(member.param);
    if (member.owner != member.param) reader_.mark_written(member.owner);
  }
}

void Gather::release() {
  // The buffers stay, so that a step allocates nothing.
  for (DeviceTable& t : tables) {
    t.table.clear();
    t.members.clear();
    t.records = {};
  }
  members.clear();
  cohorts_.clear();
  cohort_index_.clear();
  skipped_.clear();
  findings_.clear();
  held_.clear();
}

}  // namespace adamprox
