// The scalars of one step, in double, from a param group's hyper-parameters and the step count.
#pragma once

#include <cmath>

#include "tensor_table.h"

namespace adamprox {

struct HyperParameters {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double initial_lr;  // decay_by="schedule": the decay follows lr / initial_lr
  bool decay_by_schedule;
  bool maximize;
};

// k of decay.h.
inline double decay_constant(Decay decay, const HyperParameters& h) {
  if (decay == Decay::kCoupled) return h.weight_decay;
  const double eta = h.decay_by_schedule ? h.lr / h.initial_lr : h.lr;
  const double strength = eta * h.weight_decay;
  return decay == Decay::kProxSqL2 ? strength / (1 + strength) : strength;
}

// Kept from one param group to the next, which mostly share them: powers are slow.
struct BiasCorrections {
  double beta1 = -1, beta2 = -1, step = -1;
  double correction1 = 0, correction2_sqrt = 0;

  void update(const HyperParameters& h, double at_step) {
    if (h.beta1 == beta1 && h.beta2 == beta2 && at_step == step) return;
    beta1 = h.beta1;
    beta2 = h.beta2;
    step = at_step;
    correction1 = 1 - std::pow(beta1, step);
    correction2_sqrt = std::sqrt(1 - std::pow(beta2, step));
  }
};

inline Scalars step_scalars(Decay decay, const HyperParameters& h, const BiasCorrections& bias) {
  return {
      1 - h.beta1,
      1 - h.beta2,
      h.lr * bias.correction2_sqrt / bias.correction1,
      h.eps * bias.correction2_sqrt,
      decay_constant(decay, h),
      h.maximize ? -1.0 : 1.0,
  };
}

}  // namespace adamprox
