// A tracked step on the CPU notes updates and params block by block, each right after it was updated.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "multi_tensor_apply_cpu.h"
#include "reduction_tree_cpu.h"
#include "telemetry.h"
#include "update.h"

namespace adamprox {

template <typename T>
struct Block {
  T updates[kBlockSize];
  double fours_of_updates[kBlockSize / 4], fours_of_params[kBlockSize / 4];  // see add_fours
};

// Of param, grad, exp_avg, exp_avg_sq and, or null, max_exp_avg_sq.
//
// Squares are summed in the same loop, kLag elements behind what is updated, so that nothing waits for
// what has just been stored. A tracked loop looks less far ahead by itself, and fetches by name.
template <typename Rule, typename T>
MULTIVERSION void update_and_keep(T* const* at, int64_t count, const Scalars& scalars,
                                  Block<T>& block) {
  constexpr int64_t kLag = 128, kStep = 16;
  const Update<Rule, T> update(scalars);
  T *const p = at[0], *const g = at[1], *const m = at[2], *const v = at[3], *const x = at[4];
  const bool amsgrad = x != nullptr;
  const auto take_step = [&](T* p, T* g, T* m, T* v, T* x, T* updates) {
    const Write<T> kept{updates};
    const ReadWrite<T> param{p}, exp_avg{m}, exp_avg_sq{v}, max_exp_avg_sq{x};
    const Read<T> grad{g};
    const auto step = [=](T& kept, T& p, T& g, auto&... states) { kept = update(p, g, states...); };
    if (amsgrad) {
      for_each_element(kStep, step, kept, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
    } else {
      for_each_element(kStep, step, kept, param, grad, exp_avg, exp_avg_sq);
    }
  };
  const auto add_squares = [&](const T* updates, const T* params, int64_t i) {
    add_fours<Squares>(updates, kStep, block.fours_of_updates + i / 4);
    add_fours<Squares>(params, kStep, block.fours_of_params + i / 4);
  };
  const int64_t full = count - count % kStep;
  for (int64_t i = 0; i < full + kLag; i += kStep) {
    if (i < full) {
      for (int64_t line = i + kBlockSize; line < i + kBlockSize + kStep; line += 64 / sizeof(T)) {
        __builtin_prefetch(p + line);
        __builtin_prefetch(g + line);
        __builtin_prefetch(m + line);
        __builtin_prefetch(v + line);
      }
      take_step(p + i, g + i, m + i, v + i, x + i, block.updates + i);
    }
    if (i >= kLag) add_squares(block.updates + (i - kLag), p + (i - kLag), i - kLag);
  }
  if (full == count) return;
  T rest[5][kStep] = {};
  T* const updates = block.updates + full;
  for (int k = 0; k < 5 && at[k] != nullptr; ++k) {
    std::copy(at[k] + full, at[k] + count, rest[k]);
  }
  take_step(rest[0], rest[1], rest[2], rest[3], rest[4], updates);
  for (const int k : {0, 2, 3, 4}) {
    if (at[k] != nullptr) std::copy(rest[k], rest[k] + count % kStep, at[k] + full);
  }
  std::fill(updates + count % kStep, updates + kStep, T(0));
  std::fill(rest[0] + count % kStep, rest[0] + kStep, T(0));
  add_squares(updates, rest[0], full);
}

// The updates from the moments as they have been stored.
template <typename T>
MULTIVERSION void update_again(T* exp_avg, T* exp_avg_sq, int64_t count, const Scalars& scalars,
                               T* updates) {
  const auto step_size = static_cast<T>(scalars.step_size), eps = static_cast<T>(scalars.eps);
  const auto step = [=](T& update, T& m, T& v) { update = adam_update(m, v, step_size, eps); };
  for_each_element(count, step, Write<T>{updates}, Read<T>{exp_avg}, Read<T>{exp_avg_sq});
}

template <typename From, typename To>
MULTIVERSION void convert(const From* from, int64_t count, To* to) {
  using T = Compute<From>;
  for_each_element(count, [](T& x, T& y) { y = x; }, Read<From>{from}, Write<To>{to});
}

// How often bins were seen, in binary and in several lanes: bit b of the word at[k][i] is bit k of
// lane i's count of bin b. So one operation counts all bins of several lanes.
struct BitPlanes {
  static constexpr int kPlanes = 11;
  static constexpr int64_t kLanes = 16, kWords = 16;
  static_assert(kBlockSize == kLanes * kWords && kChunkSize / kLanes < 1 << kPlanes);
  uint32_t at[kPlanes][kLanes] = {};

  // The words of a block, each with the bit of its bin.
  template <typename WordOf>
  inline __attribute__((always_inline)) void add(WordOf word_of) {
#pragma GCC ivdep
    for (int64_t i = 0; i < kLanes; ++i) {
      uint32_t sums[2][4];
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        uint32_t w[8];
#pragma GCC unroll 8
        for (int64_t k = 0; k < 8; ++k) w[k] = word_of((half * 8 + k) * kLanes + i);
        uint32_t ones, twos;
        const uint32_t a = add(w[0], w[1], w[2], ones);
        const uint32_t b = add(ones, w[3], w[4], ones);
        const uint32_t c = add(ones, w[5], w[6], ones);
        const uint32_t d = add(ones, w[7], 0, sums[half][0]);
        const uint32_t e = add(a, b, c, twos);
        const uint32_t f = add(twos, d, 0, sums[half][1]);
        sums[half][3] = add(e, f, 0, sums[half][2]);
      }
      uint32_t sum, carry = 0, over = 0;
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        carry = add(sums[0][k], sums[1][k], carry, sum);
        over = add(at[k][i], sum, over, at[k][i]);
      }
      over = add(at[4][i], carry, over, at[4][i]);
#pragma GCC unroll 6
      for (int k = 5; k < kPlanes; ++k) over = add(at[k][i], over, 0, at[k][i]);
    }
  }

