// The decay rules, one small struct each: `couple` puts decay into the gradient, `apply` steps the
// param by Adam's update and decays it. With z = param - update, the decay strength s, Adam's denominator
// D = sqrt(exp_avg_sq) + eps, and c = sqrt(1 - beta2^t):
//
//   Coupled         Adam        param <- z, grad having become grad + k * param     k = weight_decay
//   Decoupled       AdamW       param <- (1 - s) * param - update                   k = s
//   Cautious        AdamW       the same, where update and param do not differ in sign; else z
//   ProxSqL2        AdamProx    param <- z / (1 + s)                                k = s / (1 + s)
//   ProxSqL2Metric  AdamProx    param <- z / (1 + s * c / D)                        k = s * c
//   ProxL1          AdamProxL1  param <- sign(z) * max(abs(z) - s, 0) / (1 + s2)    k = s, s2 / (1 + s2)
//   ProxL1Metric    AdamProxL1  the same with s * c / D and s2 * c / D              k = s * c, s2 * c
//   ProxL2          AdamProxL2  block <- max(1 - s / norm(z), 0) * z                k = s, 1 or 0
//
// s2 is of `l2` what s is of weight_decay. The elementwise proximal rules clamp the result to `bounds`,
// which are k[2] and k[3]. In Adam's metric they are the prox in the norm that D / (c * lr) weighs.
// ProxL2's z and norm are a block's, and its s is times the root of the block's size where k[1] is 1.
//
// A rule's constants k are made by `constants`, once a step, in double. A factor close to 1 is applied
// as a subtraction, so that param is rounded once.
#pragma once

#include <cmath>

#include "scalars.h"

namespace adamprox {

// A line each: the struct, what a param group's "decay" says, and the switch that must be on as well.
#define ADAMPROX_RULES(RULE)                  \
  RULE(Coupled, "coupled", kAlways)           \
  RULE(Decoupled, "decoupled", kAlways)       \
  RULE(Cautious, "decoupled", kCautious)      \
  RULE(ProxSqL2, "prox_sq_l2", kAlways)       \
  RULE(ProxSqL2Metric, "prox_sq_l2", kMetric) \
  RULE(ProxL1, "prox_l1", kAlways)            \
  RULE(ProxL1Metric, "prox_l1", kMetric)      \
  RULE(ProxL2, "prox_l2", kAlways)

enum class Decay : uint8_t {
#define RULE(name, decay, flag) k##name,
  ADAMPROX_RULES(RULE)
#undef RULE
};

struct RuleKey {
  const char *name, *decay;
  int flag;
};
constexpr RuleKey kRuleKeys[] = {
#define RULE(name, decay, flag) {#name, decay, flag},
    ADAMPROX_RULES(RULE)
#undef RULE
};
constexpr int kRules = sizeof(kRuleKeys) / sizeof(RuleKey);

struct Rule {
  using Plain = void;
  static HOST_DEVICE void constants(const Strengths& s, double* k) { k[0] = s.decay; }

  template <typename T>
  static HOST_DEVICE T couple(T grad, T /*param*/, const T* /*k*/) {
    return grad;
  }
};

struct Coupled : Rule {
  static HOST_DEVICE void constants(const Strengths& s, double* k) { k[0] = s.weight_decay; }
  template <typename T>
  static HOST_DEVICE T couple(T grad, T param, const T* k) {
    return grad + k[0] * param;
  }
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*denominator*/, const T* /*k*/) {
    return param - update;
  }
};

struct Decoupled : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*denominator*/, const T* k) {
    return param - (update + k[0] * param);
  }
};

// Decay must not undo what the update does (arXiv 2510.12402).
struct Cautious : Rule {
  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*denominator*/, const T* k) {
    const bool opposite = (update > 0 && param < 0) || (update < 0 && param > 0);
    return param - (opposite ? update : update + k[0] * param);
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

// The elementwise proximal rules: of the l1 norm or not, in Adam's metric or not. kPlain: without l2 and
// bounds, which then change no bit; for the CPU, where 16-bit params would feel them.
template <bool kL1, bool kInMetric, bool kPlain = false>
struct Prox : Rule {
  using Plain = Prox<kL1, kInMetric, true>;
  static HOST_DEVICE bool is_plain(const double* k) {
    return k[1] == 0 && k[2] == -INFINITY && k[3] == INFINITY;
  }
  static HOST_DEVICE void constants(const Strengths& s, double* k) {
    k[0] = kInMetric ? s.decay * s.root : kL1 ? s.decay : s.decay / (1 + s.decay);
    k[1] = kInMetric ? s.l2 * s.root : s.l2 / (1 + s.l2);
    k[2] = s.low;
    k[3] = s.high;
  }

  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T denominator, const T* k) {
    const auto share = [=](T of) { return kInMetric ? of / (denominator + of) : of; };
    T x;
    if constexpr (kL1) {
      x = soft_threshold(param - update, kInMetric ? k[0] / denominator : k[0]);
      if constexpr (!kPlain) x = k[1] == 0 ? x : x - share(k[1]) * x;
    } else {
      x = param - (update + share(k[0]) * (param - update));
    }
    if constexpr (kPlain) return x;
    x = k[2] > x ? k[2] : x;  // in one instruction; a NaN stays a NaN
    return k[3] < x ? k[3] : x;
  }
};
using ProxSqL2 = Prox<false, false>;
using ProxSqL2Metric = Prox<false, true>;
using ProxL1 = Prox<true, false>;
using ProxL1Metric = Prox<true, true>;

// In two sweeps: z is stored as Adam's param would be, then its blocks shrink by their norms.
struct ProxL2 : Rule {
  static HOST_DEVICE void constants(const Strengths& s, double* k) {
    k[0] = s.decay;
    k[1] = s.by_size ? 1 : 0;
  }

  template <typename T>
  static HOST_DEVICE T apply(T param, T update, T /*denominator*/, const T* /*k*/) {
    return param - update;
  }

  // The fraction of a block of so many reals that is taken away: all of it up to norm = s, where both are
  // 0 too.
  static HOST_DEVICE double shrinkage(double sum_of_squares, const double* k, int64_t numel) {
    using std::sqrt;
    const double norm = sqrt(sum_of_squares);
    const double strength = k[1] == 0 ? k[0] : k[0] * sqrt(static_cast<double>(numel));
    return norm <= strength ? 1.0 : strength / norm;
  }

  template <typename T>
  static HOST_DEVICE T shrink(T z, T shrinkage) {
    return z - shrinkage * z;
  }
};

// Whether a rule takes norms of blocks, so that the param has a second sweep.
HOST_DEVICE constexpr bool has_blocks(Decay rule) { return rule == Decay::kProxL2; }

// Whether a rule has bounds, as k[2] and k[3].
HOST_DEVICE constexpr bool has_bounds(Decay rule) {
  return rule >= Decay::kProxSqL2 && rule <= Decay::kProxL1Metric;
}

}  // namespace adamprox
