// From run-time tags to template arguments: f receives a Type<...> for each tag.
#pragma once

#include <stdexcept>

#include "convert.h"
#include "decay.h"
#include "tensor_table.h"

namespace adamprox {

template <typename T>
struct Type {
  using type = T;
};

template <typename F>
void with_rule(Decay decay, F&& f) {
  switch (decay) {
    case Decay::kCoupled:
      return f(Type<Coupled>{});
    case Decay::kDecoupled:
      return f(Type<Decoupled>{});
    case Decay::kProxSqL2:
      return f(Type<ProxSqL2>{});
    case Decay::kProxL1:
      return f(Type<ProxL1>{});
    case Decay::kProxL2:
      return f(Type<ProxL2>{});
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

// States have the param's type, or float32 for the 16-bit ones.
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
