#include "gather.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "../cpu/step.h"

namespace adamprox {
namespace {

// Steps of fewer elements keep the GIL: they are over before another thread would get it.
constexpr int64_t kBriefNumel = 1 << 15;

struct Names {
  PyObject *grad = interned("grad"), *param = interned("param"), *step = interned("step"),
           *state[kStates];
  Names() {
    for (int s = 0; s < kStates; ++s) state[s] = interned(kStateKeys[s].key);
  }
};

const Names& names() {
  static const Names instance;
  return instance;
}

PyObject* item(PyObject* dict, PyObject* key) {  // borrowed, or null
  PyObject* value = dict != nullptr ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.dim != b.dim) return false;
  for (int i = 0; i < a.dim; ++i) {
    if (a.sizes[i] != b.sizes[i]) return false;
    if (a.sizes[i] != 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

// Whether the elements fill one piece of memory without gaps or overlaps, in any order of dims.
bool is_dense(const TensorView& t) {
  int64_t expected = 1;
  int dim = t.dim;
  while (dim > 0 && (t.sizes[dim - 1] == 1 || t.strides[dim - 1] == expected)) {
    expected *= t.sizes[--dim];
  }
  if (dim == 0) return true;  // row-major
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int i = 0; i < t.dim; ++i) {
    if (t.sizes[i] == 0) return true;
    if (t.sizes[i] != 1) dims.emplace_back(t.strides[i], t.sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

DType compute_type(DType type) {
  return type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Of the memory that a row writes, all but its count.
bool same_memory(const TensorRow& a, const TensorRow& b) {
  return a.param == b.param && std::memcmp(a.states, b.states, sizeof(a.states)) == 0 &&
         a.numel == b.numel && a.param_dtype == b.param_dtype && a.state_dtype == b.state_dtype &&
         a.rule == b.rule;
}

void append_written(const TensorRow& row, int index, std::vector<Interval>& out) {
  out.emplace_back(row.param, row.numel * size_of(row.param_dtype), index, true);
  for (int s = 0; s < kStates; ++s) {
    if (row.states[s] == nullptr) continue;
    const DType type =
        kStateKeys[s].type == kMoment ? row.state_dtype : compute_type(row.param_dtype);
    out.emplace_back(row.states[s], row.numel * size_of(type), index, true);
  }
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
    const bool on_host = std::any_of(members.begin(), members.end(), [&](const Member& m) {
      return m.group == static_cast<int>(g) && m.usable && !m.on_device;
    });
    find_numbers(groups_[g], on_host);
  }
  if (ran_python) resolve();
  runs_.resize(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    const bool same = g > 0 && alike(groups_[g - 1], groups_[g]);
    runs_[g] = same ? runs_[g - 1] : static_cast<int>(g);
  }
  place_counts();
  if (!findings_.empty()) return false;
  for (size_t t = 0, count = tables_.size(); t < count; ++t) find_overlaps(t);
  returned_ = true;
  if (!findings_.empty() || request.cpu_threads == 0) return false;
  const std::vector<DeviceTable*> all = tables();
  for (const DeviceTable* t : all) {
    if (t->device.gpu) return false;
  }
  if (std::any_of(members.begin(), members.end(),
                  [this](const Member& m) { return is_deferred(m); })) {
    return false;
  }
  returned_ = !abi_.fast();  // then Python code tells autograd
  for (DeviceTable* t : all) step_on_cpu(*t, request.cpu_threads);
  return true;
}

void Gather::collect(const py::list& groups, const py::dict& state, const py::dict& stand_ins) {
  constexpr Py_ssize_t kAhead = 8;
  size_t count = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    const Py_ssize_t last = PyList_GET_SIZE(groups.ptr()) - 1;
    __builtin_prefetch(PyList_GET_ITEM(groups.ptr(), std::min(g + 2 * kAhead, last)));
    prefetch_entries(PyList_GET_ITEM(groups.ptr(), std::min(g + kAhead, last)));
    PyObject* group = hold(PyList_GET_ITEM(groups.ptr(), g));
    if (groups_.size() == count) groups_.emplace_back();
    GroupValues& values = groups_[count++];
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
  for (size_t g = 0; g < count; ++g) {
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
    const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(param));
    return item(stand_ins.ptr(), id.ptr());
  };
  size_t kept = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    Member& m = members[i];
    if (find_grad(m, stand_ins_of(m.owner))) members[kept++] = m;
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
  bool ask = true;
  if (PyObject* grad = item(stand_ins, names().grad)) {
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
  if (ask) m.grad.object = hold(attribute(m.owner, names().grad).ptr());
  return m.grad.object != Py_None;
}

void Gather::find_state(Member& m, PyObject* stand_ins) {
  const auto pick = [&](TensorRef& tensor, PyObject* key, PyObject* own) {
    PyObject* stand_in = item(stand_ins, key);
    PyObject* object = stand_in != nullptr ? stand_in : own;
    if (object == nullptr) return;
    tensor.object = hold(object);
    if (abi_.fast() && abi_.has_own_grad(object)) TorchAbi::prefetch(tensor.handle());
  };
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
  pick(m.param, names().param, m.owner);
  pick(m.step, names().step, values_[0]);
  bool any = m.step.exists();
  for (int s = 0; s < kStates; ++s) {
    if (!groups_[m.group].has(kStateKeys[s].flag)) continue;
    pick(m.states[s], names().state[s], values_[1 + s]);
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
    tensor.object = hold(attribute(m.owner, names().grad).ptr());
    tensor.owned = nullptr;
  }
  if (placements_.is_distributed(tensor.object)) {
    if (tensor.object == m.owner) {
      const Placements::Kind kind = placements_.kind_of(m.owner);
      if (kind == Placements::Kind::kOther) return false;
      m.sharded = kind == Placements::Kind::kShard;
    } else if (!placements_.is_distributed(m.owner) || !Placements::alike(tensor.object, m.owner)) {
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
  for (auto& t : tables_) {
    t->table.rows.clear();
    t->table.grads.clear();
    t->table.numel = 0;
    t->members.clear();
    t->counts.clear();
    t->grad_bytes.clear();
    t->recipes = false;
  }
  for (size_t i = 0; i < members.size(); ++i) {
    Member& m = members[i];
    TensorRow row{};
    void* grad = nullptr;
    Device device{};
    int64_t grad_bytes = 0;
    if (!m.usable || !resolve(m, row, grad, device, grad_bytes)) continue;
    DeviceTable& t = table_on(device);
    t.table.rows.push_back(row);
    t.table.grads.push_back(grad);
    t.table.numel += row.numel;
    t.members.push_back(static_cast<int>(i));
    t.grad_bytes.push_back(grad_bytes);
    t.counts.push_back(read_count(m));
    t.recipes |= (device.gpu ? request_.recipes_on_gpu : request_.recipes_on_cpu) &&
                 (request_.loss_scaling || groups_[m.group].h.flag[kCapturable] ||
                  t.counts.back().device.gpu);
  }
  for (const auto& t : tables_) {
    for (const int member : t->members) members[member].on_device = t->recipes;
  }
}

// Reads the addresses of a member's tensors, or reports what is wrong with them.
bool Gather::resolve(Member& m, TensorRow& row, void*& grad, Device& device, int64_t& grad_bytes) {
  TensorView p, t;
  if (!abi_.read(m.param.handle(), p) || !is_dense(p)) {
    report(m, "param");
    return false;
  }
  const GroupValues& values = groups_[m.group];
  bool aligned = true;
  // Every other tensor must lie as the param does, and be of the type expected.
  const auto accept = [&](const TensorRef& tensor, const char* key, DType type, DType or_type,
                          void*& data) {
    if (!abi_.read(tensor.handle(), t) || (t.dtype != type && t.dtype != or_type) ||
        t.complex != p.complex || !(t.device == p.device) || !same_layout(t, p)) {
      return report(m, key);
    }
    aligned &= reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    __builtin_prefetch(t.data);
    data = t.data;
  };
  row.param = p.data;
  __builtin_prefetch(p.data);
  aligned &= reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
  accept(m.grad, "grad", p.dtype, p.dtype, grad);
  const DType wide = compute_type(p.dtype);
  row.state_dtype = p.dtype;
  for (int s = 0; s < kStates; ++s) {
    if (!values.has(kStateKeys[s].flag)) continue;
    const DType type = kStateKeys[s].type == kCompute ? wide : row.state_dtype;
    // The first one says what the moments are.
    accept(m.states[s], kStateKeys[s].key, type, s == kExpAvg ? wide : type, row.states[s]);
    if (s == kExpAvg) row.state_dtype = t.dtype;
    // It follows from the final param, which this step does not know.
    if (kStateKeys[s].type == kCompute && is_deferred(m)) row.states[s] = nullptr;
  }
  if (!m.usable) return false;
  device = p.device;
  row.numel = p.numel() << p.complex;
  grad_bytes = row.numel * p.real_size();
  row.param_dtype = p.dtype;
  row.rule = is_deferred(m) ? Decay::kProxL1 : values.rule;
  row.aligned = aligned;
  return true;
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
      const Device place = t->recipes ? t->device : Device{};
      const bool there = count.at != nullptr && count.device == place;
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
    const py::object pair = py::reinterpret_steal<py::object>(
        PySequence_Fast(v.pair.ptr(), "Invalid betas: expected two numbers"));
    if (!pair) throw py::error_already_set();
    for (int n = 0; n < kNumbers; ++n) {
      if (kNumberKeys[n].item < 0) continue;
      if (PySequence_Fast_GET_SIZE(pair.ptr()) != 2) {
        throw py::type_error("Invalid betas: " + std::string(py::repr(v.pair)) +
                             ", expected two numbers");
      }
      v.objects[n] = py::reinterpret_borrow<py::object>(
          PySequence_Fast_GET_ITEM(pair.ptr(), kNumberKeys[n].item));
    }
  }
  for (int n = 0; n < kNumbers; ++n) {
    if (!v.objects[n]) continue;
    v.has_tensors |= abi_.is_tensor(v.objects[n].ptr());
    if (on_host || !abi_.is_tensor(v.objects[n].ptr()))
      v.h.number[n] = as_double(v.objects[n].ptr());
  }
}

Value Gather::value_of(const Device& device, PyObject* object, double value) {
  if (object == nullptr || !abi_.is_tensor(object)) return {value, nullptr, 0};
  TensorRef tensor{object, nullptr};
  if (!abi_.fast()) tensor.owned = own(object);
  TensorView t;
  if ((abi_.fast() && !abi_.is_ordinary(tensor.handle()) && !abi_.ask_ordinary(object)) ||
      !abi_.read(tensor.handle(), t) || t.numel() != 1 || t.complex || !(t.device == device)) {
    return {as_double(object), nullptr, 0};
  }
  hold(object);
  return {0, t.data, static_cast<int64_t>(t.dtype)};
}

// Chunks follow from the rows, and so does what overlaps, but for the grads.
void Gather::find_overlaps(size_t table) {
  DeviceTable& t = *tables_[table];
  std::vector<TensorRow>& rows = t.table.rows;
  // Counts that the host makes are counted one after the other in any case.
  const auto count_of = [&](size_t i) { return t.recipes ? t.counts[i].at : nullptr; };
  bool known = rows.size() == t.known_rows.size();
  for (size_t i = 0; known && i < rows.size(); ++i) {
    known = same_memory(rows[i], t.known_rows[i]) && count_of(i) == t.known_counts[i];
  }
  const auto written_memory = [&] {
    std::vector<Interval> written;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto row = static_cast<int>(i);
      append_written(rows[i], row, written);
      if (t.recipes) written.emplace_back(t.counts[i].at, t.counts[i].is_double ? 8 : 4, row, true);
    }
    return written;
  };
  if (known) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i].first_chunk = t.known_rows[i].first_chunk;
  } else {
    t.table.lay_out_chunks();
    t.overlaps = !t.written.assign(written_memory());
    t.known_rows = rows;
    t.known_counts.clear();
    for (size_t i = 0; i < rows.size(); ++i) t.known_counts.push_back(count_of(i));
  }
  bool overlaps = t.overlaps;
  for (size_t i = 0; !overlaps && i < rows.size(); ++i) {
    overlaps = t.written.overlaps(t.table.grads[i], t.grad_bytes[i]);
  }
  if (!overlaps) return;
  std::vector<Interval> memory = written_memory();
  for (size_t i = 0; i < rows.size(); ++i) {
    memory.emplace_back(t.table.grads[i], t.grad_bytes[i], static_cast<int>(i), false);
  }
  const std::vector<int> turns =
      turns_of(rows.size(), std::move(memory), [&](const Interval& a, const Interval& b) {
        // A grad amid what its own row writes is copied before; nothing helps the others.
        report(members[t.members[a.row]], a.written && b.written ? "overlap" : "grad");
      });
  if (findings_.empty()) split(table, turns);
}

// Leaves the rows of the first turn, and gives the others to tables of their own.
void Gather::split(size_t table, const std::vector<int>& turns) {
  const Device device = tables_[table]->device;
  const int last = *std::max_element(turns.begin(), turns.end());
  while (std::count_if(tables_.begin(), tables_.end(),
                       [&](const auto& t) { return t->device == device; }) <= last) {
    tables_.push_back(std::make_unique<DeviceTable>());
    tables_.back()->device = device;
  }
  std::vector<DeviceTable*> of_turn;
  for (auto& t : tables_) {
    if (t->device == device) of_turn.push_back(t.get());
  }
  DeviceTable all = std::move(*tables_[table]);
  *tables_[table] = DeviceTable();
  tables_[table]->device = device;
  for (size_t i = 0; i < turns.size(); ++i) {
    DeviceTable& t = *of_turn[turns[i]];
    t.recipes = all.recipes;
    t.table.rows.push_back(all.table.rows[i]);
    t.table.grads.push_back(all.table.grads[i]);
    t.table.numel += all.table.rows[i].numel;
    t.members.push_back(all.members[i]);
    t.counts.push_back(all.counts[i]);
    t.grad_bytes.push_back(all.grad_bytes[i]);
  }
  for (DeviceTable* t : of_turn) {
    t->known_rows.clear();
    t->table.lay_out_chunks();
  }
}

// Python code has run since the addresses were read: they must be the same, or nothing is updated.
void Gather::refresh(DeviceTable& t) {
  for (size_t i = 0; i < t.members.size(); ++i) {
    Member& m = members[t.members[i]];
    TensorRow row{};
    void* grad;
    Device device;
    int64_t grad_bytes;
    const bool ok = resolve(m, row, grad, device, grad_bytes) &&
                    same_memory(row, t.table.rows[i]) && grad == t.table.grads[i] &&
                    read_count(m).at == t.counts[i].at;
    if (!ok) {
      throw std::runtime_error("param_groups[" + std::to_string(m.group) + "]['params'][" +
                               std::to_string(m.index) +
                               "] or its state was changed while its step was being prepared; "
                               "nothing was updated");
    }
  }
}

void Gather::begin(DeviceTable& t) {
  for (const int member : t.members) {
    abi_.mark_written(members[member].param.object);
    if (members[member].owner != members[member].param.object) {
      abi_.mark_written(members[member].owner);
    }
  }
  if (t.recipes) follow_recipes(t);
  if (returned_) refresh(t);
  t.begun = true;
  t.launched = false;
  if (t.recipes) return;
  t.table.scalars.clear();
  for (size_t i = 0; i < t.counts.size(); ++i) {
    StepCount& count = t.counts[i];
    count.before = count.read();
    count.write(count.before + 1);
    t.table.rows[i].scalars = scalars_of(t, members[t.members[i]], count.before + 1);
  }
}

void Gather::undo(DeviceTable& t) {
  for (size_t i = t.counts.size(); i-- > 0 && t.begun && !t.launched && !t.recipes;) {
    t.counts[i].write(t.counts[i].before);
  }
  t.begun = false;
}

// Those of params at the same step, in groups that are alike, are the same.
int32_t Gather::scalars_of(DeviceTable& t, const Member& m, double step) {
  const bool deferred = is_deferred(m);
  std::vector<Scalars>& all = t.table.scalars;
  if (all.size() != t.scalars_of.size()) t.scalars_of.resize(all.size());
  const std::pair<int, bool> owner{runs_[m.group], deferred};
  constexpr size_t kRecent = 8;  // steps that params of a group may be at, in turns
  for (size_t i = all.size(); i-- > 0 && i + kRecent >= all.size();) {
    if (t.scalars_of[i] == owner && all[i].step == step) return static_cast<int32_t>(i);
  }
  HyperParameters h = groups_[m.group].h;
  if (deferred)
    h.number[kWeightDecay] = 0;  // z first: a soft threshold of zero leaves it, to the bit
  bias_.update(h, step);
  all.push_back(
      make_scalars(deferred ? Decay::kProxL1 : groups_[m.group].rule, h, bias_, t.loss_scale));
  t.scalars_of.push_back(owner);
  return static_cast<int32_t>(all.size() - 1);
}

void Gather::follow_recipes(DeviceTable& t) {
  TensorTable& table = t.table;
  table.group_recipes.clear();
  table.scalars_recipes.clear();
  int last = -1;
  bool last_deferred = false;
  for (size_t i = 0; i < t.members.size(); ++i) {
    const Member& m = members[t.members[i]];
    const bool deferred = is_deferred(m);
    if (runs_[m.group] != last || deferred != last_deferred) {
      last = runs_[m.group];
      last_deferred = deferred;
      const GroupValues& values = groups_[m.group];
      GroupRecipe recipe{};
      for (int n = 0; n < kNumbers; ++n) {
        recipe.number[n] = value_of(t.device, values.objects[n].ptr(), values.h.number[n]);
      }
      if (deferred) recipe.number[kWeightDecay] = {0, nullptr, 0};
      for (int f = 0; f < kFlags; ++f) recipe.flag[f] = values.h.flag[f];
      recipe.rule = table.rows[i].rule;
      table.group_recipes.push_back(recipe);
    }
    const auto group = static_cast<int32_t>(table.group_recipes.size() - 1);
    const auto dtype = t.counts[i].is_double ? DType::kFloat64 : DType::kFloat32;
    table.rows[i].scalars = static_cast<int32_t>(i);
    table.scalars_recipes.push_back({t.counts[i].at, group, static_cast<int32_t>(dtype)});
  }
  table.scalars.assign(table.scalars_recipes.size(), {});
  table.head.num_groups = static_cast<int64_t>(table.group_recipes.size());
  table.head.num_scalars = static_cast<int64_t>(table.scalars_recipes.size());
}

void Gather::step_on_cpu(DeviceTable& t, int threads) {
  begin(t);
  std::optional<py::gil_scoped_release> release;
  // Other threads may run Python code then, so nothing must be left to step.
  if (t.table.numel > kBriefNumel && tables().size() == 1) release.emplace();
  const auto start = std::chrono::steady_clock::now();
  try {
    adamprox::step_on_cpu(t.table, threads);
  } catch (...) {  // no memory; nothing has been written yet
    undo(t);
    throw;
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  update_seconds = elapsed.count();
  t.launched = true;
}

std::vector<DeviceTable*> Gather::tables() {
  std::vector<DeviceTable*> result;
  for (auto& t : tables_) {
    if (!t->members.empty()) result.push_back(t.get());
  }
  return result;
}

// The first one of that device; those behind it are for later turns.
DeviceTable& Gather::table_on(const Device& device) {
  for (auto& t : tables_) {
    if (t->device == device) return *t;
  }
  tables_.push_back(std::make_unique<DeviceTable>());
  tables_.back()->device = device;
  return *tables_.back();
}

PyObject* Gather::hold(PyObject* object) {
  Py_INCREF(object);
  held_.push_back(object);
  return object;
}

void Gather::report(Member& m, const char* key) {
  m.usable = false;
  findings_.push_back({m.group, m.index, py::reinterpret_borrow<py::object>(m.owner), key});
}

void Gather::release() {
  // The tables' buffers stay, so that a step allocates nothing. What is let go of may run Python code.
  for (auto& t : tables_) {
    t->table.records = nullptr;
    t->table.group_recipes.clear();
    t->table.scalars_recipes.clear();
    t->table.head = {{1, nullptr, 0}, {0, nullptr, 0}, 0, 0};
    t->loss_scale = 1;
    t->begun = false;
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
