// The Python module adamprox._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <stdexcept>

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

// What a backend sees of one device's share of a step.
class Table {
 public:
  Table(std::shared_ptr<Gather> gather, DeviceTable& device)
      : gather_(std::move(gather)), device_(device) {}

  py::tuple device() const {
    return py::make_tuple(device_type_name(device_.device), device_.device.id);
  }

  // (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq or None, group's index, step) of each row.
  py::list rows() const {
    py::list result;
    for (const int index : device_.members) {
      const Member& m = gather_->members[index];
      const py::object max = m.max_exp_avg_sq ? m.max_exp_avg_sq : py::none();
      result.append(py::make_tuple(m.param, m.grad, m.exp_avg, m.exp_avg_sq, max, m.group,
                                   gather_->step_of(m)));
    }
    return result;
  }

  // The table as bytes, for a kernel on another device: what seldom changes (TensorRow[], Chunk[])
  // and what changes at each step (grad pointers, Scalars[]).
  py::bytes metadata() const { return bytes_of(device_.table.rows, device_.table.chunks); }
  py::bytes payload() const { return bytes_of(device_.table.grads, device_.table.scalars); }

  py::object uploaded_metadata(const py::function& upload) const {
    const TensorTable& t = device_.table;
    std::string bytes;
    append(bytes, t.rows);
    append(bytes, t.chunks);
    if (!device_.uploaded || bytes != device_.uploaded_bytes) {
      device_.uploaded = upload(py::bytes(bytes));
      device_.uploaded_bytes = std::move(bytes);
    }
    return device_.uploaded;
  }

  void step_cpu(int threads) const {
    const py::gil_scoped_release release;
    fused_adam_cpu(device_.table, threads);
  }

 private:
  std::shared_ptr<Gather> gather_;
  DeviceTable& device_;
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
  py::class_<Finding>(m, "Finding")
      .def_readonly("group", &Finding::group)
      .def_readonly("param", &Finding::param)
      .def_readonly("key", &Finding::key);
  py::class_<Table>(m, "Table")
      .def_property_readonly("device", &Table::device)
      .def("rows", &Table::rows)
      .def("step_cpu", &Table::step_cpu, py::arg("threads"));
  py::class_<Gather, std::shared_ptr<Gather>>(m, "Gather")
      .def(py::init([](const std::string& decay) { return std::make_shared<Gather>(decay_from(decay)); }),
           py::arg("decay"))
      .def("read", &Gather::read, py::arg("groups"), py::arg("state"), py::arg("staged"))
      .def("tables", &tables)
      .def("count_step", &Gather::count_step)
      .def("release", &Gather::release);
}
