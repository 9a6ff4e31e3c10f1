#include "gather.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "../cpu/step.h"

namespace adamprox {
namespace {

// Steps of fewer elements keep the GIL: they are over before another thread would get it.
constexpr int64_t kBriefNumel = 1 << 15;

PyObject* item(PyObject* dict, PyObject* key) {  // borrowed, or null
  PyObject* value = dict != nullptr ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

bool Gather::read(const py::list& groups, const py::dict& state, const py::dict& stand_ins,
                  const Request& request) {
  release();
  request_ = request;
  collect(groups, state, stand_ins);
  for (Member& m : members) settle(m);
  resolve();
  bool ran_python = false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (!groups_[g].has_objects) continue;
    ran_python = true;
    find_numbers(groups_[g], std::any_of(members.begin(), members.end(), [&](const Member& m) {
                   return m.group == static_cast<int>(g) && m.usable && !m.on_device;
                 }));
  }
  if (ran_python) resolve();
  place_counts();
  if (!findings_.empty()) return false;
  number_values();
  bool at_once = request.cpu_threads > 0;
  for (const auto& t : tables_) {
    for (const int row : t->arrange()) report(members[t->members[row]], "overlap");
    at_once &= !t->device.gpu || t->members.empty();
  }
  for (const Member& m : members) at_once &= !is_deferred(m);
  returned_ = !at_once || !abi_.fast();  // in the slow way, Python code tells autograd of the step
  if (!at_once || !findings_.empty()) return false;
  for (HeldTable* t : tables()) step_on_cpu(*t, request.cpu_threads);
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
    GroupValues& values = groups_[count++];
    values.group = group;
    group_reader_.read(group, values);
    for (int f = 0; f < kFlags; ++f) {
      if (values.flag_objects[f]) values.h.flag[f] = as_bool(values.flag_objects[f].ptr());
    }
    PyObject* params = values.params.ptr();
    if (!PyList_Check(params) && !PyTuple_Check(params)) {
      throw py::type_error("param_groups[" + std::to_string(g) + "]['params'] must be a list");
    }
    __builtin_prefetch(PySequence_Fast_ITEMS(params));
  }
  groups_.resize(count);
}

void Gather::collect(const py::list& groups, const py::dict& state, const py::dict& stand_ins) {
  collect_groups(groups);
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* params = groups_[g].params.ptr();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
      PyObject* param = PySequence_Fast_GET_ITEM(params, i);
      __builtin_prefetch(param);
      members.push_back({param, nullptr, static_cast<int>(g), static_cast<int>(i)});
    }
  }
  for (const Member& m : members) hold(m.owner);
  const auto for_each_usual = [&](auto f) {
    for (const Member& m : members) {
      if (abi_.fast() && abi_.has_own_grad(m.owner)) f(m.owner);
    }
  };
  for_each_usual([](PyObject* param) { TorchAbi::prefetch(TorchAbi::handle_of(param)); });
  for_each_usual([this](PyObject* param) { abi_.prefetch_autograd(param); });
  for_each_usual([this](PyObject* param) { abi_.prefetch_grad(param); });
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
  bool ask = true;
  if (PyObject* grad = item(stand_ins, name)) {
    m.grad.object = hold(grad);
    return grad != Py_None;
  }
  if (abi_.fast() && abi_.has_own_grad(m.owner)) {
    ask = false;
    void* grad_handle = abi_.grad_of(m.owner, ask);
    if (grad_handle == nullptr) return false;
    if (!ask) {
      m.grad.owned = own(grad_handle);
      TorchAbi::prefetch_storage(grad_handle);
    }
  }
  if (ask) m.grad.object = hold(attribute(m.owner, name).ptr());
  return m.grad.object != Py_None;
}

