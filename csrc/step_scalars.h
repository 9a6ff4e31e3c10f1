// The scalars of one step, in double, from a param group's hyper-parameters and the step count; on
// the host, or where the tensors are (recipes.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "tensor_table.h"

namespace adamprox {

struct HyperParameters {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double initial_lr;  // decay_by="schedule": the decay follows lr / initial_lr; and for alpha()
  bool decay_by_schedule;
  bool maximize;

  bool operator==(const HyperParameters& o) const {
    return lr == o.lr && beta1 == o.beta1 && beta2 == o.beta2 && eps == o.eps &&
           weight_decay == o.weight_decay && initial_lr == o.initial_lr &&
           decay_by_schedule == o.decay_by_schedule && maximize == o.maximize;
  }
};

// k of decay.h.
HOST_DEVICE double decay_constant(Decay decay, const HyperParameters& h) {
  if (decay == Decay::kCoupled) return h.weight_decay;
  const double eta = h.decay_by_schedule ? h.lr / h.initial_lr : h.lr;
  const double strength = eta * h.weight_decay;
  return decay == Decay::kProxSqL2 ? strength / (1 + strength) : strength;
}

// The learning rate without its schedule. Times 2^-27 it is a normal number, whatever the type.
HOST_DEVICE double alpha(const HyperParameters& h) {
  constexpr double kLeast = 0x1p-99, kMost = 0x1p99;
  const double least = h.initial_lr > kLeast ? h.initial_lr : kLeast;
  return least < kMost ? least : kMost;
}

// base^exponent by squaring, for a whole number: the same bits on a host and on a GPU, whose pow
// differ. The relative error is below exponent * 2^-53.
HOST_DEVICE double power(double base, double exponent) {
  double result = 1;
  for (auto n = static_cast<uint64_t>(exponent); n != 0; n /= 2) {
    if (n % 2 != 0) result = result * base;
    base = base * base;
  }
  return result;
}

// Kept from one param group to the next, which mostly share them: powers are slow.
struct BiasCorrections {
  double beta1 = -1, beta2 = -1, step = -1;
  double correction1 = 0, correction2_sqrt = 0;

  HOST_DEVICE void update(const HyperParameters& h, double at_step) {
    if (h.beta1 == beta1 && h.beta2 == beta2 && at_step == step) return;
    beta1 = h.beta1;
    beta2 = h.beta2;
    step = at_step;
    using std::sqrt;
    correction1 = 1 - power(beta1, step);
    correction2_sqrt = sqrt(1 - power(beta2, step));
  }
};

HOST_DEVICE Scalars step_scalars(Decay decay, const HyperParameters& h,
                                 const BiasCorrections& bias) {
  return {
      1 - h.beta1,
      1 - h.beta2,
      h.lr * bias.correction2_sqrt / bias.correction1,
      h.eps * bias.correction2_sqrt,
      decay_constant(decay, h),
      h.maximize ? -1.0 : 1.0,
      alpha(h),
      bias.step,
  };
}

}  // namespace adamprox
