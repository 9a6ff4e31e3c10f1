// A DTensor's share on this rank, and how the whole is dealt out; nothing here asks torch to import
// torch.distributed.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace adamprox {

namespace py = pybind11;

// torch.distributed.tensor.DTensor or a subclass; it keeps its share and its spec in slots.
inline bool is_distributed(PyTypeObject* type) {
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* module = PyDict_GetItemString(modules, "torch.distributed.tensor");
  if (module == nullptr) return false;
  const py::object base = py::getattr(module, "DTensor", py::none());
  const py::handle t(reinterpret_cast<PyObject*>(type));
  return PyType_Check(base.ptr()) && PyObject_IsSubclass(t.ptr(), base.ptr()) == 1 &&
         py::hasattr(t, "_local_tensor") && py::hasattr(t, "_spec");
}

inline py::object attribute(PyObject* object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw py::error_already_set();
  return value;
}

class Placements {
 public:
  static py::object share_of(PyObject* dtensor) {
    static PyObject* name = PyUnicode_InternFromString("_local_tensor");
    return attribute(dtensor, name);
  }

  // Over the same mesh, and dealt out alike on each of its dims.
  static bool alike(PyObject* a, PyObject* b) {
    const py::object spec = spec_of(a), other = spec_of(b);
    return spec.is(other) || (spec_part(spec, mesh()).equal(spec_part(other, mesh())) &&
                              spec_part(spec, placements()).equal(spec_part(other, placements())));
  }

  // Of the numbers, each rank has some or all: kReplicate, all of them; kShard, only some. kOther:
  // what a rank has are not the numbers, but for instance terms of a sum.
  enum class Kind { kReplicate, kShard, kOther };
  Kind kind_of(PyObject* dtensor) {
    Kind kind = Kind::kReplicate;
    for (const py::handle placement : spec_part(spec_of(dtensor), placements())) {
      kind = std::max(kind, kind_of_type(placement));
    }
    return kind;
  }

 private:
  static py::object spec_of(PyObject* dtensor) {
    static PyObject* name = PyUnicode_InternFromString("_spec");
    return attribute(dtensor, name);
  }

  static PyObject* mesh() {
    static PyObject* name = PyUnicode_InternFromString("mesh");
    return name;
  }

  static PyObject* placements() {
    static PyObject* name = PyUnicode_InternFromString("placements");
    return name;
  }

  static py::object spec_part(const py::object& spec, PyObject* name) {
    return attribute(spec.ptr(), name);
  }

  // Learnt once a class.
  Kind kind_of_type(py::handle placement) {
    PyTypeObject* type = Py_TYPE(placement.ptr());
    for (const auto& [known, kind] : kinds_) {
      if (known == type) return kind;
    }
    const py::object shard = py::module_::import("torch.distributed.tensor").attr("Shard");
    const bool strided = py::hasattr(placement, "split_factor");  // FSDP2's over tensor parallel
    const Kind kind = placement.attr("is_replicate")().cast<bool>() ? Kind::kReplicate
                      : py::isinstance(placement, shard) || strided ? Kind::kShard
                                                                    : Kind::kOther;
    Py_INCREF(type);  // another type must not take its address
    kinds_.emplace_back(type, kind);
    return kind;
  }

  std::vector<std::pair<PyTypeObject*, Kind>> kinds_;
};

}  // namespace adamprox
