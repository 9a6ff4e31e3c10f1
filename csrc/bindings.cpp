// The Python module adamprox._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "fused_adam.h"
#include "gather.h"

namespace adamprox {
namespace {

Decay decay_from(const std::string& name) {
  static const std::map<std::string, Decay> names = {
      {"coupled", Decay::kCoupled},     {"decoupled", Decay::kDecoupled},
      {"prox_sq_l2", Decay::kProxSqL2}, {"prox_l1", Decay::kProxL1},
      {"prox_l2", Decay::kProxL2},
  };
  const auto found = names.find(name);
  if (found == names.end()) throw py::value_error("Invalid decay: " + name);
  return found->second;
}

const char* device_type_name(const dlpack::Device& device) {
  switch (device.type) {
    case dlpack::kCPU:
      return "cpu";
    case dlpack::kCUDA:
    case dlpack::kROCm:
      return "cuda";
    default:
      return "unsupported";
  }
}

template <typename T>
void append_bytes(std::string& out, const std::vector<T>& values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

void* pointer(const py::object& address) {
  return reinterpret_cast<void*>(address.cast<uintptr_t>());
}

size_t payload_size(const TensorTable& t) {
  const size_t scalars = t.recipes.empty()
                             ? t.scalars.size() * sizeof(Scalars)
                             : sizeof(RecipesHead) + t.recipes.size() * sizeof(Recipe);
  return t.grads.size() * sizeof(void*) + scalars;
}

// What changes at each step: the grads' pointers, void*[num_rows], and then Scalars[], or
// RecipesHead and Recipe[].
std::string payload(const TensorTable& t) {
  std::string bytes;
  bytes.reserve(payload_size(t));
  append_bytes(bytes, t.grads);
  if (t.recipes.empty()) {
    append_bytes(bytes, t.scalars);
  } else {
    bytes.append(reinterpret_cast<const char*>(&t.recipes_head), sizeof(RecipesHead));
    append_bytes(bytes, t.recipes);
  }
  return bytes;
}

// Lets go of the tensors of a step, however it ends.
struct Release {
  Gather& gather;
  ~Release() { gather.release(); }
};

// Steps of fewer elements keep the GIL: they are over before another thread would get it, and as
// nothing else runs meanwhile, nothing needs to be kept alive.
constexpr int64_t kBriefNumel = 1 << 15;

void update_on_cpu(Gather& gather, const TensorTable& table, int threads) {
  std::optional<py::gil_scoped_release> release;
  if (table.numel > kBriefNumel) release.emplace();
  const auto start = std::chrono::steady_clock::now();
  fused_adam_cpu(table, threads);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  gather.update_seconds = elapsed.count();
}

// The usual step on the CPU, in one call. False: there is something to mend, or a tensor elsewhere
// (if there was one the last time, it is not even looked for), and nothing was written.
bool step_on_cpu(Gather& gather, const py::list& groups, const py::dict& state, int threads) {
  if (!gather.only_on_cpu) return false;
  const Release release{gather};
  if (!gather.read(groups, state, py::dict(), Recipes{}).empty() || !gather.only_on_cpu ||
      gather.norms_across_ranks()) {
    return false;
  }
  const bool brief = std::all_of(gather.tables.begin(), gather.tables.end(),
                                 [](const auto& t) { return t.table.numel <= kBriefNumel; });
  if (!brief || !gather.reader().marks_without_python()) gather.hold();
  gather.begin_step();
  for (const DeviceTable& device : gather.tables) {
    if (!device.table.rows.empty()) update_on_cpu(gather, device.table, threads);
  }
  gather.count_step();
  return true;
}

#if defined(ADAMPROX_CUDA_ARCHITECTURES)
bool payload_is_inline(const TensorTable& table) {
  return static_cast<int64_t>(payload_size(table)) <= cuda_inline_payload();
}

// A payload that fits rides in the kernel's parameters; else it is put on the device, if it is not
// there already.
void launch_cuda(DeviceTable& device, void* stream, const void* on_device, void* prepared) {
  const std::string bytes = on_device == nullptr ? payload(device.table) : std::string();
  const py::gil_scoped_release release;
  const bool upload = on_device == nullptr && !payload_is_inline(device.table);
  if (upload) {
    if (!device.uploads) device.uploads = std::make_shared<PayloadUploads>();
    on_device = device.uploads->upload(device.device.id, stream, bytes.data(), bytes.size());
  }
  fused_adam_cuda(device.table, {device.device.id, stream, device.uploaded_at, on_device,
                                 bytes.data(), bytes.size(), prepared});
  if (upload) device.uploads->launched(stream);
}

// The usual step on NVIDIA GPUs, in one call, if the last one was CUDA's. False: there is something to
// mend, to be put on a GPU, or to be said, and nothing was written.
bool step_on_cuda(Gather& gather, const py::list& groups, const py::dict& state) {
  if (!gather.by_cuda) return false;
  gather.by_cuda = false;
  const Release release{gather};
  if (!gather.read(groups, state, py::dict(), Recipes{true, false, false}).empty() ||
      gather.norms_across_ranks()) {
    return false;
  }
  std::vector<std::pair<DeviceTable*, void*>> launches;
  for (DeviceTable& device : gather.tables) {
    if (device.table.rows.empty()) continue;
    if (device.device.type != dlpack::kCUDA || !device.table.recipes.empty()) return false;
    void* stream = gather.reader().current_stream(device.device);
    if (stream != device.uploaded_for || !device.rows_are_uploaded() || cuda_captures(stream)) {
      return false;
    }
    launches.emplace_back(&device, stream);
  }
  if (!gather.reader().marks_without_python()) gather.hold();
  gather.hold_counters();
  gather.begin_step();
  for (const auto& [device, stream] : launches) launch_cuda(*device, stream, nullptr, nullptr);
  gather.count_step();
  gather.by_cuda = true;
  return true;
}
#endif

// What a backend sees of one device's share of a step.
class Table {
 public:
  Table(std::shared_ptr<Gather> gather, DeviceTable& device)
      : gather_(std::move(gather)), device_(device) {}

  py::tuple device() const {
    return py::make_tuple(device_type_name(device_.device), device_.device.id);
  }

  // torch's current one; null on the CPU.
  void* stream() const {
    if (device_.device.type == dlpack::kCPU) return nullptr;
    return gather_->reader().current_stream(device_.device);
  }

  // (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq or None, group's index, step) of each row.
  py::list rows() const {
    py::list result;
    const auto object = [](PyObject* o) { return py::handle(o != nullptr ? o : Py_None); };
    for (const int index : device_.members) {
      const Member& m = gather_->members[index];
      result.append(py::make_tuple(object(m.param), object(m.grad), object(m.exp_avg),
                                   object(m.exp_avg_sq), object(m.max_exp_avg_sq), m.group,
                                   gather_->step_of(m)));
    }
    return result;
  }

  // (the param itself, group's index, its first chunk's index, numel) of each row.
  py::list tensors() const {
    py::list result;
    for (size_t i = 0; i < device_.members.size(); ++i) {
      const Member& m = gather_->members[device_.members[i]];
      const TensorRow& row = device_.table.rows[i];
      result.append(py::make_tuple(py::handle(m.owner), m.group, row.first_chunk, row.numel));
    }
    return result;
  }

  // Has the step write Record[num_chunks] to this tensor on the device.
  void track(const py::object& records) const {
    const auto address = records.attr("data_ptr")().cast<uintptr_t>();
    device_.table.records = reinterpret_cast<Record*>(address);
    device_.records = records;
  }

  // What track() was given, or None.
  py::object records() const { return device_.records ? device_.records : py::none(); }

  int64_t num_rows() const { return static_cast<int64_t>(device_.table.rows.size()); }
  int64_t num_scalars() const { return static_cast<int64_t>(device_.table.scalars.size()); }
  int64_t num_chunks() const { return static_cast<int64_t>(device_.table.chunks.size()); }
  int64_t num_packed() const { return device_.table.num_packed; }

  // The distinct (param's, state's) dtypes, by the numbers of DType.
  std::set<std::pair<int, int>> dtypes() const {
    std::set<std::pair<int, int>> result;
    for (const TensorRow& row : device_.table.rows) {
      result.emplace(static_cast<int>(row.param_dtype), static_cast<int>(row.state_dtype));
    }
    return result;
  }

  bool amsgrad() const {
    const auto& rows = device_.table.rows;
    return std::any_of(rows.begin(), rows.end(),
                       [](const TensorRow& row) { return row.max_exp_avg_sq != nullptr; });
  }

  // What seldom changes, TensorRow[num_rows] and Chunk[num_chunks], and a Workspace, as upload(bytes)
  // put it on the device; called again only if the rows or the stream have changed since. So
  // two streams never share a Workspace; but what is captured into a CUDA graph is better put there
  // before (its replays are ordered with other steps by whoever needs the params in order).
  py::object metadata(const py::function& upload, bool capturing) const {
    void* stream = this->stream();
    if (!device_.rows_are_uploaded() || (!capturing && stream != device_.uploaded_for)) {
      std::string bytes;
      append_bytes(bytes, device_.table.rows);
      append_bytes(bytes, device_.table.chunks);
      bytes.append(Workspace::bytes(device_.table.decay, num_chunks()), '\0');
      device_.uploaded = upload(py::bytes(bytes));
      device_.uploaded_at = pointer(device_.uploaded.attr("data_ptr")());
      device_.uploaded_rows = device_.table.rows;
      device_.uploaded_for = stream;
    }
    if (capturing) keep(device_.uploaded);
    return device_.uploaded;
  }

  // For as long as the optimizer lives: a captured graph reads it.
  void keep(const py::object& object) const { gather_->captured.push_back(object); }

  // Whether the scalars are made where the tensors are.
  bool has_recipes() const { return !device_.table.recipes.empty(); }

  // The grads are those of loss_scale times the loss. The host's number, before rows() and payload();
  void set_loss_scale(double loss_scale) {
    for (Scalars& s : device_.table.scalars) s.grad_scale = s.grad_scale / loss_scale;
    loss_scale_ = loss_scale;
  }

  // or, for recipes, tensors that are there, or None.
  void set_loss_scaling(const py::object& loss_scale, const py::object& found_inf) {
    RecipesHead& head = device_.table.recipes_head;
    if (!loss_scale.is_none()) head.loss_scale = gather_->number_at(device_, loss_scale);
    if (!found_inf.is_none()) head.found_inf = gather_->number_at(device_, found_inf);
  }

  double loss_scale() const { return loss_scale_; }

  // The size of what the recipes become; 0 without them.
  int64_t prepared_size() const {
    const auto count = static_cast<int64_t>(device_.table.recipes.size());
    return has_recipes() ? sizeof(PreparedHead) + count * sizeof(Scalars) : 0;
  }

  std::string payload() const { return adamprox::payload(device_.table); }

#if defined(ADAMPROX_CUDA_ARCHITECTURES)
  // Addresses on the device: of a payload that is too long to be passed inline and stays there for
  // the replays of a graph, else 0; and of prepared_size bytes.
  bool payload_is_inline() const { return adamprox::payload_is_inline(device_.table); }

  void step_cuda(uintptr_t payload, uintptr_t prepared) const {
    launch_cuda(device_, stream(), reinterpret_cast<const void*>(payload),
                reinterpret_cast<void*>(prepared));
    gather_->by_cuda = !has_recipes();
  }
#endif

  void step_cpu(int threads) const { update_on_cpu(*gather_, device_.table, threads); }

 private:
  std::shared_ptr<Gather> gather_;
  DeviceTable& device_;
  double loss_scale_ = 1;
};

std::vector<Table> tables(const std::shared_ptr<Gather>& gather) {
  std::vector<Table> result;
  for (DeviceTable& device : gather->tables) {
    if (!device.table.rows.empty()) result.emplace_back(gather, device);
  }
  return result;
}

}  // namespace
}  // namespace adamprox

PYBIND11_MODULE(_C, m) {
  using namespace adamprox;
  m.def("cpu_instruction_set", &cpu_instruction_set);
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
  m.attr("cuda_architectures") = ADAMPROX_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  py::class_<Finding>(m, "Finding")
      .def_readonly("group", &Finding::group)
      .def_readonly("param", &Finding::param)
      .def_readonly("key", &Finding::key);
  py::class_<Table>(m, "Table")
      .def_property_readonly("device", &Table::device)
      .def("rows", &Table::rows)
      .def("tensors", &Table::tensors)
      .def("track", &Table::track, py::arg("records"))
      .def_property_readonly("records", &Table::records)
      .def_property_readonly("num_rows", &Table::num_rows)
      .def_property_readonly("num_chunks", &Table::num_chunks)
      .def_property_readonly("num_packed", &Table::num_packed)
      .def_property_readonly("dtypes", &Table::dtypes)
      .def_property_readonly("amsgrad", &Table::amsgrad)
      .def("metadata", &Table::metadata, py::arg("upload"), py::arg("capturing") = false)
      .def("keep", &Table::keep, py::arg("object"))
      .def("payload", [](const Table& table) { return py::bytes(table.payload()); })
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
      .def_property_readonly("payload_is_inline", &Table::payload_is_inline)
#endif
      .def_property_readonly("has_recipes", &Table::has_recipes)
      .def_property_readonly("prepared_size", &Table::prepared_size)
      .def_property_readonly("num_scalars", &Table::num_scalars)
      .def("set_loss_scale", &Table::set_loss_scale, py::arg("loss_scale"))
      .def("set_loss_scaling", &Table::set_loss_scaling, py::arg("loss_scale"),
           py::arg("found_inf"))
      .def_property_readonly("loss_scale", &Table::loss_scale)
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
      .def("step_cuda", &Table::step_cuda, py::arg("payload"), py::arg("prepared"))
#endif
      .def("step_cpu", &Table::step_cpu, py::arg("threads"));
  py::class_<Gather, std::shared_ptr<Gather>>(m, "Gather")
      .def(py::init([](const std::string& decay) {
             return std::make_shared<Gather>(decay_from(decay));
           }),
           py::arg("decay"))
      .def(
          "read",
          [](Gather& g, const py::list& groups, const py::dict& state, const py::dict& staged,
             bool recipes_on_gpu, bool recipes_on_cpu, bool loss_scaling) {
            return g.read(groups, state, staged, {recipes_on_gpu, recipes_on_cpu, loss_scaling});
          },
          py::arg("groups"), py::arg("state"), py::arg("staged"), py::arg("recipes_on_gpu") = false,
          py::arg("recipes_on_cpu") = false, py::arg("loss_scaling") = false)
      .def("step_on_cpu", &step_on_cpu, py::arg("groups"), py::arg("state"), py::arg("threads"))
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
      .def("step_on_cuda", &step_on_cuda, py::arg("groups"), py::arg("state"))
#else
      .def("step_on_cuda", [](Gather&, const py::list&, const py::dict&) { return false; },
           py::arg("groups"), py::arg("state"))
#endif
      .def("tables", &tables)
      .def("hold", &Gather::hold)
      .def("begin_step", &Gather::begin_step)
      .def("count_step", &Gather::count_step)
      .def("release", &Gather::release)
      .def_readonly("update_seconds", &Gather::update_seconds)
      .def_property_readonly("norms_across_ranks", &Gather::norms_across_ranks)
      .def_property_readonly("reader", [](const Gather& g) { return g.reader().interface(); })
      .def_property_readonly("recognises_tensors",
                             [](const Gather& g) { return g.reader().recognises(); });
}
