// Every assumption about torch's insides. Each is tried when the module is imported, and has a slow way
// beside it, which asks Python (tensors.py); ADAMPROX_TORCH_ABI=slow forces it.
//
// Tensors are read by libtorch's stable C ABI, found at run time: so one build serves every torch, and
// none is linked. The ABI takes a handle, the address of a pointer to a tensor's implementation. What is
// assumed, and the slow ways:
//   - that pointer is the first field after a Python tensor's head; `_cdata` is it, too
//   - where an implementation keeps its dispatch keys, which tell an ordinary tensor; predicates
//   - where it keeps its grad, which then needs no Python object; `tensor.grad`. Another thread that sets
//     it lets go of the GIL while the grad is still there but dying: its head tells
//   - the C++ function that counts a write; `torch.autograd.graph.increment_version`
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../tensor_view.h"

namespace adamprox {

namespace py = pybind11;

class TorchAbi {
 public:
  static const TorchAbi& get();  // ImportError: this torch is too old

  bool fast() const { return fast_; }

  // The handle of a Python tensor, valid while it lives; fast only.
  static void* handle_of(PyObject* tensor) {
    return reinterpret_cast<char*>(tensor) + sizeof(PyObject);
  }
  // Makes a slot, whose address is a handle, own a reference, and lets go of it.
  void own(void* handle, void*& slot) const {
    slot = undefined_;
    assign_(handle, &slot);
  }
  void own(PyObject* tensor, void*& slot) const;
  void drop(void*& slot) const {
    void* undefined = undefined_;
    assign_(&undefined, &slot);
  }

  // The handle of tensor.grad, or null if there is none; fast only, for torch's own classes. `ask`: it
  // is of another kind, and Python code is to look at it.
  void* grad_of(PyObject* tensor, bool& ask) const {
    auto* autograd = at<char*>(implementation(handle_of(tensor)), autograd_);
    if (autograd == nullptr || at<void*>(autograd, grad_) == undefined_) return nullptr;
    const auto [vtable, count] = head_of(at<void*>(autograd, grad_));
    ask = vtable != vtable_ && is_code(vtable);
    const bool usual = vtable == vtable_ && !is_dying(count);
    return ask || usual ? autograd + grad_ : nullptr;
  }
  bool has_own_grad(PyObject* object) const {
    return Py_TYPE(object) == parameter_ || Py_TYPE(object) == tensor_;
  }
  bool is_tensor(PyObject* object) const {
    return has_own_grad(object) || PyType_IsSubtype(Py_TYPE(object), tensor_);
  }

  // Whether a tensor is like one that was learnt to be ordinary; fast only.
  bool is_ordinary(const void* handle) const {
    return std::find(ordinary_.begin(), ordinary_.end(), keys_of(handle)) != ordinary_.end();
  }
  // Asks Python, which may run code of the user's, and learns what is ordinary.
  bool ask_ordinary(PyObject* object) const;

  // Reads an ordinary tensor. False: it is no floating-point tensor on a CPU or a GPU, or its storage
  // is gone or too small.
  bool read(void* handle, TensorView& out) const;

  // Tells autograd of a write: backward through an older value is an error then.
  void mark_written(PyObject* tensor) const;

  // Prefetch what a read will touch; each stage of a param, 0 to 2, finds in the cache what the one before
  // asked for. After a backward pass, a step on many small tensors takes a third less.
  static void prefetch(const void* handle) {
    const auto* bytes = static_cast<const char*>(implementation(handle));
    for (int line = 0; line < 3; ++line) __builtin_prefetch(bytes + 64 * line);
  }
  static void prefetch_storage(const void* handle) {
    const auto* storage = at<const char*>(implementation(handle), 2 * sizeof(void*));  // a hint
    __builtin_prefetch(storage + 16);
    __builtin_prefetch(storage + 56);
  }
  void prefetch_param(PyObject* param, int stage) const {
    const void* handle = handle_of(param);
    if (stage == 0) return prefetch(handle);
    const auto* autograd = at<const char*>(implementation(handle), autograd_);
    if (stage == 1) {
      __builtin_prefetch(autograd);
      prefetch_storage(handle);
    } else if (autograd != nullptr) {
      prefetch(autograd + grad_);
    }
  }

  py::module_ python;  // tensors.py

  // Calls body(begin, end, context) on torch's threads; null where there is no such function.
  using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                  void (*body)(int64_t, int64_t, void*), void* context);
  ParallelFor parallel_for = nullptr;

 private:
  TorchAbi();
  bool find_insides();
  void find_functions();

  struct Head {
    const void* vtable;
    uint64_t count;
  };
  __attribute__((no_sanitize("address"))) static Head head_of(const void* object) {
    return *static_cast<const Head*>(object);  // which may have been freed
  }
  static bool is_code(const void* vtable) {
    Dl_info info;
    return dladdr(vtable, &info) != 0;
  }
  // One reference that is its Python object's, which goes; or none.
  bool is_dying(uint64_t count) const {
    return tells_dying_ && ((count >> 63 != 0 && uint32_t(count) == 1) || uint32_t(count) == 0);
  }

  template <typename T>
  static T at(const void* object, ptrdiff_t place) {
    T result;
    std::memcpy(&result, static_cast<const char*>(object) + place, sizeof(result));
    return result;
  }
  static void* implementation(const void* handle) { return at<void*>(handle, 0); }
  uint64_t keys_of(const void* handle) const { return at<uint64_t>(implementation(handle), keys_); }

  int32_t (*data_)(void*, void**);
  int32_t (*dim_)(void*, int64_t*);
  int32_t (*sizes_)(void*, int64_t**);
  int32_t (*strides_)(void*, int64_t**);
  int32_t (*dtype_)(void*, int32_t*);
  int32_t (*device_type_)(void*, int32_t*);
  int32_t (*device_index_)(void*, int32_t*);
  int32_t (*storage_size_)(void*, int64_t*);
  int32_t (*storage_offset_)(void*, int64_t*);
  int32_t (*assign_)(void*, void*);
  void (*bump_version_)(void*) = nullptr;
  int32_t cpu_, gpu_;
  struct {
    int32_t number;  // torch's
    DType type;
    bool complex;
  } dtypes_[6];  // the usual one first

  bool fast_ = false;
  ptrdiff_t keys_ = 0, autograd_ = 0, grad_ = 0;
  void* undefined_ = nullptr;  // what is there instead of a grad
  const void* vtable_ = nullptr;
  bool tells_dying_ = false;
  PyTypeObject *tensor_, *parameter_;
  mutable std::vector<uint64_t> ordinary_;  // keys
};

}  // namespace adamprox
