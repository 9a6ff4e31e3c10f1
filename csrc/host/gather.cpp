#include "gather.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "../cpu/step.h"

namespace adamprox {

bool Gather::read(const py::list& groups, const py::dict& state, const py::dict& stand_ins,
                  bool recipes_on_gpu, bool recipes_on_cpu, bool loss_scaling, int cpu_threads) {
  release();
  recipes_on_gpu_ = recipes_on_gpu;
  recipes_on_cpu_ = recipes_on_cpu;
  loss_scaling_ = loss_scaling;
  collect_groups(groups);
  collect(state, stand_ins);
  for (Member& m : members) settle(m);
  resolve();
  if (read_tensors()) resolve();
  for (const auto& t : tables) {
    for (const int row : t->uncountable()) {
      report(members[t->members[row]], t->recipes ? "step on device" : "step");
    }
  }
  if (!findings.empty()) return false;
  bool at_once = cpu_threads > 0;
  for (const auto& t : tables) {
    for (const int row : t->arrange()) report(members[t->members[row]], "overlap");
    at_once &= t->members.empty() || !(t->device.gpu || t->deferred);
  }
  returned_ = !at_once || !abi_.fast();  // in the slow way, Python code tells autograd of the step
  if (!at_once || !findings.empty()) return false;
  for (const auto& t : tables) {
    if (!t->members.empty()) step_on_cpu(*t, cpu_threads);
  }
  return true;
}

void Gather::collect_groups(const py::list& groups) {
  constexpr Py_ssize_t kAhead = 8;
  size_t count = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    const Py_ssize_t last = PyList_GET_SIZE(groups.ptr()) - 1;
    __builtin_prefetch(PyList_GET_ITEM(groups.ptr(), std::min(g + 2 * kAhead, last)));
    prefetch_entries(PyList_GET_ITEM(groups.ptr(), std::min(g + kAhead, last)));
    PyObject* group = hold(PyList_GET_ITEM(groups.ptr(), g));
    if (groups_.size() == count) groups_.emplace_back();
    group_reader_.hold(group, groups_[count++]);
  }
  groups_.resize(count);
  for (GroupValues& values : groups_) {
    group_reader_.interpret(values);
    __builtin_prefetch(PySequence_Fast_ITEMS(values.held[kParamsAt].ptr()));
  }
}

void Gather::collect(const py::dict& state, const py::dict& stand_ins) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* params = groups_[g].held[kParamsAt].ptr();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
      PyObject* param = PySequence_Fast_GET_ITEM(params, i);
      __builtin_prefetch(param);
      members.push_back({param, nullptr, static_cast<int>(g), static_cast<int>(i)});
    }
  }
  for (const Member& m : members) hold(m.owner);
  for (int stage = 0; stage < 3 && abi_.fast(); ++stage) {
    for (const Member& m : members) {
      if (abi_.has_own_grad(m.owner)) abi_.prefetch_param(m.owner, stage);
    }
  }
  const auto stand_ins_of = [&](PyObject* param) -> PyObject* {
    if (PyDict_GET_SIZE(stand_ins.ptr()) == 0) return nullptr;
    return item(stand_ins.ptr(),
                py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(param)).ptr());
  };
  size_t kept = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    if (find_grad(members[i], stand_ins_of(members[i].owner))) members[kept++] = members[i];
  }
  members.resize(kept);
  StateCursor states(state.ptr());
  for (Member& m : members) {
    m.state = states.find(m.owner);
    __builtin_prefetch(m.state);
  }
  for (Member& m : members) {
    if (m.state != nullptr) prefetch_entries(hold(m.state));
  }
  for (Member& m : members) find_state(m, stand_ins_of(m.owner));
}

// False: it has none.
bool Gather::find_grad(Member& m, PyObject* stand_ins) {
  static PyObject* const name = interned("grad");
  if (PyObject* grad = item(stand_ins, name)) {
    m.grad.object = hold(grad);
  } else {
    bool ask = !abi_.fast() || !abi_.has_own_grad(m.owner);
    void* handle = ask ? nullptr : abi_.grad_of(m.owner, ask);
    if (ask) m.grad.object = hold(py::handle(m.owner).attr(name).ptr());
    if (handle != nullptr && !ask) m.grad.owned = own(handle);
    if (m.grad.owned != nullptr) TorchAbi::prefetch_storage(handle);
  }
  return m.grad.exists() && m.grad.object != Py_None;
}