void Gather::find_state(Member& m, PyObject* stand_ins) {
  static PyObject* const param_name = interned("param");
  if (m.state == nullptr) {
    values_.assign(1 + kStates, nullptr);
  } else if (PyDict_Check(m.state)) {
    state_order_.read(m.state, values_);
  } else {  // another mapping
    std::vector<PyObject*> found(1 + kStates, nullptr);
    for (size_t i = 0; i < found.size(); ++i) {
      PyObject* value = PyObject_GetItem(m.state, state_order_.name(i));
      if (value == nullptr && !PyErr_ExceptionMatches(PyExc_KeyError))
        throw py::error_already_set();
      PyErr_Clear();
      if (value != nullptr) found[i] = hold(py::reinterpret_steal<py::object>(value).ptr());
    }
    values_ = found;
  }
  const auto pick = [&](TensorRef& tensor, PyObject* key, PyObject* own) {
    PyObject* stand_in = item(stand_ins, key);
    PyObject* object = stand_in != nullptr ? stand_in : own;
    if (object == nullptr) return;
    tensor.object = hold(object);
    if (abi_.fast() && abi_.has_own_grad(object)) TorchAbi::prefetch(tensor.handle());
  };
  pick(m.param, param_name, m.owner);
  pick(m.step, state_order_.name(0), values_[0]);
  bool any = m.step.exists();
  for (int s = 0; s < kStates; ++s) {
    if (!groups_[m.group].has(kStateKeys[s].flag)) continue;
    pick(m.states[s], state_order_.name(1 + s), values_[1 + s]);
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
    if (groups_[m.group].has(kStateKeys[s].flag) && !settle(m, m.states[s])) {
      report(m, kStateKeys[s].key);
    }
  }
}

// Whether it is an ordinary tensor, or a DTensor that is placed as the param is: then its local one.
bool Gather::settle(Member& m, TensorRef& tensor) {
  const auto is_ordinary = [&] {
    return abi_.fast() && (tensor.owned != nullptr || abi_.is_tensor(tensor.object)) &&
           abi_.is_ordinary(tensor.handle());
  };
  if (!tensor.exists()) return false;
  if (is_ordinary()) {
    TorchAbi::prefetch_storage(tensor.handle());
    return true;
  }
  if (tensor.object == nullptr) {  // the grad: Python code is to look at it
    tensor = {hold(py::handle(m.owner).attr("grad").ptr()), nullptr};
  }
  if (placements_.is_distributed(tensor.object)) {
    const bool is_param = tensor.object == m.owner;
    const auto kind = is_param ? placements_.kind_of(m.owner) : Placements::Kind::kReplicate;
    m.sharded |= kind == Placements::Kind::kShard;
    if (kind == Placements::Kind::kOther || !placements_.is_distributed(m.owner) ||
        !(is_param || Placements::alike(tensor.object, m.owner))) {
      return false;
    }
    tensor.object = hold(Placements::local_of(tensor.object).ptr());
  }
  if (!abi_.is_tensor(tensor.object)) return false;
  if (!is_ordinary() && !abi_.ask_ordinary(tensor.object)) return false;
  if (!abi_.fast()) tensor.owned = own(tensor.object);
  return true;
}

void Gather::resolve() {
  for (auto& t : tables_) t->clear();
  for (size_t i = 0; i < members.size(); ++i) {
    Member& m = members[i];
    TensorRow row{};
    void* grad = nullptr;
    Device device{};
    if (!m.usable || !resolve(m, row, grad, device)) continue;
    HeldTable& t = table_on(device);
    const StepCount count = read_count(m);
    t.add(row, grad, static_cast<int>(i), count);
    t.recipes |=
        (device.gpu ? request_.recipes_on_gpu : request_.recipes_on_cpu) &&
        (request_.loss_scaling || groups_[m.group].h.flag[kCapturable] || count.device.gpu);
  }
  for (const auto& t : tables_) {
    for (const int member : t->members) members[member].on_device = t->recipes;
  }
}

