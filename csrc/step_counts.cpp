// Step counts, one a cohort of params that share it, and the scalars that follow from them.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "gather.h"
#include "layout.h"

namespace adamprox {

int Gather::cohort_of(PyObject* counter) {
  if (!cohorts_.empty() && cohorts_.back().counter == counter) {
    return static_cast<int>(cohorts_.size()) - 1;
  }
  const auto known = cohort_index_.find(counter);
  if (known != cohort_index_.end()) return known->second;
  dlpack::Tensor t;
  if (!read_tensor(counter, t) || numel(t) != 1 || t.dtype.code != dlpack::kFloat ||
      t.dtype.bits < 32) {
    return -1;
  }
  const bool is_double = t.dtype.bits == 64;
  double step = std::numeric_limits<double>::quiet_NaN();
  if (t.device.type == dlpack::kCPU) {
    step = is_double ? *static_cast<double*>(t.data) : double{*static_cast<float*>(t.data)};
  }
  const int index = static_cast<int>(cohorts_.size());
  cohorts_.push_back({counter, t.data, is_double, step, t.device, false});
  cohort_index_[counter] = index;
  return index;
}

// Those of the group being read, and of the groups before it with the same hyper-parameters, share
// their scalars where they are at the same step.
int32_t Gather::scalars_of(DeviceTable& device, int cohort, const GroupValues& values) {
  auto& known = device.scalars_of_cohort;
  if (cohort >= static_cast<int>(known.size())) known.resize(cohort + 1);
  auto& [run, scalars] = known[cohort];
  if (run == run_) return scalars;
  run = run_;
  TensorTable& table = device.table;
  scalars = static_cast<int32_t>(table.scalars.size());
  if (needs_recipe(device.device, cohort, values)) {
    table.recipes.resize(scalars);  // those before it are given
    table.recipes.push_back(recipe(device.device, cohorts_[cohort], values));
    table.scalars.emplace_back();
  } else {
    const HyperParameters hyper = on_host(values);
    bias_.update(hyper, cohorts_[cohort].step + 1);
    table.scalars.push_back(step_scalars(decay_, hyper, bias_));
  }
  return scalars;
}

// Whether these scalars are made where the tensors are: so that the host need not wait.
bool Gather::needs_recipe(const dlpack::Device& device, int cohort,
                          const GroupValues& values) const {
  if (!(device.type == dlpack::kCPU ? recipes_.on_cpu : recipes_.on_gpu)) return false;
  return recipes_.loss_scaling || values.capturable ||
         (cohort >= 0 && cohorts_[cohort].device.type != dlpack::kCPU);
}

// Null, or what the finding is called: the step count must lie where it is read.
const char* Gather::misplaced_count(const dlpack::Device& device, int cohort,
                                    const GroupValues& values) const {
  if (needs_recipe(device, cohort, values)) {
    const bool there = cohort >= 0 && same_device(cohorts_[cohort].device, device);
    return there ? nullptr : "step on device";
  }
  return cohort >= 0 && cohorts_[cohort].device.type == dlpack::kCPU ? nullptr : "step";
}

Recipe Gather::recipe(const dlpack::Device& device, Cohort& cohort, const GroupValues& values) {
  const HyperParameters& h = values.hyper;
  Recipe r{};
  r.lr = number(device, values.lr, h.lr);
  r.beta1 = number(device, values.beta1, h.beta1);
  r.beta2 = number(device, values.beta2, h.beta2);
  r.eps = number(device, values.eps, h.eps);
  r.weight_decay = number(device, values.weight_decay, h.weight_decay);
  r.initial_lr = number(device, values.initial_lr, h.initial_lr);
  r.step = {0, cohort.data,
            static_cast<int64_t>(cohort.is_double ? DType::kFloat64 : DType::kFloat32)};
  r.decay_by_schedule = h.decay_by_schedule;
  r.maximize = h.maximize;
  r.counts = !cohort.in_recipes;
  cohort.in_recipes = true;
  return r;
}

// Of Python, or a tensor, which is read there and then if it is on that device.
Number Gather::number(const dlpack::Device& device, PyObject* object, double value) {
  if (PyFloat_Check(object) || PyLong_Check(object)) return {value, nullptr, 0};
  dlpack::Tensor t;
  if (!PyObject_HasAttr(object, keys().grad) || !read_tensor(object, t) || numel(t) != 1 ||
      t.dtype.code == dlpack::kComplex || !same_device(t.device, device)) {
    return {as_double(object), nullptr, 0};
  }
  held_.push_back(py::reinterpret_borrow<py::object>(object));
  return {0, t.data, static_cast<int64_t>(real_dtype(t.dtype))};
}

namespace {

void set_counter(PyObject* state, PyObject* counter) {
  if (PyDict_SetItem(state, keys().step, counter) != 0) throw py::error_already_set();
}

}  // namespace

// A param that was skipped leaves its cohort, with a counter that stays behind.
void Gather::let_skipped_leave() {
  std::unordered_map<PyObject*, py::object> left_behind;
  for (const Skipped& skipped : skipped_) {
    if (skipped.state == nullptr || !PyDict_Check(skipped.state)) continue;
    PyObject* counter = PyDict_GetItemWithError(skipped.state, keys().step);
    if (counter == nullptr || cohort_index_.find(counter) == cohort_index_.end()) continue;
    py::object& copy = left_behind[counter];
    if (!copy && std::isnan(cohorts_[cohort_index_[counter]].step) &&
        answers_true(py::module_::import("torch").attr("cuda").ptr(),
                     interned("is_current_stream_capturing"))) {
      throw std::runtime_error(
          "a param without a grad cannot leave those that share its step count while a CUDA graph "
          "is captured, since each replay would do it again: step once with the same grads before");
    }
    if (!copy) copy = py::reinterpret_borrow<py::object>(counter).attr("clone")();
    set_counter(skipped.state, copy.ptr());
  }
}

void Gather::count_step() {
  // Cohorts at the same step become one.
  std::vector<int> leaders(cohorts_.size());
  std::unordered_map<double, int> leader_at[2];
  for (size_t i = 0; i < cohorts_.size(); ++i) {
    Cohort& cohort = cohorts_[i];
    leaders[i] = static_cast<int>(i);
    if (cohort.in_recipes) continue;
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

}  // namespace adamprox
