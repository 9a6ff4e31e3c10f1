// How a step's scalars are made: on the host, or where the tensors are, if the step count lies there or
// what they are made of does (a learning rate that a scheduler writes to, a loss scale). The device
// follows recipes with the host's arithmetic, so the bits are those that the host would get.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace adamprox {

// `dtype`: the param's, to whose numbers bounds are rounded inwards.
HOST_DEVICE Scalars make_scalars(Decay rule, const HyperParameters& h, const BiasCorrections& bias,
                                 double loss_scale, DType dtype) {
  Scalars scalars = step_scalars(h, bias, loss_scale);
  double* k = scalars.decay;
  with_rule(rule, [&](auto type) { decltype(type)::type::constants(Strengths(h, bias), k); });
  if (has_bounds(rule)) {
    k[2] = round_up(k[2], dtype);
    k[3] = -round_up(-k[3], dtype);
  }
  return scalars;
}

// A number that the host knows, or one that is read where it lies.
struct Value {
  double value;
  const void* at;  // null: `value`
  int64_t dtype;   // the DType of what lies there
};

// The values of a param group.
struct GroupRecipe {
  Value number[kNumbers];
  uint8_t flag[kFlags];
  Decay rule;
};
static_assert(sizeof(GroupRecipe) % 8 == 0, "Triton reads it as words");

// One of the scalars: whose values it has, and the step count before this step, which it counts.
struct ScalarsRecipe {
  void* step;
  int32_t group;
  int16_t dtype, param_dtype;
};

// What a payload with recipes has behind the grads: this, GroupRecipe[], ScalarsRecipe[].
struct RecipesHead {
  Value loss_scale;
  Value found_inf;  // not 0: nothing is to be stepped, and no step counted
  int64_t num_groups, num_scalars;

  HOST_DEVICE const GroupRecipe* groups() const {
    return reinterpret_cast<const GroupRecipe*>(this + 1);
  }
  HOST_DEVICE const ScalarsRecipe* scalars() const {
    return reinterpret_cast<const ScalarsRecipe*>(groups() + num_groups);
  }
};

// What prepare() makes of the recipes: this and Scalars[].
struct PreparedHead {
  int64_t skip;

  HOST_DEVICE Scalars* scalars() { return reinterpret_cast<Scalars*>(this + 1); }
};

HOST_DEVICE double read(const Value& number) {
  double result = number.value;
  if (number.at != nullptr) {
    with_dtype(static_cast<DType>(number.dtype), [&](auto type) {
      using T = typename decltype(type)::type;
      result = Convert<T>::widen(*static_cast<const T*>(number.at));
    });
  }
  return result;
}

HOST_DEVICE double next_step(const ScalarsRecipe& r) { return read({0, r.step, r.dtype}) + 1; }

HOST_DEVICE void count_step(const ScalarsRecipe& r) {
  with_dtype(static_cast<DType>(r.dtype), [&](auto type) {
    using T = typename decltype(type)::type;
    *static_cast<T*>(r.step) = Convert<T>::narrow(static_cast<Compute<T>>(next_step(r)));
  });
}

// Follows all recipes and counts the steps; `worker` is one of `workers` threads, all of which call it.
HOST_DEVICE void prepare(const RecipesHead& head, PreparedHead& prepared, int worker, int workers) {
  const bool skip = read(head.found_inf) != 0;
  const double loss_scale = read(head.loss_scale);
  if (worker == 0) prepared.skip = skip;
  for (int64_t i = worker; i < head.num_scalars; i += workers) {
    const ScalarsRecipe& recipe = head.scalars()[i];
    const GroupRecipe& group = head.groups()[recipe.group];
    HyperParameters h;
    for (int n = 0; n < kNumbers; ++n) h.number[n] = read(group.number[n]);
    for (int f = 0; f < kFlags; ++f) h.flag[f] = group.flag[f] != 0;
    BiasCorrections bias;
    bias.update(h, next_step(recipe));
    prepared.scalars()[i] =
        make_scalars(group.rule, h, bias, loss_scale, static_cast<DType>(recipe.param_dtype));
    if (!skip) count_step(recipe);
  }
}

}  // namespace adamprox
