#include "tensor_reader.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace adamprox {
namespace {

namespace py = pybind11;

const dlpack::ExchangeApi* exchange_api() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    throw py::import_error("adamprox needs torch >= 2.10 (DLPack's C exchange interface)");
  }
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = capsule.get_pointer<dlpack::ExchangeApi>();
  while (api != nullptr && api->major > 1) api = api->previous;
  if (api == nullptr || api->major != 1 || api->tensor_from_object == nullptr) {
    throw py::import_error("this torch offers no DLPack exchange interface of major version 1");
  }
  return api;
}

void* cdata(const py::object& object) { return PyLong_AsVoidPtr(object.attr("_cdata").ptr()); }

// A new tensor to try something on, whatever the defaults are.
py::object empty(const py::tuple& sizes, const char* dtype = "float32",
                 const char* device = "cpu") {
  using py::arg;
  const py::module_ torch = py::module_::import("torch");
  return torch.attr("empty")(sizes, arg("dtype") = torch.attr(dtype), arg("device") = device);
}
py::object three() { return empty(py::make_tuple(3)); }

py::object parameter() { return py::module_::import("torch.nn").attr("Parameter")(three()); }

// An object of torch's begins with these, and more.
using Words = std::array<const void*, 8>;

// Where `word` is among them, in bytes, or -1.
ptrdiff_t find(const void* object, const void* word) {
  Words words;
  std::memcpy(&words, object, sizeof(words));
  const auto found = std::find(words.begin(), words.end(), word);
  return found != words.end() ? (found - words.begin()) * sizeof(word) : -1;
}

bool is_supported(const dlpack::Tensor& t) {
  const auto [code, bits, lanes] = t.dtype;
  const bool known_type = (code == dlpack::kBFloat && bits == 16) ||
                          (code == dlpack::kFloat && (bits == 16 || bits == 32 || bits == 64)) ||
                          (code == dlpack::kComplex && (bits == 64 || bits == 128));
  const bool known_device = t.device.type == dlpack::kCPU || t.device.type == dlpack::kCUDA ||
                            t.device.type == dlpack::kROCm;
  return known_type && lanes == 1 && known_device;
}

}  // namespace

// While it lives, new tensors are no inference tensors, which lack a version.
class TensorReader::UsualMode {
 public:
  UsualMode() : mode_(py::module_::import("torch").attr("inference_mode")(false)) {
    mode_.attr("__enter__")();
  }
  ~UsualMode() { mode_.attr("__exit__")(py::none(), py::none(), py::none()); }

 private:
  const py::object mode_;
};

TensorReader::TensorReader() : TensorReader(UsualMode()) {}

TensorReader::TensorReader(const UsualMode&) : dlpack_(exchange_api()), stable_(find_stable_abi()) {
  if (!stable_.found) return;
  find_grads();
  // Words have bits that nobody sets, and new tensors those of what was freed where they lie. The
  // tensors tried before are kept, so that others lie elsewhere.
  py::list tried;
  while (reads_grads() && !recognises_ && tried.size() < 16) recognises_ = find_words(tried);
  if (recognises_) find_memory();
}