void Gather::find_state(Member& m, PyObject* stand_ins) {
  static PyObject* const param_name = interned("param");
  PyObject* state = m.state;
  if (state != nullptr && !PyDict_Check(state)) {
    state = hold(py::dict(py::reinterpret_borrow<py::object>(state)).ptr());
  }
  state_keys_.read(state, found_);
  const auto pick = [&](TensorRef& tensor, PyObject* key, PyObject* own) {
    PyObject* stand_in = item(stand_ins, key);
    PyObject* object = stand_in != nullptr ? stand_in : own;
    if (object == nullptr) return;
    tensor.object = hold(object);
    if (abi_.fast() && abi_.has_own_grad(object)) TorchAbi::prefetch(tensor.handle());
  };
  pick(m.param, param_name, m.owner);
  pick(m.step, state_keys_.name(0), found_[0]);
  bool any = m.step.exists();
  for (int s = 0; s < kStates; ++s) {
    if (has(m, s)) pick(m.states[s], state_keys_.name(1 + s), found_[1 + s]);
    any |= m.states[s].exists();
  }
  if (!any) report(m, "state");
}

void Gather::settle(Member& m) {
  if (!m.usable) return;
  if (!settle(m, m.param)) report(m, "param");
  if (!settle(m, m.grad)) report(m, "grad");
  if (!settle(m, m.step)) report(m, "step");
  for (int s = 0; s < kStates; ++s) {
    if (has(m, s) && !settle(m, m.states[s])) report(m, kStateKeys[s].key);
  }
}

bool Gather::is_known(const TensorRef& tensor) const {
  return abi_.fast() && (tensor.owned != nullptr || abi_.is_tensor(tensor.object)) &&
         abi_.is_ordinary(tensor.handle());
}

bool Gather::is_ordinary(TensorRef& tensor) {
  if (!is_known(tensor) && !abi_.ask_ordinary(tensor.object)) return false;
  if (!abi_.fast()) tensor.owned = own(tensor.object);
  return true;
}

// Whether it is an ordinary tensor, or a DTensor that is placed as the param is: then its local one.
bool Gather::settle(Member& m, TensorRef& tensor) {
  if (!tensor.exists()) return false;
  if (is_known(tensor)) {
    TorchAbi::prefetch_storage(tensor.handle());
    return true;
  }
  if (tensor.object == nullptr) tensor = {hold(py::handle(m.owner).attr("grad").ptr()), nullptr};
  const py::object local =
      abi_.python.attr("local")(py::handle(m.owner), py::handle(tensor.object));
  if (local.is_none()) return false;
  tensor.object = hold(local[py::int_(0)].ptr());
  if (const py::object cut = local[py::int_(1)]; !cut.is_none()) {
    m.sharded = true;
    m.cut = cut.cast<int64_t>();
  }
  return is_ordinary(tensor);
}

bool Gather::is_deferred(const Member& m) const {
  const GroupValues& v = groups_[m.group];
  if (!has_blocks(v.rule)) return false;
  const double rows = v.h.number[kBlock];
  if (rows == kGroupBlock) return v.divided;
  return m.sharded && !(rows > 0 && m.cut >= 0 && std::fmod(static_cast<double>(m.cut), rows) == 0);
}

void Gather::find_divided() {
  for (GroupValues& v : groups_) v.divided = false;
  TensorView first, t;
  const Member* before = nullptr;
  for (const Member& m : members) {
    GroupValues& v = groups_[m.group];
    if (!m.usable || !has_blocks(v.rule) || v.h.number[kBlock] != kGroupBlock) continue;
    if (!abi_.read(m.param.handle(), t)) continue;
    if (before == nullptr || before->group != m.group) first = t;
    v.divided |= m.sharded || !(t.device == first.device);
    before = &m;
  }
}

