// The decay rules, one small struct each: `couple` puts decay into the gradient, `apply` steps the
// param by Adam's update and decays it. With z = param - update and the decay strength s:
//
//   Coupled    Adam        param <- z, grad having become grad + k * param     k = weight_decay
//   Decoupled  AdamW       param <- (1 - s) * param - update                   k = s
//   ProxSqL2   AdamProx    param <- z / (1 + s)                                k = s / (1 + s)
//   ProxL1     AdamProxL1  param <- sign(z) * max(abs(z) - s, 0)               k = s
//   ProxL2     AdamProxL2  param <- max(1 - s / norm(z), 0) * z                k = s
//
// `decay` is k. A factor close to 1 is applied as a subtraction, so that param is rounded once.
#pragma once

#include <cmath>

#include "host_device.h"

namespace adamprox {

struct Rule {
  template <typename T>
  static HOST_DEVICE T couple(T grad, T /*param*/, T /*decay*/) {
    return grad;
  }
};

struct Coupled : Rule {
  template <typename T>
  static HOST_DEVICE T couple(T grad, T param, T decay) {
    return grad + decay * param;
  }
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*decay*/) {
    return param - update;
  }
};

struct Decoupled : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T decay) {
    return param - (update + decay * param);
  }
};

struct ProxSqL2 : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T decay) {
    return param - (update + decay * (param - update));
  }
};

template <typename T>
HOST_DEVICE T soft_threshold(T z, T threshold) {
  using std::copysign;
  using std::fabs;
  const T magnitude = fabs(z);
  // Not max(magnitude - threshold, 0): a NaN stays a NaN here, and the loop vectorises.
  return copysign(magnitude <= threshold ? T(0) : magnitude - threshold, z);
}

struct ProxL1 : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T decay) {
    return soft_threshold(param - update, decay);
  }
};

// In two sweeps: z is stored as Adam's param would be, then its blocks shrink by their norms.
struct ProxL2 : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*decay*/) {
    return param - update;
  }

  // The fraction of a block that is taken away: all of it up to norm = s, where both are 0 too.
  static HOST_DEVICE double shrinkage(double sum_of_squares, double strength) {
    using std::sqrt;
    const double norm = sqrt(sum_of_squares);
    return norm <= strength ? 1.0 : strength / norm;
  }

  template <typename T>
  static HOST_DEVICE T shrink(T z, T shrinkage) {
    return z - shrinkage * z;
  }
};

}  // namespace adamprox
