// The Python module adamprox._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <set>
#include <string>
#include <tuple>

#include "cpu/step.h"
#include "host/gather.h"
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
#include "cuda/step.h"
#endif

namespace adamprox {
namespace {

// What a backend sees of the rows on one device.
class Table {
 public:
  Table(std::shared_ptr<Gather> gather, HeldTable& device)
      : gather_(std::move(gather)), device_(device), table_(device.table) {}

  py::tuple device() const {
    return py::make_tuple(device_.device.gpu ? "cuda" : "cpu", device_.device.id);
  }

  // (param, grad, {key: state}, group's index, step, whether its decay is deferred) of each row.
  py::list rows() const {
    py::list result;
    for (size_t i = 0; i < device_.members.size(); ++i) {
      const Member& m = gather_->members[device_.members[i]];
      const py::object grad = m.grad.object != nullptr
                                  ? py::reinterpret_borrow<py::object>(m.grad.object)
                                  : py::handle(m.owner).attr("grad");
      result.append(py::make_tuple(py::handle(m.param.object), grad, states_of(m), m.group,
                                   device_.counts[i].before + 1, gather_->is_deferred(m)));
    }
    return result;
  }

  // (group's index, index in the group, first chunk's index, numel) of each row.
  py::list tensors() const {
    py::list result;
    for (size_t i = 0; i < device_.members.size(); ++i) {
      const Member& m = gather_->members[device_.members[i]];
      const TensorRow& row = table_.rows[i];
      result.append(py::make_tuple(m.group, m.index, row.first_chunk, row.numel));
    }
    return result;
  }

  // (the param itself, its local tensor or stand-in, {key: state}, group's index) where other ranks have
  // parts of a norm: their params are z after the step.
  py::list deferred() const {
    py::list result;
    for (const int index : device_.members) {
      const Member& m = gather_->members[index];
      if (!gather_->is_deferred(m)) continue;
      result.append(
          py::make_tuple(py::handle(m.owner), py::handle(m.param.object), states_of(m), m.group));
    }
    return result;
  }

  // Has the step write Record[num_chunks] to this tensor on the device.
  void track(const py::object& records) const {
    const auto address = records.attr("data_ptr")().cast<uintptr_t>();
    table_.records = reinterpret_cast<Record*>(address);
    device_.records = records;
  }
  py::object records() const { return device_.records ? device_.records : py::none(); }

  int64_t num_rows() const { return static_cast<int64_t>(table_.rows.size()); }
  int64_t num_chunks() const { return static_cast<int64_t>(table_.chunks.size()); }
  int64_t num_packed() const { return table_.num_packed; }
  int64_t num_of_blocks() const { return table_.num_of_blocks; }
  int64_t num_scalars() const { return static_cast<int64_t>(table_.scalars.size()); }

  std::set<std::tuple<int, int, int, int>> variants() const { return device_.variants(); }

  // The metadata as upload(bytes) puts it on the device. It is uploaded again if the rows or the stream
  // have changed, so two streams never share a Workspace. A capture records its own upload, which only
  // its replays carry out.
  py::object metadata(const py::function& upload, uintptr_t stream, bool capturing) const {
    const bool uploaded = device_.uploaded && !capturing && stream == device_.uploaded_for &&
                          device_.metadata_is_uploaded();
    if (uploaded) return device_.uploaded;
    const py::object made = upload(py::bytes(device_.metadata()));
    if (capturing) {
      keep(made);
    } else {
      device_.uploaded = made;
      device_.uploaded_for = stream;
      device_.note_upload();
    }
    return made;
  }

  // For as long as the optimizer lives: a captured graph reads it.
  void keep(const py::object& object) const { gather_->captured.push_back(object); }

  // Whether the scalars are made where the tensors are.
  bool has_recipes() const { return device_.recipes; }

  // The grads are those of loss_scale times the loss; before begin(). The host's number,
  void set_loss_scale(double loss_scale) const { device_.loss_scale = loss_scale; }
  double loss_scale() const { return device_.loss_scale; }
  // or, for recipes, tensors that are there, or None.
  void set_loss_scaling(const py::object& loss_scale, const py::object& found_inf) const {
    const auto value = [&](const py::object& o, double otherwise) {
      return gather_->value_of(device_.device, o.is_none() ? nullptr : o.ptr(), otherwise);
    };
    table_.head.loss_scale = value(loss_scale, 1);
    table_.head.found_inf = value(found_inf, 0);
  }

  // The size of what the recipes become; 0 without them.
  int64_t prepared_size() const {
    return has_recipes() ? sizeof(PreparedHead) + num_scalars() * sizeof(Scalars) : 0;
  }

  void begin() const { gather_->begin(device_); }
  void undo() const { device_.undo(); }
  py::bytes payload() const { return device_.payload(); }
  void step_cpu(int threads) const { gather_->step_on_cpu(device_, threads); }

#if defined(ADAMPROX_CUDA_ARCHITECTURES)
  bool payload_is_inline() const {
    return static_cast<int64_t>(device_.payload().size()) <= cuda_inline_payload();
  }

  // Addresses on the device: of what metadata() gave; of a payload that is too long to be passed inline
  // or stays there for a graph's replays, else 0; and of prepared_size bytes. Then the step is launched,
  // on a stream of torch's.
  void launch_cuda(uintptr_t stream, uintptr_t metadata, uintptr_t payload,
                   uintptr_t prepared) const {
    const std::string bytes = payload == 0 ? device_.payload() : std::string();
    const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    {
      const py::gil_scoped_release release;
      step_on_cuda(table_, {device_.device.id, pointer(stream), pointer(metadata), pointer(payload),
                            bytes.data(), bytes.size(), pointer(prepared)});
    }
    device_.launched = true;
  }
#endif