void* TensorReader::current_stream(const dlpack::Device& device) const {
  void* stream = nullptr;
  if (dlpack_->current_stream(device.type, device.id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

void TensorReader::mark_written(PyObject* tensor) const {
  if (marks_without_python()) {
    stable_.bump_version(handle_of(tensor));
  } else {
    const py::module_ graph = py::module_::import("torch.autograd.graph");
    graph.attr("increment_version")(py::handle(tensor));
  }
}

bool TensorReader::read_dlpack(PyObject* tensor, dlpack::Tensor& out) const {
  if (dlpack_->tensor_from_object(tensor, &out) != 0) {  // sparse, on the meta device, ...
    PyErr_Clear();
    return false;
  }
  return is_supported(out);
}

TensorReader::StableAbi TensorReader::find_stable_abi() {
  StableAbi abi;
  const char* wish = std::getenv("ADAMPROX_TENSOR_READER");
  if (wish != nullptr && std::strcmp(wish, "dlpack") == 0) return abi;
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
  if (library == nullptr) return abi;
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    complete &= symbol != nullptr;
    std::memcpy(&function, &symbol, sizeof(symbol));
  };
  const auto constant = [&](int32_t& value, const char* name) {
    int32_t (*function)();
    find(function, name);
    if (function != nullptr) value = function();
  };
  find(abi.layout, "aoti_torch_get_layout");
  find(abi.data, "aoti_torch_get_data_ptr");
  find(abi.dim, "aoti_torch_get_dim");
  find(abi.sizes, "aoti_torch_get_sizes");
  find(abi.strides, "aoti_torch_get_strides");
  find(abi.dtype, "aoti_torch_get_dtype");
  find(abi.device_type, "aoti_torch_get_device_type");
  find(abi.device_index, "aoti_torch_get_device_index");
  constant(abi.strided, "aoti_torch_layout_strided");
  constant(abi.cpu, "aoti_torch_device_type_cpu");
  constant(abi.cuda, "aoti_torch_device_type_cuda");
  constant(abi.dtypes[0].number, "aoti_torch_dtype_float32");
  constant(abi.dtypes[1].number, "aoti_torch_dtype_bfloat16");
  constant(abi.dtypes[2].number, "aoti_torch_dtype_float16");
  constant(abi.dtypes[3].number, "aoti_torch_dtype_float64");
  constant(abi.dtypes[4].number, "aoti_torch_dtype_complex64");
  constant(abi.dtypes[5].number, "aoti_torch_dtype_complex128");
  abi.dtypes[0].type = {dlpack::kFloat, 32, 1};
  abi.dtypes[1].type = {dlpack::kBFloat, 16, 1};
  abi.dtypes[2].type = {dlpack::kFloat, 16, 1};
  abi.dtypes[3].type = {dlpack::kFloat, 64, 1};
  abi.dtypes[4].type = {dlpack::kComplex, 64, 1};
  abi.dtypes[5].type = {dlpack::kComplex, 128, 1};

  const py::module_ torch = py::module_::import("torch");
  const bool is_amd = !torch.attr("version").attr("hip").is_none();
  abi.gpu = is_amd ? dlpack::kROCm : dlpack::kCUDA;
  const py::object plain = three(), param = parameter();
  const auto handle_holds = [](const py::object& tensor) {
    return implementation(handle_of(tensor.ptr())) == cdata(tensor);
  };
  abi.found = complete && handle_holds(plain) && handle_holds(param);
  if (abi.found) find_bump_version(abi, library);
  return abi;
}

// Finds the words, and whether those of two tensors differ with all that they must tell, and with
// nothing else. The tensors have five dims, so that there are no unused words.
bool TensorReader::find_words(py::list& tried) {
  const py::tuple sizes_of_5 = py::make_tuple(4, 2, 3, 3, 2);
  const py::object usual = empty(sizes_of_5), written = empty(sizes_of_5);
  tried.append(usual);
  tried.append(written);
  int64_t* sizes;
  if (stable_.sizes(handle_of(usual.ptr()), &sizes) != 0) return false;
  const auto* begin = reinterpret_cast<char*>(sizes) - sizeof(int64_t);  // how many they are
  words_begin_ = begin - static_cast<char*>(implementation(handle_of(usual.ptr())));
  if (words_begin_ < 0 || words_begin_ > 128) return false;
  const auto differs = [this](const py::object& one, const py::object& other) {
    SeenTensor seen;
    see(one.ptr(), seen);
    return !same_words(cdata(other), *seen.words);
  };
  written.attr("grad") = usual;
  written.attr("zero_")();
  const auto from = [&](int begin) { return usual.attr("narrow")(0, begin, 2); };
  const py::object negated = py::module_::import("torch").attr("_neg_view")(usual);
  return !differs(usual, written) && differs(usual, empty(sizes_of_5, "float64")) &&
         differs(usual, empty(sizes_of_5, "float32", "meta")) && differs(usual, negated) &&
         differs(usual, empty(py::make_tuple(2, 4, 3, 3, 2))) &&
         differs(usual, empty(py::make_tuple(4, 2, 3, 3, 2, 1))) &&
         differs(usual, usual.attr("transpose")(2, 3)) && differs(from(0), from(1));
}

// Where autograd's data is: what a tensor points to once it has a grad. The grad is tried then, of
// another tensor too, and where there is none.
void TensorReader::find_grads() {
  const py::object tensor = three(), grad = three(), param = parameter();
  const void* object = cdata(tensor);
  const auto before = at<Words>(object, 0);
  tensor.attr("grad") = grad;
  const auto after = at<Words>(object, 0);
  size_t i = 0;
  while (i < before.size() && !(before[i] == nullptr && after[i] != nullptr)) ++i;
  if (i == before.size()) return;
  places_.autograd = i * sizeof(void*);
  places_.grad = find(after[i], cdata(grad));
  if (places_.grad < 0) return;
  tensor.attr("grad") = py::none();
  places_.undefined = at<void*>(after[i], places_.grad);
  param.attr("grad") = grad;
  void* handle = this->grad(param.ptr());
  places_.grads_found = this->grad(tensor.ptr()) == nullptr && this->grad(grad.ptr()) == nullptr &&
                        handle != nullptr && implementation(handle) == cdata(grad);
}

// Where the storage is, and the address in it. A lazy clone shares the memory with its original; when
// one of them is written to, torch gives it a copy. That this shows is tried.
void TensorReader::find_memory() {
  const py::object tensor = three();
  if (!py::hasattr(tensor, "_lazy_clone")) return;
  const void* storage = cdata(tensor.attr("untyped_storage")());
  void* data;
  if (stable_.data(handle_of(tensor.ptr()), &data) != 0 || data == nullptr) return;
  const ptrdiff_t place = find(cdata(tensor), storage);
  places_.memory = find(storage, data);
  if (place <= 0 || places_.memory < 0) return;
  places_.storage = place;
  SeenTensor seen;
  see(tensor.ptr(), seen);
  const bool works = same_memory(seen);
  const py::object clone = tensor.attr("_lazy_clone")();
  if (!works || same_memory(seen)) places_.storage = 0;
}

void TensorReader::see_handle(void* handle, SeenTensor& seen) {
  seen.implementation = implementation(handle);
  const char* bytes = static_cast<char*>(seen.implementation);
  LayoutWords words{};
  for_each_word(bytes, [&](size_t i, uint64_t word) { words[i] = word; });
  seen.words = &*layouts_.insert(words).first;
  see_address(handle, seen);
}

void TensorReader::see_address(void* handle, SeenTensor& seen) const {
  seen.implementation = implementation(handle);
  if (stable_.data(handle, &seen.data) != 0) seen.data = nullptr;
  // After a vtable and a reference count.
  const auto pointers = at<std::array<const void*, 4>>(seen.implementation, 2 * sizeof(void*));
  seen.hints = {pointers[0], pointers[1], pointers[1] != nullptr ? pointers[3] : nullptr};
  if (places_.storage == 0) return;
  seen.hints[0] = at<void*>(seen.implementation, places_.storage);
  seen.memory = at<MemoryWords>(seen.hints[0], places_.memory);
}

// It is tried on a tensor before it is trusted.
void TensorReader::find_bump_version(StableAbi& abi, void* library) {
  void* symbol = dlsym(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
  std::memcpy(&abi.bump_version, &symbol, sizeof(symbol));
  if (abi.bump_version == nullptr) return;
  const py::object tensor = three();
  const auto version = [&] { return tensor.attr("_version").cast<int64_t>(); };
  const int64_t before = version();
  abi.bump_version(handle_of(tensor.ptr()));
  if (version() != before + 1) abi.bump_version = nullptr;
}

}  // namespace adamprox
