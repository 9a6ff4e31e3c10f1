// A DTensor's local tensor on this rank, and its placements; nothing here imports torch.distributed.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "dicts.h"

namespace adamprox {

class Placements {
 public:
  // Whether it is a torch.distributed.tensor.DTensor, or of a subclass.
  bool is_distributed(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    return learnt(types_, type, [&] {
      PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
      if (module == nullptr) return false;
      const py::object base = py::getattr(module, "DTensor", py::none());
      return PyType_Check(base.ptr()) &&
             PyObject_IsSubclass(reinterpret_cast<PyObject*>(type), base.ptr()) == 1;
    });
  }

  static py::object local_of(PyObject* dtensor) {
    static PyObject* name = interned("_local_tensor");
    return attribute(dtensor, name);
  }

  // Whether each rank has the same part of both.
  static bool alike(PyObject* a, PyObject* b) {
    const py::object spec = spec_of(a), other = spec_of(b);
    return spec.is(other) || (part(spec, "mesh").equal(part(other, "mesh")) &&
                              part(spec, "placements").equal(part(other, "placements")));
  }

  // What a rank has of the numbers. kReplicate: all of them; kShard: some; kOther: something else, terms
  // of a sum for instance.
  enum class Kind { kReplicate, kShard, kOther };
  Kind kind_of(PyObject* dtensor) {
    Kind kind = Kind::kReplicate;
    for (const py::handle placement : part(spec_of(dtensor), "placements")) {
      kind = std::max(
          kind, learnt(kinds_, Py_TYPE(placement.ptr()), [&] {
            const auto shard = py::module_::import("torch.distributed.tensor").attr("Shard");
            // FSDP2's over tensor parallel has a split_factor.
            return placement.attr("is_replicate")().cast<bool>() ? Kind::kReplicate
                   : py::isinstance(placement, shard) || py::hasattr(placement, "split_factor")
                       ? Kind::kShard
                       : Kind::kOther;
          }));
    }
    return kind;
  }

 private:
  static py::object spec_of(PyObject* dtensor) {
    static PyObject* name = interned("_spec");
    return attribute(dtensor, name);
  }
  static py::object part(const py::object& spec, const char* name) { return spec.attr(name); }

  // Asked once a class.
  template <typename T, typename F>
  static T learnt(std::vector<std::pair<PyTypeObject*, T>>& known, PyTypeObject* type, F ask) {
    for (const auto& [other, answer] : known) {
      if (other == type) return answer;
    }
    const T answer = ask();
    Py_INCREF(type);  // another type must not take its address
    known.emplace_back(type, answer);
    return answer;
  }

  std::vector<std::pair<PyTypeObject*, bool>> types_;
  std::vector<std::pair<PyTypeObject*, Kind>> kinds_;
};

}  // namespace adamprox
