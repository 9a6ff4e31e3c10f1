// What a step is made of, a line each: the states of a param and the values of a param group; and the
// scalars of one step that follow from those values and the step count. For host and device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace adamprox {

// The numbers of a param group. `item`: which one of a pair; `optional`: the key may be missing, or
// its value None. Then the number is `missing`, but initial_lr is lr. kBlock: the rows of a block, or
// one of the names below.
enum Number {
  kLr,
  kBeta1,
  kBeta2,
  kEps,
  kWeightDecay,
  kInitialLr,
  kEmaDecay,
  kL2,
  kLow,
  kHigh,
  kBlock,
  kNumbers
};
struct NumberKey {
  const char* key;
  int item;
  bool optional;
  double missing;
};
constexpr NumberKey kNumberKeys[kNumbers] = {
    {"lr", -1, false, 0},           {"betas", 0, false, 0},
    {"betas", 1, false, 0},         {"eps", -1, false, 0},
    {"weight_decay", -1, false, 0}, {"initial_lr", -1, true, 0},
    {"ema_decay", -1, true, 0},     {"l2", -1, true, 0},
    {"bounds", 0, true, -INFINITY}, {"bounds", 1, true, INFINITY},
    {"block", -1, true, 0},
};

// What a block is, beside a number of rows: an index of dim 0, the whole tensor, or the whole group.
struct BlockName {
  const char* name;
  double rows;
};
constexpr double kTensorBlock = 0, kGroupBlock = -1;
constexpr BlockName kBlockNames[] = {{"tensor", kTensorBlock}, {"row", 1}, {"group", kGroupBlock}};

// Its switches. kTruth: on if the value is true; kNotNone: if it is not None; kText: if it is `text`, and
// off if it is `other`. `optional`: the key may be missing, and the switch is off then.
enum Flag {
  kAmsgrad,
  kMaximize,
  kCapturable,
  kDecayBySchedule,
  kAverages,
  kCautious,
  kMetric,
  kBlockScaling,
  kFlags
};
enum FlagKind { kTruth, kNotNone, kText };
struct FlagKey {
  const char* key;
  FlagKind kind;
  bool optional;
  const char* text;
  const char* other;
};
constexpr FlagKey kFlagKeys[kFlags] = {
    {"amsgrad", kTruth, false, "", ""},          {"maximize", kTruth, false, "", ""},
    {"capturable", kTruth, false, "", ""},       {"decay_by", kText, false, "schedule", "lr"},
    {"ema_decay", kNotNone, true, "", ""},       {"cautious", kTruth, true, "", ""},
    {"metric", kText, true, "adam", "identity"}, {"block_scaling", kText, true, "sqrt", "none"},
};

// The states of a param, of its shape. Moments have the param's dtype, or float32 for 16-bit params;
// kCompute: the type that the param is computed in. `flag`: what must be on for it to be there.
enum StateName { kExpAvg, kExpAvgSq, kMaxExpAvgSq, kEma, kStates };
enum StateType : uint8_t { kMoment, kCompute };
constexpr int kAlways = -1;
struct StateKey {
  const char* key;
  StateType type;
  int flag;
};
constexpr StateKey kStateKeys[kStates] = {
    {"exp_avg", kMoment, kAlways},
    {"exp_avg_sq", kMoment, kAlways},
    {"max_exp_avg_sq", kMoment, kAmsgrad},
    {"ema", kCompute, kAverages},
};

struct HyperParameters {
  double number[kNumbers];
  bool flag[kFlags];

  bool operator==(const HyperParameters& o) const {
    return std::equal(number, number + kNumbers, o.number) &&
           std::equal(flag, flag + kFlags, o.flag);
  }
};

constexpr int kDecayConstants = 4;  // the most that a rule of decay.h has

