// What the gather must know of a tensor's Python class; learnt once a class.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "local_tensor.h"
#include "python_values.h"

namespace adamprox {

struct TensorType {
  PyTypeObject* type;
  bool plain;               // its memory is its own: not a DTensor, a FakeTensor or another wrapper
  bool distributed;         // a DTensor
  const PyGetSetDef* grad;  // the C getter of its grad, or null
};

class TensorTypes {
 public:
  const TensorType& of(PyObject* object) {
    for (const TensorType& known : types_) {
      if (known.type == Py_TYPE(object)) return known;
    }
    return learn(Py_TYPE(object));
  }

 private:
  const TensorType& learn(PyTypeObject* type) {
    const py::module_ torch = py::module_::import("torch");
    const py::handle t(reinterpret_cast<PyObject*>(type));
    const bool plain =
        PyObject_IsSubclass(t.ptr(), torch.attr("Tensor").ptr()) == 1 &&
        t.attr("__torch_dispatch__").is(torch.attr("_C").attr("_disabled_torch_dispatch_impl"));
    const py::object grad = py::getattr(t, keys().grad, py::none());
    const bool getset = Py_IS_TYPE(grad.ptr(), &PyGetSetDescr_Type);
    t.inc_ref();  // another type must not take its address
    types_.push_back(
        {type, plain, is_distributed(type),
         getset ? reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset : nullptr});
    return types_.back();
  }

  std::vector<TensorType> types_;
};

}  // namespace adamprox
