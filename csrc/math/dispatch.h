// From run-time tags to template arguments: f receives a Type<...> for each tag.
#pragma once

#include "convert.h"
#include "decay.h"

namespace adamprox {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

HOST_DEVICE constexpr int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

HOST_DEVICE constexpr DType compute_type(DType type) {
  return type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
HOST_DEVICE void with_rule(Decay decay, F&& f) {
  switch (decay) {
#define RULE(name, decay, flag) \
  case Decay::k##name:          \
    return f(Type<name>{});
    ADAMPROX_RULES(RULE)
#undef RULE
  }
}

template <typename F>
HOST_DEVICE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat64:
      return f(Type<double>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
    case DType::kFloat16:
      return f(Type<Half>{});
  }
}

// Moments have the param's type, or float32 for the 16-bit ones.
template <typename F>
HOST_DEVICE void with_dtypes(DType param_dtype, DType state_dtype, F&& f) {
  with_dtype(param_dtype, [&](auto param) {
    if constexpr (sizeof(typename decltype(param)::type) == 2) {
      if (state_dtype == DType::kFloat32) return f(param, Type<float>{});
    }
    f(param, param);
  });
}

}  // namespace adamprox
