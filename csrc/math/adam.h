// Adam's direction: the moments, and the update that they give.
//
//   exp_avg    <- exp_avg    + (1 - beta1) * (grad        - exp_avg)
//   exp_avg_sq <- exp_avg_sq + (1 - beta2) * (grad * grad - exp_avg_sq)
//   update      = step_size * exp_avg / (sqrt(exp_avg_sq) + eps)
//
// with step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t) and eps already times sqrt(1 - beta2^t):
// the paper's alpha * mhat / (sqrt(vhat) + eps), with both sides of the division multiplied by
// sqrt(1 - beta2^t).
#pragma once

#include <cmath>

#include "host_device.h"

namespace adamprox {

template <typename T>
HOST_DEVICE void update_moment(T& moment, T value, T one_minus_beta) {
  moment = moment + one_minus_beta * (value - moment);
}

template <typename T>
HOST_DEVICE T running_max(T exp_avg_sq) {
  return exp_avg_sq;
}

template <typename T>
HOST_DEVICE T running_max(T exp_avg_sq, T& max_exp_avg_sq) {  // amsgrad
  max_exp_avg_sq = max_exp_avg_sq > exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
  return max_exp_avg_sq;
}

template <typename T>
HOST_DEVICE T adam_denominator(T exp_avg_sq, T eps) {
  using std::sqrt;
  return sqrt(exp_avg_sq) + eps;
}

template <typename T>
HOST_DEVICE T adam_update(T exp_avg, T denominator, T step_size) {
  return (step_size * exp_avg) / denominator;
}

}  // namespace adamprox