// Reads the addresses of a member's tensors, or reports what is wrong with them.
bool Gather::resolve(Member& m, TensorRow& row, void*& grad, Device& device) {
  TensorView p, t;
  if (!abi_.read(m.param.handle(), p) || !p.is_dense()) {
    report(m, "param");
    return false;
  }
  bool aligned = reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
  // Every other tensor must lie as the param does, and be of the type expected.
  const auto accept = [&](const TensorRef& tensor, const char* key, DType type, DType or_type,
                          void*& data) {
    if (!abi_.read(tensor.handle(), t) || (t.dtype != type && t.dtype != or_type) ||
        !t.lies_as(p)) {
      return report(m, key);
    }
    aligned &= reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    __builtin_prefetch(t.data);
    data = t.data;
  };
  row.param = p.data;
  __builtin_prefetch(p.data);
  accept(m.grad, "grad", p.dtype, p.dtype, grad);
  const DType wide = compute_type(p.dtype);
  row.state_dtype = p.dtype;
  for (int s = 0; s < kStates; ++s) {
    if (!groups_[m.group].has(kStateKeys[s].flag)) continue;
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
  row.aligned = aligned;
  return m.usable;
}

StepCount Gather::read_count(const Member& m) {
  TensorView t;
  if (!abi_.read(m.step.handle(), t) || t.numel() != 1 || t.complex || t.real_size() < 4) return {};
  return {t.data, t.dtype == DType::kFloat64, t.device};
}

void Gather::place_counts() {
  for (auto& t : tables_) {
    for (size_t i = 0; i < t->members.size(); ++i) {
      const StepCount& count = t->counts[i];
      const bool there = count.at != nullptr && count.device == (t->recipes ? t->device : Device{});
      if (!there || (!t->recipes && !(count.read() >= 0 && std::isfinite(count.read())))) {
        report(members[t->members[i]], t->recipes ? "step on device" : "step");
      }
    }
  }
}

// Numbers that are objects, as doubles; those that a device reads are asked for only if the host needs
// them, too.
void Gather::find_numbers(GroupValues& v, bool on_host) {
  if (v.pair) {
    const auto pair = py::reinterpret_steal<py::object>(
        PySequence_Fast(v.pair.ptr(), "Invalid betas: expected two numbers"));
    if (!pair) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(pair.ptr()) != 2) {
      throw py::type_error("Invalid betas: " + std::string(py::repr(v.pair)) +
                           ", expected two numbers");
    }
    for (int n = 0; n < kNumbers; ++n) {
      if (kNumberKeys[n].item < 0) continue;
      PyObject* number = PySequence_Fast_GET_ITEM(pair.ptr(), kNumberKeys[n].item);
      v.objects[n] = py::reinterpret_borrow<py::object>(number);
    }
  }
  for (int n = 0; n < kNumbers; ++n) {
    if (!v.objects[n]) continue;
    const bool tensor = abi_.is_tensor(v.objects[n].ptr());
    v.has_tensors |= tensor;
    if (on_host || !tensor) v.h.number[n] = as_double(v.objects[n].ptr());
  }
}

// Groups that follow one another and are alike have the same values; params whose decay is deferred have
// none of it: a soft threshold of zero leaves z as it is, to the bit.
void Gather::number_values() {
  values_of_.resize(members.size());
  size_t count = 0;
  const Member* before = nullptr;
  for (size_t i = 0; i < members.size(); ++i) {
    const Member& m = members[i];
    const GroupValues& v = groups_[m.group];
    const bool same = before != nullptr && is_deferred(m) == is_deferred(*before) &&
                      (m.group == before->group || alike(v, groups_[before->group]));
    if (!same) {
      if (row_values_.size() == count) row_values_.emplace_back();
      RowValues& values = row_values_[count++];
      values.h = v.h;
      values.group = m.group;
      values.rule = is_deferred(m) ? Decay::kProxL1 : v.rule;
      if (is_deferred(m)) values.h.number[kWeightDecay] = 0;
    }
    values_of_[i] = static_cast<int>(count - 1);
    before = &m;
  }
  row_values_.resize(count);
}

