// The CPU's sweeps over a chunk. Each is compiled for AVX-512, AVX2 and the baseline from the one
// definition in update.h, and chosen when the library loads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "multi_tensor_apply_cpu.h"
#include "reduction_tree_cpu.h"
#include "telemetry_cpu.h"
#include "update.h"

namespace adamprox {

// `first...` are streams that `update` takes before the others.
template <typename Param, typename State, typename F, typename... First>
inline __attribute__((always_inline)) void update_elements(const Span& span, F update,
                                                           First... first) {
  const TensorRow& row = span.row;
  const ReadWrite<Param> param{span.at<Param>(row.param)};
  const Read<Param> grad{span.at<Param>(span.grad)};
  const ReadWrite<State> exp_avg{span.at<State>(row.exp_avg)};
  const ReadWrite<State> exp_avg_sq{span.at<State>(row.exp_avg_sq)};
  if (row.max_exp_avg_sq == nullptr) {
    for_each_element(span.count, update, first..., param, grad, exp_avg, exp_avg_sq);
  } else {
    const ReadWrite<State> max_exp_avg_sq{span.at<State>(row.max_exp_avg_sq)};
    for_each_element(span.count, update, first..., param, grad, exp_avg, exp_avg_sq,
                     max_exp_avg_sq);
  }
}

template <typename Rule, typename Param, typename State>
MULTIVERSION void update_span(const Span& span, const Scalars& scalars) {
  update_elements<Param, State>(span, Update<Rule, Compute<Param>>(scalars));
}

// Keeps the updates.
template <typename Rule, typename Param, typename State>
MULTIVERSION void update_and_keep(const Span& span, const Scalars& scalars,
                                  Compute<Param>* updates) {
  using T = Compute<Param>;
  const Update<Rule, T> update(scalars);
  const auto step = [=](T& kept, auto&... elements) { kept = update(elements...); };
  update_elements<Param, State>(span, step, Write<T>{updates});
}

// The updates from the moments as they have been stored.
template <typename State>
MULTIVERSION void update_again(const Span& span, const Scalars& scalars, Compute<State>* updates) {
  using T = Compute<State>;
  const auto step_size = static_cast<T>(scalars.step_size), eps = static_cast<T>(scalars.eps);
  const TensorRow& row = span.row;
  void* exp_avg_sq = row.max_exp_avg_sq != nullptr ? row.max_exp_avg_sq : row.exp_avg_sq;
  const auto step = [=](T& update, T& m, T& v) { update = adam_update(m, v, step_size, eps); };
  for_each_element(span.count, step, Write<T>{updates}, Read<State>{span.at<State>(row.exp_avg)},
                   Read<State>{span.at<State>(exp_avg_sq)});
}

// Calls f(block) for what is so little that it is in the first cache when it is looked at again.
template <typename F>
inline __attribute__((always_inline)) void for_each_block(const Span& span, F f) {
  for (int64_t i = 0; i < span.count; i += kBlockSize) {
    f(Span{span.row, span.grad, span.begin + i, std::min<int64_t>(span.count - i, kBlockSize)});
  }
}

// AdamProxL2's: returns the sum of the squares of what is stored. One function, whose blocks overlap.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  BlockSums squares;
  for_each_block(span, [&](const Span& block) __attribute__((always_inline)) {
    update_elements<Param, State>(block, Update<ProxL2, Compute<Param>>(scalars));
    squares.add(sum_of_block(block.at<Param>(span.row.param), block.count));
  });
  return squares.total();
}

// Asks for some lines of the next block, a few at a time, since few can be under way: what notes looks
// too seldom at memory for the hardware to see it coming.
template <typename Param, typename State>
inline __attribute__((always_inline)) void prefetch_next(const Span& block, int from, int to) {
  const auto prefetch = [&](const void* data) {
    for (int i = from; i < to; ++i) __builtin_prefetch(static_cast<const char*>(data) + 64 * i);
  };
  prefetch(block.at<Param>(block.row.param) + kBlockSize);
  prefetch(block.at<Param>(block.grad) + kBlockSize);
  prefetch(block.at<State>(block.row.exp_avg) + kBlockSize);
  prefetch(block.at<State>(block.row.exp_avg_sq) + kBlockSize);
}

// A tracked step's; returns the same for AdamProxL2, whose params are noted once they have shrunk.
template <typename Rule, typename Param, typename State>
double update_and_note(const Span& span, const Scalars& scalars, Record& record) {
  constexpr bool kFinal = !std::is_same_v<Rule, ProxL2>;
  const TensorRow& row = span.row;
  BlockSums squares;
  UpdateNotes of_updates;
  ParamNotes of_params;
  for_each_block(span, [&](const Span& block) {
    Compute<Param> updates[kBlockSize];
    if constexpr (kFinal && std::is_same_v<Param, float>) {
      update_and_keep<Rule, Param, State>(block, scalars, updates);
    } else {  // less to compile
      if constexpr (kFinal) {
        update_span<Rule, Param, State>(block, scalars);
      } else {
        squares.add(update_and_sum<Param, State>(block, scalars));
      }
      update_again<State>(block, scalars, updates);
    }
    prefetch_next<Param, State>(block, 0, 6);
    note_updates(updates, block.count, scalars.alpha, of_updates);
    prefetch_next<Param, State>(block, 6, 12);
    if (kFinal) note_params(block.at<Param>(row.param), block.count, of_params);
  });
  record.step = scalars.step;
  of_updates.write(record);
  if (kFinal) of_params.write(span.at<Param>(row.param), span.count, record);
  return squares.total();
}

template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element(span.count, shrink, ReadWrite<Param>{span.at<Param>(span.row.param)});
}

}  // namespace adamprox