void Gather::resolve() {
  for (auto& t : tables) t->clear();
  find_divided();
  for (size_t i = 0; i < members.size(); ++i) {
    Member& m = members[i];
    Entry entry;
    Device device;
    if (!m.usable || !resolve(m, entry, device)) continue;
    HeldTable& t = table_on(device);
    const GroupValues& v = groups_[m.group];
    RowValues values{v.h, entry.row.rule, m.group, v.has_tensors};
    // Without decay: a soft threshold of zero leaves z as it is, to the bit.
    if (is_deferred(m)) {
      double* number = values.h.number;
      number[kWeightDecay] = number[kL2] = 0;
      number[kLow] = -INFINITY;
      number[kHigh] = INFINITY;
    }
    t.add(entry, static_cast<int>(i), values);
    t.deferred |= is_deferred(m);
    t.recipes |= (device.gpu ? recipes_on_gpu_ : recipes_on_cpu_) &&
                 (loss_scaling_ || v.h.flag[kCapturable] || entry.count.device.gpu);
  }
}

// Reads the addresses of a member's tensors, or reports what is wrong with them.
bool Gather::resolve(Member& m, Entry& entry, Device& device) {
  TensorRow& row = entry.row;
  TensorView p{}, t{};
  if (!abi_.read(m.param.handle(), p) || !p.is_dense()) {
    report(m, "param");
    return false;
  }
  row.aligned = reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
  // Every other tensor must lie as the param does, and be of the type expected.
  const auto accept = [&](const TensorRef& tensor, const char* key, DType type, DType or_type,
                          void*& data) {
    if (!abi_.read(tensor.handle(), t) || (t.dtype != type && t.dtype != or_type) ||
        !t.lies_as(p)) {
      return report(m, key);
    }
    row.aligned &= reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    __builtin_prefetch(t.data);
    data = t.data;
  };
  row.param = p.data;
  __builtin_prefetch(p.data);
  accept(m.grad, "grad", p.dtype, p.dtype, entry.grad);
  const DType wide = compute_type(p.dtype);
  row.state_dtype = p.dtype;
  for (int s = 0; s < kStates; ++s) {
    if (!has(m, s)) continue;
    const DType type = kStateKeys[s].type == kCompute ? wide : row.state_dtype;
    // The first one says what the moments are.
    accept(m.states[s], kStateKeys[s].key, type, s == kExpAvg ? wide : type, row.states[s]);
    if (s == kExpAvg) row.state_dtype = t.dtype;
    // It follows from the final param, which this step does not know.
    if (kStateKeys[s].type == kCompute && is_deferred(m)) row.states[s] = nullptr;
  }
  device = p.device;
  row.numel = p.numel() << p.complex;
  row.param_dtype = p.dtype;
  row.rule = is_deferred(m) ? Decay::kProxL1 : groups_[m.group].rule;
  const double* number = groups_[m.group].h.number;
  row.block = row.numel;
  if (has_blocks(row.rule) && number[kBlock] == kGroupBlock) entry.norm = m.group;
  const bool has_rows = row.numel > 0 && p.dim > 0 && 0 < number[kBlock];
  if (has_blocks(row.rule) && has_rows && number[kBlock] < p.sizes[0]) {
    // Rows that are no ranges of memory are copied to where they are.
    if (p.strides[0] * p.sizes[0] != p.numel()) report(m, "block");
    row.block = static_cast<int64_t>(number[kBlock]) * (row.numel / p.sizes[0]);
  }
  const double low = round_up(number[kLow], p.dtype), high = -round_up(-number[kHigh], p.dtype);
  const bool empty = low > high || low == INFINITY || high == -INFINITY;
  if (has_bounds(groups_[m.group].rule) && empty) report(m, "bounds");
  if (abi_.read(m.step.handle(), t) && t.numel() == 1 && !t.complex && size_of(t.dtype) >= 4) {
    entry.count = {t.data, t.dtype == DType::kFloat64, t.device};
  }
  return m.usable;
}

// Reads the numbers that are tensors, if the host makes the scalars. Returns whether Python code may have run.
bool Gather::read_tensors() {
  bool any = false;
  for (const auto& t : tables) {
    for (size_t i = 0; i < t->members.size() && !t->recipes; ++i) {
      GroupValues& v = groups_[members[t->members[i]].group];
      if (!v.has_tensors || v.on_host) continue;
      any = v.on_host = true;
      for (int n = 0; n < kNumbers; ++n) {
        if (v.tensors[n]) v.h.number[n] = GroupReader::number(kNumberKeys[n].key, v.tensors[n]);
      }
    }
  }
  return any;
}

