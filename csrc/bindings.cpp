// The Python module adamprox._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "cpu/step.h"
#include "describe.h"
#include "host/gather.h"
#if defined(ADAMPROX_CUDA_ARCHITECTURES)
#include "cuda/step.h"
#define ADAMPROX_WITH_CUDA
#else
#define ADAMPROX_CUDA_ARCHITECTURES ""
#endif

namespace adamprox {
namespace {

using Table = HeldTable;  // what a backend sees of the rows on one device

std::vector<std::shared_ptr<Table>> tables(const std::shared_ptr<Gather>& gather) {
  std::vector<std::shared_ptr<Table>> result;
  for (const auto& table : gather->tables) {
    if (!table->members.empty()) result.emplace_back(gather, table.get());
  }
  return result;
}

// A tensors.Row each.
py::list rows(const Table& t) {
  py::list result;
  const py::object make = py::module_::import("adamprox.tensors").attr("Row");
  for (size_t i = 0; i < t.members.size(); ++i) {
    const Member& m = t.gather.members[t.members[i]];
    const TensorRow& row = t.table.rows[i];
    const py::handle owner = m.owner, grad = m.grad.object;
    py::dict states;
    for (int s = 0; s < kStates; ++s) {
      if (m.states[s].object) states[kStateKeys[s].key] = py::handle(m.states[s].object);
    }
    result.append(make(owner, py::handle(m.param.object),
                       grad ? py::reinterpret_borrow<py::object>(grad) : owner.attr("grad"), states,
                       m.group, m.index, t.counts[i].before + 1, t.gather.is_deferred(m),
                       row.first_chunk, row.numel, row.block));
  }
  return result;
}

// Has the step write Record[num_chunks] to this tensor on the device.
void track(Table& t, const py::object& records) {
  t.table.records = reinterpret_cast<Record*>(records.attr("data_ptr")().cast<uintptr_t>());
  t.records = records;
}

// For recipes: tensors that are there, or None.
void set_loss_scaling(Table& t, const py::object& loss_scale, const py::object& found_inf) {
  const auto value = [&](const char* key, const py::object& o, double otherwise) {
    return t.gather.value_of(t.device, key, o.is_none() ? nullptr : o.ptr(), otherwise);
  };
  t.table.head.loss_scale = value("grad_scale", loss_scale, 1);
  t.table.head.found_inf = value("found_inf", found_inf, 0);
}

// The size of what the recipes become; 0 without them.
size_t prepared_size(const Table& t) {
  return t.recipes ? sizeof(PreparedHead) + t.table.scalars.size() * sizeof(Scalars) : 0;
}

#if defined(ADAMPROX_WITH_CUDA)
// Addresses on the device: of what metadata() gave; of a payload that is too long to be passed
// inline, else 0; and of prepared_size bytes. Then the step is launched, on a stream of torch's.
void launch_cuda(Table& t, uintptr_t stream, uintptr_t metadata, uintptr_t payload,
                 uintptr_t prepared) {
  const std::string bytes = payload == 0 ? t.payload() : std::string();
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  step_on_cuda(t.table, {t.device.id, pointer(stream), pointer(metadata), pointer(payload),
                         bytes.data(), bytes.size(), pointer(prepared), t.launched});
}
#endif

}  // namespace
}  // namespace adamprox

