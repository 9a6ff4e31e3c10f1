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

// The least number of that type that is not below x; infinity is one.
HOST_DEVICE double round_up(double x, DType type) {
  using std::ceil;
  const int digits = type == DType::kFloat32 ? 24 : type == DType::kBFloat16 ? 8 : 11;
  const int least_exponent = type == DType::kFloat16 ? -14 : -126;
  const int exponent = static_cast<int>((bit_cast<uint64_t>(x) >> 52) & 0x7ff) - 1023;
  if (type == DType::kFloat64 || exponent == 1024) return x;  // infinite, or NaN
  const int of_unit = (exponent > least_exponent ? exponent : least_exponent) - (digits - 1);
  const auto unit = bit_cast<double>(static_cast<uint64_t>(of_unit + 1023) << 52);
  const double up = ceil(x / unit) * unit;
  const double largest = type == DType::kFloat32    ? 0x1.fffffep+127
                         : type == DType::kBFloat16 ? 0x1.fep+127
                                                    : 65504.0;
  return up > largest ? INFINITY : up < -largest ? -largest : up;
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
