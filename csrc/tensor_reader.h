// Reads where a tensor's memory lies, without linking libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <iterator>
#include <set>

#include "layout.h"

namespace adamprox {

// What a tensor's implementation says of how it lies in memory: how many dims there are and what
// comes after sizes and strides; then these, by dim.
constexpr size_t kMostSeenDims = 5;  // whose sizes lie in the implementation
using LayoutWords = std::array<uint64_t, 5 + 2 * kMostSeenDims>;

// What a storage says of its memory: address, owner and deleter.
using MemoryWords = std::array<uint64_t, 3>;

// A tensor that was read, as it lay in memory: see TensorReader::is_as_seen().
struct SeenTensor {
  const PyTypeObject* type = nullptr;
  void* implementation = nullptr;  // null: none was seen
  // What it seemed to point to: its storage; of a param, autograd's data and the version.
  std::array<const void*, 3> hints{};
  const LayoutWords* words = nullptr;  // the reader's, one for all tensors that have the same
  void* data = nullptr;                // its address, if any; and what the storage said then:
  MemoryWords memory{};
};

// torch publishes two C interfaces. DLPack's exchange API takes a Python object and serves always.
// The stable C ABI of libtorch is three times as fast but takes a tensor's address, which is the
// first field after a Python object's head: that is verified against `_cdata` when this is made,
// and where it does not hold, DLPack it is.
class TensorReader {
 public:
  TensorReader();

  // Reads a torch.Tensor (the caller has checked that its memory is its own). False, without an
  // exception, for one that has no strided memory of floating-point numbers on a CPU or a GPU.
  bool read(PyObject* tensor, dlpack::Tensor& out) const {
    return stable_.found ? read_stable(handle_of(tensor), out) : read_dlpack(tensor, out);
  }

  // The handle of tensor.grad, of which no Python object is made, where reads_grads(); or null.
  void* grad(PyObject* tensor) const {
    char* autograd = at<char*>(implementation(handle_of(tensor)), places_.autograd);
    if (autograd == nullptr) return nullptr;
    void* handle = autograd + places_.grad;
    return implementation(handle) != places_.undefined ? handle : nullptr;
  }
  bool reads_grads() const { return places_.grads_found; }
  bool read_handle(void* handle, dlpack::Tensor& out) const { return read_stable(handle, out); }

  // A tensor is known again by the words of its implementation that say how it lies in memory: its
  // sizes and strides, up to five of them, its offset, dtype, device, layout and lazy bits. Where
  // these are as they were seen, read() would answer as it did then, but for the address.
  // (The words end with the dispatch keys, which are what torch has at the end.)
  bool recognises() const { return recognises_; }
  void see_handle(void* handle, SeenTensor& seen);
  void see(PyObject* tensor, SeenTensor& seen) {
    seen.type = Py_TYPE(tensor);
    see_handle(handle_of(tensor), seen);
  }
  // A handle may have another tensor, and the memory be elsewhere: grads are new after a backward.
  bool handle_is_as_seen(void* handle, SeenTensor& seen, void*& data) const {
    const void* object = implementation(handle);
    if (!same_words(object, *seen.words)) return false;
    if (object != seen.implementation || !same_memory(seen)) see_address(handle, seen);
    data = seen.data;
    return data != nullptr;
  }
  bool is_as_seen(PyObject* tensor, SeenTensor& seen, void*& data) const {
    return tensor != nullptr && Py_TYPE(tensor) == seen.type &&
           implementation(handle_of(tensor)) == seen.implementation &&
           handle_is_as_seen(handle_of(tensor), seen, data);
  }

  // Tells autograd of a write, as torch's in-place operations do: backward through an older value
  // is an error then.
  void mark_written(PyObject* tensor) const;
  bool marks_without_python() const { return stable_.bump_version != nullptr; }

  void* current_stream(const dlpack::Device& device) const;

  const char* interface() const { return stable_.found ? "stable ABI" : "DLPack"; }

 private:
  struct StableAbi {
    bool found = false;
    // A function of C++, not of the ABI: null where it is not found or does not work.
    void (*bump_version)(void* handle) = nullptr;
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

  template <typename T>
  static T at(const void* object, ptrdiff_t place) {
    T result;
    std::memcpy(&result, static_cast<const char*>(object) + place, sizeof(result));
    return result;
  }
  static void* implementation(const void* handle) { return at<void*>(handle, 0); }

  // Where a tensor's implementation points to its storage and to autograd's data, and what is where
  // in these, in bytes. Calls into torch for the same took a sixth of the time of a step on many small
  // tensors.
  struct Places {
    ptrdiff_t storage = 0, memory = 0;  // storage 0: not found; a vtable is there, and never seen
    bool grads_found = false;
    ptrdiff_t autograd = 0, grad = 0;
    const void* undefined = nullptr;  // what is there instead of a grad
  };

  // Calls f(its place in LayoutWords, word) for every word that is in use.
  template <typename F>
  void for_each_word(const void* implementation, F f) const {
    constexpr size_t kMostDims = kMostSeenDims;
    const auto word = [&](size_t i) {
      return at<uint64_t>(implementation, words_begin_ + i * sizeof(uint64_t));
    };
    const uint64_t dims = word(0);
    f(0, dims);
    for (size_t i = 1; i <= 4; ++i) f(i, word(2 * kMostDims + i));
    for (size_t dim = 0; dim < kMostDims && dim < dims; ++dim) {
      f(5 + 2 * dim, word(1 + dim));
      f(6 + 2 * dim, word(1 + kMostDims + dim));
    }
  }
  bool same_words(const void* implementation, const LayoutWords& words) const {
    uint64_t difference = 0;
    for_each_word(implementation, [&](size_t i, uint64_t word) { difference |= word ^ words[i]; });
    return difference == 0;
  }

  // A storage whose memory is still the one that the tensor had. (Where memory is shared until one
  // of its tensors is written to, it has another owner.)
  bool same_memory(const SeenTensor& seen) const {
    const void* storage = at<void*>(seen.implementation, places_.storage);
    if (storage != seen.hints[0]) return false;
    const auto words = at<MemoryWords>(storage, places_.memory);
    return ((words[0] ^ seen.memory[0]) | (words[1] ^ seen.memory[1]) |
            (words[2] ^ seen.memory[2])) == 0;
  }

  class UsualMode;
  explicit TensorReader(const UsualMode&);
  static StableAbi find_stable_abi();
  static void find_bump_version(StableAbi& abi, void* library);
  void find_grads();
  bool find_words(pybind11::list& tried);
  void find_memory();
  void see_address(void* handle, SeenTensor& seen) const;
  bool read_stable(void* handle, dlpack::Tensor& out) const;
  bool read_dlpack(PyObject* tensor, dlpack::Tensor& out) const;

  const dlpack::ExchangeApi* dlpack_;
  const StableAbi stable_;
  Places places_;
  ptrdiff_t words_begin_ = 0;
  std::set<LayoutWords> layouts_;  // so that what is compared with is little, and stays cached
  bool recognises_ = false;
};

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