// It needs the GIL: a free-threaded Python turns it on when it imports this module, with a warning. A
// step's first part relies on no other thread replacing what it has found in dicts and tensors.
PYBIND11_MODULE(_C, m) {
  using namespace adamprox;
  m.def("cpu_instruction_sets", &cpu_instruction_sets);
  m.def("cpu_instruction_set", &cpu_instruction_set);
  m.def("use_cpu_instruction_set", &use_cpu_instruction_set);
  m.attr("compiler") = ADAMPROX_COMPILER;
  m.attr("cuda_architectures") = ADAMPROX_CUDA_ARCHITECTURES;
  m.attr("cuda_problem") = ADAMPROX_CUDA_PROBLEM;  // why it was not built, or ""
#if defined(ADAMPROX_WITH_CUDA)
  m.def("cuda_device_problem", &cuda_device_problem);
#endif
  m.attr("torch_abi") = TorchAbi::get().fast() ? "fast" : "slow";
  m.attr("layout") = describe_layout();
  m.attr("states") = describe_states();
  m.attr("numbers") = describe_numbers();
  m.attr("flags") = describe_flags();
  m.attr("rules") = describe_rules();

  py::class_<Finding>(m, "Finding")
      .def_readonly("group", &Finding::group)
      .def_readonly("index", &Finding::index)
      .def_readonly("param", &Finding::param)
      .def_readonly("key", &Finding::key);
  const auto size_of_vector = [](auto member) {
    return [member](const Table& t) { return (t.table.*member).size(); };
  };
  py::class_<Table, std::shared_ptr<Table>>(m, "Table")
      .def_property_readonly(
          "device",
          [](const Table& t) { return py::make_tuple(t.device.gpu ? "cuda" : "cpu", t.device.id); })
      .def("rows", &rows)
      .def_readonly("has_deferred", &Table::deferred)
      .def("track", &track, py::arg("records"))
      .def_readonly("records", &Table::records)
      .def_property_readonly("num_rows", size_of_vector(&TensorTable::rows))
      .def_property_readonly("num_chunks", size_of_vector(&TensorTable::chunks))
      .def_property_readonly("num_scalars", size_of_vector(&TensorTable::scalars))
      .def_property_readonly("num_packed", [](const Table& t) { return t.table.num_packed; })
      .def_property_readonly("num_of_blocks", [](const Table& t) { return t.table.num_of_blocks; })
      .def_property_readonly("num_slots", [](const Table& t) { return t.table.num_slots; })
      .def_property_readonly("variants", &Table::variants)
      .def("metadata", [](const Table& t) { return py::bytes(t.metadata()); })
      .def_property_readonly("metadata_is_uploaded", &Table::metadata_is_uploaded)
      .def("note_upload", &Table::note_upload)
      .def_readwrite("uploaded", &Table::uploaded)
      // For as long as the optimizer lives: a captured graph reads it.
      .def("keep", [](Table& t, const py::object& o) { t.gather.captured.push_back(o); })
      .def_readonly("has_recipes", &Table::recipes)  // the scalars are made where the tensors are
      .def_property_readonly("prepared_size", &prepared_size)
      // The grads are those of loss_scale times the loss: the host's number, before begin().
      .def_readwrite("loss_scale", &Table::loss_scale)
      .def("set_loss_scaling", &set_loss_scaling, py::arg("loss_scale"), py::arg("found_inf"))
      .def("begin", [](Table& t) { t.gather.begin(t); })
      .def("undo", &Table::undo)
      .def("payload", [](const Table& t) { return py::bytes(t.payload()); })
#if defined(ADAMPROX_WITH_CUDA)
      .def_property_readonly(
          "payload_is_inline",
          [](const Table& t) { return t.payload_size() <= size_t(cuda_inline_payload()); })
      .def("load_cuda", [](const Table& t) { load_on_cuda(t.table, t.device.id); })
      .def("launch_cuda", &launch_cuda, py::arg("stream"), py::arg("metadata"), py::arg("payload"),
           py::arg("prepared"), py::call_guard<py::gil_scoped_release>())
#endif
      .def("step_cpu", [](Table& t, int threads) { t.gather.step_on_cpu(t, threads); });
  py::class_<Gather, std::shared_ptr<Gather>>(m, "Gather")
      .def(py::init<>())
      .def("read", &Gather::read)
      // Copies, since the next read() clears what is there.
      .def_property_readonly("findings", [](const Gather& g) { return g.findings; })
      .def("tables", &tables)
      .def("groups", &Gather::groups)
      .def("release", &Gather::release)
      .def_readonly("update_seconds", &Gather::update_seconds);
}