void Gather::make_recipes(const Device& device) {
  for (RowValues& values : row_values_) {
    const GroupValues& v = groups_[values.group];
    GroupRecipe& recipe = values.recipe;
    const bool deferred = values.rule != v.rule;
    for (int n = 0; n < kNumbers; ++n) {
      recipe.number[n] = value_of(device, v.objects[n].ptr(), values.h.number[n]);
    }
    if (deferred) recipe.number[kWeightDecay] = {0, nullptr, 0};
    for (int f = 0; f < kFlags; ++f) recipe.flag[f] = values.h.flag[f];
    recipe.rule = values.rule;
  }
}

Value Gather::value_of(const Device& device, PyObject* object, double value) {
  if (object == nullptr || !abi_.is_tensor(object)) return {value, nullptr, 0};
  TensorRef tensor{object, abi_.fast() ? nullptr : own(object)};
  TensorView t;
  const bool ordinary =
      (abi_.fast() && abi_.is_ordinary(tensor.handle())) || abi_.ask_ordinary(object);
  if (!ordinary || !abi_.read(tensor.handle(), t) || t.numel() != 1 || t.complex ||
      !(t.device == device)) {
    return {as_double(object), nullptr, 0};
  }
  hold(object);
  return {0, t.data, static_cast<int64_t>(t.dtype)};
}

// Python code has run since the addresses were read: they must be the same, or nothing is updated.
void Gather::refresh(HeldTable& t) {
  for (size_t i = 0; i < t.members.size(); ++i) {
    Member& m = members[t.members[i]];
    TensorRow row{};
    void* grad = nullptr;
    Device device;
    if (!resolve(m, row, grad, device) || !t.is_same(i, row, grad, read_count(m))) {
      throw std::runtime_error("param_groups[" + std::to_string(m.group) + "]['params'][" +
                               std::to_string(m.index) +
                               "] or its state was changed while its step "
                               "was being prepared; nothing was updated");
    }
  }
}

void Gather::begin(HeldTable& t) {
  for (const int member : t.members) {
    const Member& m = members[member];
    abi_.mark_written(m.param.object);
    if (m.owner != m.param.object) abi_.mark_written(m.owner);
  }
  if (t.recipes) make_recipes(t.device);
  if (returned_) refresh(t);
  t.begin(row_values_, values_of_);
}

void Gather::step_on_cpu(HeldTable& t, int threads) {
  begin(t);
  std::optional<py::gil_scoped_release> release;
  if (t.table.numel > kBriefNumel) release.emplace();
  const auto start = std::chrono::steady_clock::now();
  try {
    adamprox::step_on_cpu(t.table, threads);
  } catch (...) {  // no memory; nothing has been written yet
    t.undo();
    throw;
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  update_seconds = elapsed.count();
  t.launched = true;
}

std::vector<HeldTable*> Gather::tables() {
  std::vector<HeldTable*> result;
  for (auto& t : tables_) {
    if (!t->members.empty()) result.push_back(t.get());
  }
  return result;
}

py::list Gather::groups() const {
  py::list result;
  for (const GroupValues& values : groups_) result.append(py::handle(values.group));
  return result;
}

HeldTable& Gather::table_on(const Device& device) {
  for (auto& t : tables_) {
    if (t->device == device) return *t;
  }
  return *tables_.emplace_back(std::make_unique<HeldTable>(device));
}

void Gather::report(Member& m, const char* key) {
  m.usable = false;
  findings_.push_back({m.group, m.index, py::reinterpret_borrow<py::object>(m.owner), key});
}

void Gather::release() {
  // Buffers stay, so that a step allocates nothing. What is let go of may run Python code.
  for (auto& t : tables_) {
    t->clear();
    const py::object records = std::move(t->records);
  }
  members.clear();
  std::vector<PyObject*> objects;
  objects.swap(held_);
  const std::vector<Finding> findings = std::move(findings_);
  findings_.clear();
  for (GroupValues& v : groups_) v.forget();
  for (PyObject* object : objects) Py_DECREF(object);
  while (used_slots_ > 0) abi_.drop(slots_[--used_slots_]);
  objects.clear();
  if (held_.empty()) held_.swap(objects);
}

}  // namespace adamprox