  uint32_t count(int b) const {
    uint32_t total = 0;
    for (int k = 0; k < kPlanes; ++k) {
      for (int64_t i = 0; i < kLanes; ++i) total += (at[k][i] >> b & 1) << k;
    }
    return total;
  }

 private:
  // Adds three bits of each bin; returns the carries.
  static inline __attribute__((always_inline)) uint32_t add(uint32_t a, uint32_t b, uint32_t c,
                                                            uint32_t& sum) {
    const uint32_t differ = a ^ b;
    sum = differ ^ c;
    return (a & b) | (c & differ);
  }
};

struct UpdateNotes {
  BlockSums squares;
  BitPlanes magnitudes;
  uint32_t rest[kBins] = {};  // of blocks that are not full; may be negative

  void write(Record& record) const {
    record.update_squares = squares.total();
    for (int b = 0; b < kBins; ++b) record.counts[b] = rest[b] + magnitudes.count(b);
  }
};

struct ParamNotes {
  BlockSums squares;
  uint32_t zeros = 0;

  template <typename Param>
  void write(const Param* params, int64_t count, Record& record) const {
    record.param_squares = squares.total();
    record.counts[kZeros] = zeros;
    record.counts[kNaNs] = record.counts[kInfinities] = 0;
    if (record.param_squares <= std::numeric_limits<double>::max()) return;  // then there are none
    for (int64_t i = 0; i < count; ++i) {
      const int c = special_class(Convert<Param>::widen(params[i]));
      if (c > kZeros) ++record.counts[c];
    }
  }
};

// Of a block's updates, whose sum of squares is given.
template <typename T>
MULTIVERSION void note_updates(const T* updates, int64_t count, double sum, double alpha,
                               UpdateNotes& notes) {
  const MagnitudeClasses<T> classes(alpha);
  notes.squares.add(sum);
  if (count == kBlockSize) {
    notes.magnitudes.add([=](int64_t i) { return uint32_t{1} << classes.bin(updates[i]); });
  } else {
    for (int64_t i = 0; i < count; ++i) ++notes.rest[classes.bin(updates[i])];
  }
  if (sum == sum) return;
  for (int64_t i = 0; i < count; ++i) notes.rest[kBins - 1] -= updates[i] != updates[i];
}

// The same of the new params.
template <typename Param>
MULTIVERSION void note_params(const Param* params, int64_t count, double sum, ParamNotes& notes) {
  notes.squares.add(sum);
  uint32_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    zeros += Magnitude<Compute<Param>>::of(Convert<Param>::widen(params[i])) == 0;
  }
  notes.zeros += zeros;
}

MULTIVERSION inline double sum_of_fours(double* fours, int64_t count) {
  return rest_of_block(fours, (count + 15) / 16 * 4);
}

// As update_span in fused_adam_cpu.cpp, block by block; returns the sum of the params' squares.
template <typename Rule, typename Param, typename State>
double update_and_note(const Span& span, const Scalars& scalars, Record& record) {
  using T = Compute<Param>;
  const TensorRow& row = span.row;
  auto* param = span.at<Param>(row.param);
  auto* grad = span.at<Param>(span.grad);
  State* states[] = {span.at<State>(row.exp_avg), span.at<State>(row.exp_avg_sq),
                     row.max_exp_avg_sq ? span.at<State>(row.max_exp_avg_sq) : nullptr};
  const int num_states = row.max_exp_avg_sq ? 3 : 2;
  UpdateNotes update_notes;
  ParamNotes param_notes;
  Block<T> block;
  T wide[5][kBlockSize];
  for (int64_t begin = 0; begin < span.count; begin += kBlockSize) {
    const int64_t count = std::min(span.count - begin, kBlockSize);
    T* at[5] = {};
    if constexpr (std::is_same_v<Param, T>) {
      at[0] = param + begin;
      at[1] = grad + begin;
      for (int i = 0; i < num_states; ++i) at[2 + i] = states[i] + begin;
    } else {  // widened by itself, which makes a third of the loops
      convert(param + begin, count, at[0] = wide[0]);
      convert(grad + begin, count, at[1] = wide[1]);
      for (int i = 0; i < num_states; ++i) {
        convert(states[i] + begin, count, at[2 + i] = wide[2 + i]);
      }
    }
    update_and_keep<Rule, T>(at, count, scalars, block);
    double of_updates = sum_of_fours(block.fours_of_updates, count);
    double of_params = sum_of_fours(block.fours_of_params, count);
    if constexpr (!std::is_same_v<Param, T>) {
      convert(at[0], count, param + begin);
      of_params = sum_of_squares(param + begin, count);
      for (int i = 0; i < num_states; ++i) convert(at[2 + i], count, states[i] + begin);
    }
    if constexpr (sizeof(State) < sizeof(T)) {  // which have been rounded
      for (int i = 0; i < num_states; ++i) convert(states[i] + begin, count, at[2 + i]);
      update_again(at[2], at[1 + num_states], count, scalars, block.updates);
      of_updates = sum_of_squares(block.updates, count);
    }
    note_updates(block.updates, count, of_updates, scalars.alpha, update_notes);
    note_params(param + begin, count, of_params, param_notes);
  }
  record.step = scalars.step;
  update_notes.write(record);
  param_notes.write(param, span.count, record);
  return param_notes.squares.total();
}

}  // namespace adamprox
