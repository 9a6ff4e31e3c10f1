// Reads where a tensor's memory lies, without linking libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.h"

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
    return stable_.found ? read_stable(tensor, out) : read_dlpack(tensor, out);
  }

  // Tells autograd of a write, as torch's in-place operations do: backward through an older value
  // is an error then.
  void mark_written(PyObject* tensor) const;

  void* current_stream(const dlpack::Device& device) const;

  const char* interface() const { return stable_.found ? "stable ABI" : "DLPack"; }

 private:
  struct StableAbi {
    bool found = false;
    void (*bump_version)(void*);  // not of the ABI: null where it is not found or does not work
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

  static StableAbi find_stable_abi();
  bool read_stable(PyObject* tensor, dlpack::Tensor& out) const;
  bool read_dlpack(PyObject* tensor, dlpack::Tensor& out) const;

  const dlpack::ExchangeApi* dlpack_;
  const StableAbi stable_;
};

}  // namespace adamprox
