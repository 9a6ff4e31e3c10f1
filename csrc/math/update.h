// One element's update: Adam's direction composed with a decay rule, for host and device.
#pragma once

#include "adam.h"
#include "decay.h"

namespace adamprox {

template <typename Rule, typename T>
struct Update {
  T one_minus_beta1, one_minus_beta2, step_size, eps, grad_scale, decay[kDecayConstants];

  explicit HOST_DEVICE Update(const Scalars& s)
      : one_minus_beta1(static_cast<T>(s.one_minus_beta1)),
        one_minus_beta2(static_cast<T>(s.one_minus_beta2)),
        step_size(static_cast<T>(s.step_size)),
        eps(static_cast<T>(s.eps)),
        grad_scale(static_cast<T>(s.grad_scale)) {
    for (int i = 0; i < kDecayConstants; ++i) decay[i] = static_cast<T>(s.decay[i]);
  }

  // With a fifth argument, max_exp_avg_sq, it is amsgrad's.
  template <typename... Max>
  HOST_DEVICE void operator()(T& param, T& grad, T& exp_avg, T& exp_avg_sq,
                              Max&... max_exp_avg_sq) const {
    const T g = Rule::couple(grad_scale * grad, param, decay);
    update_moment(exp_avg, g, one_minus_beta1);
    update_moment(exp_avg_sq, g * g, one_minus_beta2);
    const T denominator = adam_denominator(running_max(exp_avg_sq, max_exp_avg_sq...), eps);
    param = Rule::apply(param, adam_update(exp_avg, denominator, step_size), denominator, decay);
  }
};

template <typename T>
struct Shrink {
  T shrinkage;
  HOST_DEVICE void operator()(T& param) const { param = ProxL2::shrink(param, shrinkage); }
};

}  // namespace adamprox
