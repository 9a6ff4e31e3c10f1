#include "torch_abi.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

namespace adamprox {
namespace {

#if defined(__APPLE__)
constexpr const char* kLibrary = "libtorch_cpu.dylib";
#else
constexpr const char* kLibrary = "libtorch_cpu.so";
#endif

void* address(py::handle tensor) { return PyLong_AsVoidPtr(tensor.attr("_cdata").ptr()); }

}  // namespace

const TorchAbi& TorchAbi::get() {
  static const auto* abi = new TorchAbi;  // never destroyed: tensors may outlive static objects
  return *abi;
}

TorchAbi::TorchAbi() : python(py::module_::import("adamprox.tensors")) {
  find_functions();
  const py::module_ torch = py::module_::import("torch");
  tensor_ = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());
  parameter_ = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  const char* wish = std::getenv("ADAMPROX_TORCH_ABI");
  if (wish == nullptr || std::string(wish) != "slow") fast_ = find_insides();
}

void TorchAbi::find_functions() {
  void* library = dlopen(kLibrary, RTLD_NOLOAD | RTLD_NOW);
  const auto find = [library](auto& function, const char* name) {
    void* symbol = library != nullptr ? dlsym(library, name) : nullptr;
    if (symbol == nullptr) {
      throw py::import_error(
          std::string("adamprox needs torch >= 2.10: ") + kLibrary +
          (library != nullptr ? std::string(" has no ") + name : std::string(" is not loaded")));
    }
    std::memcpy(&function, &symbol, sizeof(symbol));
  };
  const auto constant = [&](const std::string& name) {
    int32_t (*function)();
    find(function, ("aoti_torch_" + name).c_str());
    return function();
  };
  find(data_, "aoti_torch_get_data_ptr");
  find(dim_, "aoti_torch_get_dim");
  find(sizes_, "aoti_torch_get_sizes");
  find(strides_, "aoti_torch_get_strides");
  find(dtype_, "aoti_torch_get_dtype");
  find(device_type_, "aoti_torch_get_device_type");
  find(device_index_, "aoti_torch_get_device_index");
  find(storage_size_, "aoti_torch_get_storage_size");
  find(storage_offset_, "aoti_torch_get_storage_offset");
  find(assign_, "aoti_torch_assign_tensors");
  // What an undefined tensor points to: a new one gives its implementation away.
  int32_t (*make)(void**);
  find(make, "aoti_torch_new_uninitialized_tensor");
  void* handle = nullptr;
  if (make(&handle) != 0) throw std::bad_alloc();
  undefined_ = implementation(handle);  // it is never deleted
  cpu_ = constant("device_type_cpu");
  gpu_ = constant("device_type_cuda");
  dtypes_[0] = {constant("dtype_float32"), DType::kFloat32, false};
  dtypes_[1] = {constant("dtype_bfloat16"), DType::kBFloat16, false};
  dtypes_[2] = {constant("dtype_float16"), DType::kFloat16, false};
  dtypes_[3] = {constant("dtype_float64"), DType::kFloat64, false};
  dtypes_[4] = {constant("dtype_complex64"), DType::kFloat32, true};
  dtypes_[5] = {constant("dtype_complex128"), DType::kFloat64, true};
  parallel_for = reinterpret_cast<ParallelFor>(dlsym(library, "torch_parallel_for"));
  bump_version_ = reinterpret_cast<void (*)(void*)>(
      dlsym(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));
}