// What changes with the step count, in double: computed once, rounded once to the compute type where
// it is used. A line each:
#define ADAMPROX_SCALARS(SCALAR)                                           \
  SCALAR(one_minus_beta1)                                                  \
  SCALAR(one_minus_beta2)                                                  \
  SCALAR(step_size)  /* lr * sqrt(1 - beta2^t) / (1 - beta1^t) */          \
  SCALAR(eps)        /* eps * sqrt(1 - beta2^t) */                         \
  SCALAR(grad_scale) /* 1, or -1 to maximize, divided by the loss scale */ \
  SCALAR(one_minus_ema)                                                    \
  SCALAR(alpha) /* telemetry measures updates by it */                     \
  SCALAR(step)  /* t, the count with this step */

struct Scalars {
#define SCALAR(name) double name;
  ADAMPROX_SCALARS(SCALAR)
#undef SCALAR
  double decay[kDecayConstants];  // see decay.h: a meaning for each rule
};

// base^exponent for base in [0, 1): the whole part by squaring, the fraction by square roots. It has
// the same bits on a host and on a GPU, whose pow differ. NaN for a negative exponent.
HOST_DEVICE double power(double base, double exponent) {
  using std::sqrt;
  if (!(exponent >= 0)) return NAN;
  if (exponent >= 0x1p63) return 0;
  const auto whole = static_cast<uint64_t>(exponent);
  double result = 1, square = base;
  for (uint64_t n = whole; n != 0; n /= 2) {
    if (n % 2 != 0) result = result * square;
    square = square * square;
  }
  double fraction = exponent - static_cast<double>(whole), root = base;
  while (fraction != 0) {
    root = sqrt(root);
    fraction = 2 * fraction;
    if (fraction >= 1) {
      result = result * root;
      fraction = fraction - 1;
    }
  }
  return result;
}

// Kept from one param group to the next, since groups mostly share them and powers are slow.
struct BiasCorrections {
  double beta1 = -1, beta2 = -1, step = -1;
  double correction1 = 0, correction2_sqrt = 0;

  HOST_DEVICE void update(const HyperParameters& h, double at_step) {
    if (h.number[kBeta1] == beta1 && h.number[kBeta2] == beta2 && at_step == step) return;
    beta1 = h.number[kBeta1];
    beta2 = h.number[kBeta2];
    step = at_step;
    using std::sqrt;
    correction1 = 1 - power(beta1, step);
    correction2_sqrt = sqrt(1 - power(beta2, step));
  }
};

// What the constants of a decay rule are made of: rate is the learning rate, or eta_t of the paper.
struct Strengths {
  double weight_decay, decay, l2, low, high, root;  // decay: rate * weight_decay; l2: rate * l2
  bool by_size;                                     // whether blocks' strengths grow with them

  HOST_DEVICE Strengths(const HyperParameters& h, const BiasCorrections& bias) {
    const double* n = h.number;
    const double rate = h.flag[kDecayBySchedule] ? n[kLr] / n[kInitialLr] : n[kLr];
    weight_decay = n[kWeightDecay];
    decay = rate * n[kWeightDecay];
    l2 = rate * n[kL2];
    low = n[kLow];
    high = n[kHigh];
    root = bias.correction2_sqrt;
    by_size = h.flag[kBlockScaling];
  }
};

// The learning rate without its schedule. Times 2^-27 it is a normal number, whatever the type.
HOST_DEVICE double alpha(const HyperParameters& h) {
  constexpr double kLeast = 0x1p-99, kMost = 0x1p99;
  const double least = h.number[kInitialLr] > kLeast ? h.number[kInitialLr] : kLeast;
  return least < kMost ? least : kMost;
}

// All but the constants of the decay.
HOST_DEVICE Scalars step_scalars(const HyperParameters& h, const BiasCorrections& bias,
                                 double loss_scale) {
  Scalars s{};
  s.one_minus_beta1 = 1 - h.number[kBeta1];
  s.one_minus_beta2 = 1 - h.number[kBeta2];
  s.step_size = h.number[kLr] * bias.correction2_sqrt / bias.correction1;
  s.eps = h.number[kEps] * bias.correction2_sqrt;
  s.grad_scale = (h.flag[kMaximize] ? -1.0 : 1.0) / loss_scale;
  s.one_minus_ema = 1 - h.number[kEmaDecay];
  s.alpha = alpha(h);
  s.step = bias.step;
  return s;
}

}  // namespace adamprox