void Gather::make_recipes(HeldTable& t) {
  for (const RowValues& values : t.values) {
    const GroupValues& v = groups_[values.group];
    GroupRecipe recipe{};
    for (int n = 0; n < kNumbers; ++n) {
      // Where the decay is deferred, its own numbers are neutral: see resolve().
      const bool of_decay = n == kWeightDecay || n == kL2 || n == kLow || n == kHigh;
      const bool own = !of_decay || values.rule == v.rule;
      recipe.number[n] = value_of(t.device, kNumberKeys[n].key, own ? v.tensors[n].ptr() : nullptr,
                                  values.h.number[n]);
    }
    for (int f = 0; f < kFlags; ++f) recipe.flag[f] = values.h.flag[f];
    recipe.rule = values.rule;
    t.table.group_recipes.push_back(recipe);
  }
}

Value Gather::value_of(const Device& device, const char* key, PyObject* object, double value) {
  if (object == nullptr || !abi_.is_tensor(object)) return {value, nullptr, 0};
  TensorRef tensor{hold(object)};
  TensorView t;
  if (is_ordinary(tensor) && abi_.read(tensor.handle(), t) && t.numel() == 1 && !t.complex &&
      t.device == device) {
    return {0, t.data, static_cast<int64_t>(t.dtype)};
  }
  return {GroupReader::number(key, py::reinterpret_borrow<py::object>(object)), nullptr, 0};
}

// Python code has run since the addresses were read: they must be the same, or nothing is updated.
void Gather::refresh(HeldTable& t) {
  for (size_t i = 0; i < t.members.size(); ++i) {
    Member& m = members[t.members[i]];
    Entry entry;
    Device device;
    if (resolve(m, entry, device) && t.is_same(i, entry)) continue;
    throw std::runtime_error("a tensor of param_groups[" + std::to_string(m.group) +
                             "]['params'][" + std::to_string(m.index) +
                             "] was changed amid the step; nothing was updated");
  }
}

void Gather::begin(HeldTable& t) {
  if (t.recipes) make_recipes(t);
  for (const int member : t.members) {
    const Member& m = members[member];
    abi_.mark_written(m.param.object);
    if (m.owner != m.param.object) abi_.mark_written(m.owner);
  }
  if (returned_) refresh(t);
  t.begin();
}

void Gather::step_on_cpu(HeldTable& t, int threads) {
  begin(t);
  std::optional<py::gil_scoped_release> release;
  // A step of fewer elements is over before another thread runs.
  constexpr int64_t kBrief = 1 << 15;
  if (t.table.numel > kBrief) release.emplace();
  const auto start = std::chrono::steady_clock::now();
  adamprox::step_on_cpu(t.table, threads);
  const auto end = std::chrono::steady_clock::now();
  update_seconds = std::chrono::duration<double>(end - start).count();
  t.launched = true;
}

py::list Gather::groups() const {
  py::list result;
  for (const GroupValues& values : groups_) result.append(py::handle(values.group));
  return result;
}

HeldTable& Gather::table_on(const Device& device) {
  for (auto& t : tables) {
    if (t->device == device) return *t;
  }
  return *tables.emplace_back(std::make_unique<HeldTable>(device, *this));
}

void Gather::report(Member& m, const char* key) {
  m.usable = false;
  findings.push_back({m.group, m.index, py::reinterpret_borrow<py::object>(m.owner), key});
}

void Gather::release() {
  // Buffers stay, so that a step allocates nothing. What is let go of may run Python code.
  for (auto& t : tables) {
    t->clear();
    t->records = py::none();
  }
  members.clear();
  findings.clear();
  for (GroupValues& v : groups_) v.release();
  for (PyObject* object : held_) Py_DECREF(object);
  held_.clear();
  while (used_slots_ > 0) abi_.drop(slots_[--used_slots_]);
}

}  // namespace adamprox
