// Reads where a tensor's memory lies, without linking libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <iterator>

#include "layout.h"
#include "trail.h"

namespace adamprox {

// torch publishes two C interfaces. DLPack's exchange API takes a Python object and serves always.
// The stable C ABI of libtorch is three times as fast but takes a tensor's address, which is the
// first field after a Python object's head: that is verified against `_cdata` when this is made,
// and where it does not hold, DLPack it is. Nothing is cached, so nothing can be stale.
class TensorReader {
 public:
  TensorReader();

  // Reads a torch.Tensor (the caller has checked that its memory is its own). False, without an
  // exception, for one that has no strided memory of floating-point numbers on a CPU or a GPU.
  bool read(PyObject* tensor, dlpack::Tensor& out) const {
    return stable_.found ? read_stable(handle_of(tensor), out) : read_dlpack(tensor, out);
  }

  // What read() is about to touch.
  void visit(PyObject* tensor, Trail& trail) const {
    if (!stable_.found) return;
    trail.visit(tensor);
    trail.visit_implementation(implementation(handle_of(tensor)));
  }

  // Reads tensor.grad without making a Python object of it, where reads_grads().
  enum class Grad { kNone, kRead, kUnreadable };
  Grad read_grad(PyObject* tensor, dlpack::Tensor& out, Trail& trail) const;
  bool reads_grads() const { return stable_.grad != nullptr; }

  // Tells autograd of a write, as torch's in-place operations do: backward through an older value
  // is an error then.
  void mark_written(PyObject* tensor) const;
  bool marks_without_python() const { return stable_.bump_version != nullptr; }

  void* current_stream(const dlpack::Device& device) const;

  const char* interface() const { return stable_.found ? "stable ABI" : "DLPack"; }

 private:
  struct StableAbi {
    bool found = false;
    // Two functions of C++, not of the ABI: null where they are not found or do not work.
    void (*bump_version)(void* handle) = nullptr;
    void* (*grad)(void* implementation) = nullptr;  // a handle; of `undefined` where there is none
    void* undefined = nullptr;
    int32_t (*layout)(void*, int32_t*);
    int32_t (*data)(void*, void**);
    int32_t (*dim)(void*, int64_t*);
    int32_t (*sizes)(void*, int64_t**);
    int32_t (*strides)(void*, int64_t**);
    int32_t (*dtype)(void*, int32_t*);
    int32_t (*device_type)(void*, int32_t*);
    int32_t (*device_index)(void*, int32_t*);
    int32_t strided, cpu, cuda;
    dlpack::DeviceType gpu;  // what torch calls cuda: of NVIDIA or AMD
    struct {
      int32_t number;  // torch's
      dlpack::DataType type;
    } dtypes[6];  // the usual one first
  };

  // The stable ABI's handle of a Python tensor: the address of its pointer to the implementation.
  static void* handle_of(PyObject* tensor) {
    return reinterpret_cast<char*>(tensor) + sizeof(PyObject);
  }

  static void* implementation(void* handle) {
    void* result;
    std::memcpy(&result, handle, sizeof(result));
    return result;
  }

  static StableAbi find_stable_abi();
  static void find_cxx_functions(StableAbi& abi, void* library);
  bool read_stable(void* handle, dlpack::Tensor& out) const;
  bool read_dlpack(PyObject* tensor, dlpack::Tensor& out) const;

  const dlpack::ExchangeApi* dlpack_;
  const StableAbi stable_;
};

inline TensorReader::Grad TensorReader::read_grad(PyObject* tensor, dlpack::Tensor& out,
                                                  Trail& trail) const {
  void* handle = stable_.grad(implementation(handle_of(tensor)));
  if (implementation(handle) == stable_.undefined) return Grad::kNone;
  trail.visit_implementation(implementation(handle));
  return read_stable(handle, out) ? Grad::kRead : Grad::kUnreadable;
}

// Inline: it runs four times a param, in two nanoseconds a call.
inline bool TensorReader::read_stable(void* handle, dlpack::Tensor& out) const {
  int32_t layout, dtype, device_type, device_index = 0;
  int64_t dim;
  if (stable_.layout(handle, &layout) != 0 || layout != stable_.strided ||
      stable_.device_type(handle, &device_type) != 0 || stable_.dtype(handle, &dtype) != 0) {
    return false;
  }
  const bool on_cpu = device_type == stable_.cpu;
  if (!on_cpu && device_type != stable_.cuda) return false;
  if (!on_cpu && stable_.device_index(handle, &device_index) != 0) return false;
  out.device.type = on_cpu ? dlpack::kCPU : stable_.gpu;
  out.device.id = device_index;
  const auto* known = std::begin(stable_.dtypes);
  while (known->number != dtype) {
    if (++known == std::end(stable_.dtypes)) return false;
  }
  out.dtype = known->type;
  if (stable_.data(handle, &out.data) != 0 || stable_.dim(handle, &dim) != 0 ||
      stable_.sizes(handle, &out.shape) != 0 || stable_.strides(handle, &out.strides) != 0) {
    return false;
  }
  out.ndim = static_cast<int32_t>(dim);
  // A wrapper, which keeps its numbers elsewhere (a grad's Python type is not known), has no memory.
  return out.data != nullptr || numel(out) == 0;
}

}  // namespace adamprox
