// The scalars of a step made where the tensors are: the step count lies there, or what they are made
// of does (a learning rate that a scheduler writes to, a loss scale), and the host does not wait to
// read it. It is the arithmetic of step_scalars.h, so the bits are those that the host would get.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "step_scalars.h"

namespace adamprox {

HOST_DEVICE double read(const Number& number) {
  double result = number.value;
  if (number.at != nullptr) {
    with_dtype(static_cast<DType>(number.dtype), [&](auto type) {
      using T = typename decltype(type)::type;
      result = Convert<T>::widen(*static_cast<const T*>(number.at));
    });
  }
  return result;
}

HOST_DEVICE Scalars make_scalars(Decay decay, const Recipe& r, double loss_scale) {
  if (r.step.at == nullptr) return r.given;
  const HyperParameters hyper{
      read(r.lr),           read(r.beta1),      read(r.beta2),       read(r.eps),
      read(r.weight_decay), read(r.initial_lr), r.decay_by_schedule, r.maximize};
  BiasCorrections bias;
  bias.update(hyper, read(r.step) + 1);
  Scalars scalars = step_scalars(decay, hyper, bias);
  scalars.grad_scale = scalars.grad_scale / loss_scale;
  return scalars;
}

HOST_DEVICE void count_step(const Recipe& r) {
  with_dtype(static_cast<DType>(r.step.dtype), [&](auto type) {
    using T = typename decltype(type)::type;
    auto* counter = static_cast<T*>(const_cast<void*>(r.step.at));
    *counter = Convert<T>::narrow(static_cast<Compute<T>>(read(r.step) + 1));
  });
}

// Follows all recipes and counts the step; `worker` is one of `workers` threads, all of which call
// it, and `barrier` holds them together.
template <typename Barrier>
HOST_DEVICE void prepare(Decay decay, const RecipesHead& head, PreparedHead& prepared, int worker,
                         int workers, Barrier barrier) {
  const auto* recipes = reinterpret_cast<const Recipe*>(&head + 1);
  auto* scalars = reinterpret_cast<Scalars*>(&prepared + 1);
  const bool skip = read(head.found_inf) != 0;
  const double loss_scale = read(head.loss_scale);
  if (worker == 0) prepared.skip = skip;
  for (int64_t i = worker; i < head.count; i += workers) {
    scalars[i] = make_scalars(decay, recipes[i], loss_scale);
  }
  barrier();  // every count has been read
  for (int64_t i = worker; i < head.count && !skip; i += workers) {
    if (recipes[i].counts) count_step(recipes[i]);
  }
}

}  // namespace adamprox