bool TorchAbi::find_insides() {
  const py::dict trials = python.attr("trials")();
  const py::list plain = trials["plain"], others = trials["others"];
  const py::object first = plain[0], param = trials["param"], with_grad = trials["with_grad"];
  for (const py::handle tensor : plain) {
    if (implementation(handle_of(tensor.ptr())) != address(tensor)) return false;
  }
  // An implementation's keys are its last word that is the same in all plain tensors, and another one in
  // each of the others.
  using Words = std::array<const void*, 23>;
  const auto count = std::min(trials["words"].cast<size_t>(), Words().size());
  const auto words_of = [count](const py::handle& tensor) {
    Words words{};
    std::memcpy(words.data(), address(tensor), count * sizeof(void*));
    return words;
  };
  const auto tells = [&](size_t i) {
    const auto is_first = [&](py::handle t) { return words_of(t)[i] == words_of(first)[i]; };
    return std::all_of(plain.begin(), plain.end(), is_first) &&
           std::none_of(others.begin(), others.end(), is_first);
  };
  size_t keys = count - 1;
  while (keys > 0 && !tells(keys)) --keys;
  if (keys == 0) return false;
  keys_ = keys * sizeof(void*);

  // A tensor with a grad points to autograd's data, and a new one without to nothing.
  const Words with = words_of(with_grad), without = words_of(trials["grad"]);
  const void* grad = address(trials["grad"]);
  for (size_t i = 0; i < with.size() && autograd_ == 0; ++i) {
    if (without[i] != nullptr || with[i] == nullptr || i == keys) continue;
    const auto data = at<std::array<const void*, 6>>(with[i], 0);
    for (size_t j = 1; j < data.size(); ++j) {
      if (data[j] != grad) continue;
      autograd_ = i * sizeof(void*);
      grad_ = j * sizeof(void*);
    }
  }
  if (autograd_ == 0) return false;
  with_grad.attr("grad") = py::none();
  if (at<void*>(at<void*>(address(with_grad), autograd_), grad_) != undefined_) return false;
  param.attr("grad") = trials["grad"];
  vtable_ = words_of(first)[0];
  bool ask = false;
  const void* found = grad_of(param.ptr(), ask);
  if (grad_of(first.ptr(), ask) != nullptr || grad_of(with_grad.ptr(), ask) != nullptr ||
      found == nullptr || implementation(found) != grad || ask) {
    return false;
  }
  // A dying grad has one reference, as a tensor has that only Python knows.
  const auto of_python = head_of(address(py::object(plain[1]))).count,
             of_grad = head_of(grad).count;
  tells_dying_ = true;
  tells_dying_ = is_dying(of_python) && !is_dying(of_grad);

  if (bump_version_ == nullptr) return false;
  const auto version = [&] { return first.attr("_version").cast<int64_t>(); };
  const int64_t before = version();
  bump_version_(handle_of(first.ptr()));
  return version() == before + 1;
}

void TorchAbi::own(PyObject* tensor, void*& slot) const {
  void* implementation = address(tensor);
  if (PyErr_Occurred()) throw py::error_already_set();
  own(&implementation, slot);
}

bool TorchAbi::ask_ordinary(PyObject* object) const {
  const bool ordinary = python.attr("is_ordinary")(py::handle(object)).cast<bool>();
  if (ordinary && fast_) ordinary_.push_back(keys_of(handle_of(object)));
  return ordinary;
}

bool TorchAbi::read(void* handle, TensorView& out) const {
  int32_t dtype, device_type, device_index = 0;
  int64_t offset, storage_size;
  void* data;
  if (dtype_(handle, &dtype) != 0 || device_type_(handle, &device_type) != 0 ||
      (device_type != cpu_ && device_type != gpu_) ||
      (device_type == gpu_ && device_index_(handle, &device_index) != 0) ||
      data_(handle, &data) != 0 || dim_(handle, &out.dim) != 0 || sizes_(handle, &out.sizes) != 0 ||
      strides_(handle, &out.strides) != 0 || storage_offset_(handle, &offset) != 0 ||
      storage_size_(handle, &storage_size) != 0) {
    return false;
  }
  const auto* known = dtypes_;
  while (known->number != dtype) {
    if (++known == dtypes_ + 6) return false;
  }
  out.dtype = known->type;
  out.complex = known->complex;
  out.data = static_cast<char*>(data);
  out.device = {device_type == gpu_, device_index};
  return out.fits(offset, storage_size);
}

void TorchAbi::mark_written(PyObject* tensor) const {
  if (fast_) {
    bump_version_(handle_of(tensor));
  } else {
    py::module_::import("torch.autograd.graph").attr("increment_version")(py::handle(tensor));
  }
}

}  // namespace adamprox
