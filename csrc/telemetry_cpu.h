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

// Of param, grad, exp_avg, exp_avg_sq and, or null, max_exp_avg_sq.
template <typename Rule, typename T>
MULTIVERSION void update_and_keep(T* const* at, int64_t count, const Scalars& scalars, T* updates) {
  const Update<Rule, T> update(scalars);
  const Write<T> kept{updates};
  const ReadWrite<T> param{at[0]}, exp_avg{at[2]}, exp_avg_sq{at[3]};
  const Read<T> grad{at[1]};
  if (at[4] == nullptr) {
    const auto step = [=](T& kept, T& p, T& g, T& m, T& v) { kept = update(p, g, m, v); };
    for_each_element(count, step, kept, param, grad, exp_avg, exp_avg_sq);
  } else {
    const auto step = [=](T& kept, T& p, T& g, T& m, T& v, T& x) { kept = update(p, g, m, v, x); };
    for_each_element(count, step, kept, param, grad, exp_avg, exp_avg_sq, ReadWrite<T>{at[4]});
  }
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
  static_assert(kBlockSize % (kLanes * kWords) == 0 && kChunkSize / kLanes < 1 << kPlanes);
  uint32_t at[kPlanes][kLanes] = {};

  // The words of 256 elements, each with the bit of its bin.
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

// Of a block.
template <typename T>
MULTIVERSION void note_updates(const T* updates, int64_t count, double alpha, UpdateNotes& notes) {
  const MagnitudeClasses<T> classes(alpha);
  const double sum = sum_of_squares(updates, count);
  notes.squares.add(sum);
  int64_t i = 0;
  for (; i + 256 <= count; i += 256) {
    notes.magnitudes.add([=](int64_t j) { return uint32_t{1} << classes.bin(updates[i + j]); });
  }
  for (; i < count; ++i) ++notes.rest[classes.bin(updates[i])];
  if (sum == sum) return;
  for (i = 0; i < count; ++i) notes.rest[kBins - 1] -= updates[i] != updates[i];
}

// The same of the new params.
template <typename Param>
MULTIVERSION void note_params(const Param* params, int64_t count, ParamNotes& notes) {
  notes.squares.add(sum_of_squares(params, count));
  uint32_t zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    zeros += Magnitude<Compute<Param>>::of(Convert<Param>::widen(params[i])) == 0;
  }
  notes.zeros += zeros;
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
  T updates[kBlockSize], wide[5][kBlockSize];
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
    update_and_keep<Rule, T>(at, count, scalars, updates);
    if constexpr (!std::is_same_v<Param, T>) {
      convert(at[0], count, param + begin);
      for (int i = 0; i < num_states; ++i) convert(at[2 + i], count, states[i] + begin);
      if constexpr (!std::is_same_v<State, T>) {  // which have been rounded
        for (int i = 0; i < num_states; ++i) convert(states[i] + begin, count, at[2 + i]);
        update_again(at[2], at[1 + num_states], count, scalars, updates);
      }
    }
    note_updates(updates, count, scalars.alpha, update_notes);
    note_params(param + begin, count, param_notes);
  }
  record.step = scalars.step;
  update_notes.write(record);
  param_notes.write(param, span.count, record);
  return param_notes.squares.total();
}

}  // namespace adamprox