 private:
  static py::dict states_of(const Member& m) {
    py::dict states;
    for (int s = 0; s < kStates; ++s) {
      if (m.states[s].object) states[kStateKeys[s].key] = py::handle(m.states[s].object);
    }
    return states;
  }

  std::shared_ptr<Gather> gather_;
  HeldTable& device_;
  TensorTable& table_;
};

std::vector<Table> tables(const std::shared_ptr<Gather>& gather) {
  std::vector<Table> result;
  for (HeldTable* device : gather->tables()) result.emplace_back(gather, *device);
  return result;
}

// Where things are, in words of 8 bytes unless it says otherwise: Triton's kernels read the same bytes.
py::dict layout() {
  py::dict words;
  const auto add = [&](const std::string& name, size_t bytes) { words[name.c_str()] = bytes / 8; };
#define FIELD(name, type, field) add(name "." #field, offsetof(type, field))
  add("row", sizeof(TensorRow));
  FIELD("row", TensorRow, param);
  FIELD("row", TensorRow, states);
  FIELD("row", TensorRow, numel);
  FIELD("row", TensorRow, scalars);
  add("row.types", offsetof(TensorRow, param_dtype));
  add("scalars", sizeof(Scalars));
#define SCALAR(name) FIELD("scalars", Scalars, name);
  ADAMPROX_SCALARS(SCALAR)
#undef SCALAR
  FIELD("scalars", Scalars, decay);
#undef FIELD
  add("value", sizeof(Value));
  add("group_recipe", sizeof(GroupRecipe));
  add("group_recipe.flags", offsetof(GroupRecipe, flag));
  add("scalars_recipe", sizeof(ScalarsRecipe));
  add("head", sizeof(RecipesHead));
  add("record", sizeof(Record));
  words["group_recipe.rule"] = offsetof(GroupRecipe, rule);  // in bytes
  words["decay_constants"] = kDecayConstants;
  words["chunk_size"] = kChunkSize;
  words["tile_size"] = kTileSize;
  return words;
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
  m.attr("torch_abi") = TorchAbi::get().fast() ? "fast" : "slow";
  m.attr("layout") = layout();
  py::list states, numbers, flags, rules;
  for (const StateKey& s : kStateKeys) {
    states.append(py::make_tuple(s.key, s.type == kMoment ? "moment" : "compute",
                                 s.flag == kAlways ? nullptr : kFlagKeys[s.flag].key));
  }
  for (const NumberKey& n : kNumberKeys) {
    const std::string key = n.key;
    numbers.append(n.item < 0 ? key : key + "[" + std::to_string(n.item) + "]");
  }
  for (const FlagKey& f : kFlagKeys) flags.append(f.key);
  for (const RuleKey& r : kRuleKeys) rules.append(py::make_tuple(r.name, r.decay, r.option));
  m.attr("states") = states;
  m.attr("numbers") = numbers;
  m.attr("flags") = flags;
  m.attr("rules") = rules;

  py::class_<Finding>(m, "Finding")
      .def_readonly("group", &Finding::group)
      .def_readonly("index", &Finding::index)
      .def_readonly("param", &Finding::param)
      .def_readonly("key", &Finding::key);
  py::class_<Table>(m, "Table")
      .def_property_readonly("device", &Table::device)
      .def("rows", &Table::rows)
      .def("tensors", &Table::tensors)
      .def("deferred", &Table::deferred)
      .def("track", &Table::track, py::arg("records"))
      .def_property_readonly("records", &Table::records)
      .def_property_readonly("num_rows", &Table::num_rows)
      .def_property_readonly("num_chunks", &Table::num_chunks)
      .def_property_readonly("num_packed", &Table::num_packed)
      .def_property_readonly("num_of_blocks", &Table::num_of_blocks)
      .def_property_readonly("num_scalars", &Table::num_scalars)
      .def_property_readonly("variants", &Table::variants)
      .def("metadata", &Table::metadata, py::arg("upload"), py::arg("stream") = 0,
           py::arg("capturing") = false)
      .def("keep", &Table::keep, py::arg("object"))
      .def_property_readonly("has_recipes", &Table::has_recipes)
      .def_property_readonly("prepared_size", &Table::prepared_size)
      .def_property("loss_scale", &Table::loss_scale, &Table::set_loss_scale)
      .def("set_loss_scaling", &Table::set_loss_scaling, py::arg("loss_scale"),
           py::arg("found_inf"))
      .def("begin", &Table::begin)
      .def("undo", &Table::undo)
      .def("payload", &Table::payload)
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
      .def_property_readonly("payload_is_inline", &Table::payload_is_inline)
      .def("launch_cuda", &Table::launch_cuda, py::arg("stream"), py::arg("metadata"),
           py::arg("payload"), py::arg("prepared"))
#endif
      .def("step_cpu", &Table::step_cpu, py::arg("threads"));
  py::class_<Gather, std::shared_ptr<Gather>>(m, "Gather")
      .def(py::init<>())
      .def("read",
           [](Gather& g, const py::list& groups, const py::dict& state, const py::dict& stand_ins,
              bool recipes_on_gpu, bool recipes_on_cpu, bool loss_scaling, int cpu_threads) {
             return g.read(groups, state, stand_ins,
                           {recipes_on_gpu, recipes_on_cpu, loss_scaling, cpu_threads});
           })
      .def_property_readonly("findings", &Gather::findings)
      .def("tables", &tables)
      .def("groups", &Gather::groups)
      .def("release", &Gather::release)
      .def_readonly("update_seconds", &Gather::update_seconds);
}
