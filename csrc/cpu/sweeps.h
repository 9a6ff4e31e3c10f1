// The CPU's sweeps over a chunk. Each is compiled for AVX-512, AVX2 and the baseline from the one
// definition in update.h, and chosen when the library loads.
#pragma once

#include <algorithm>

#include "../math/update.h"
#include "loop.h"
#include "reduction_tree.h"

namespace adamprox {

// Calls f with the streams of a step: with a fifth one for amsgrad.
template <typename Param, typename State, typename F>
HOST_DEVICE void with_streams(const Span& span, F f) {
  const TensorRow& row = span.row;
  const auto state = [&](StateName name) {
    return ReadWrite<State>{span.at<State>(row.states[name])};
  };
  const auto call = [&](auto... max_exp_avg_sq) __attribute__((always_inline)) {
    f(ReadWrite<Param>{span.at<Param>(row.param)}, Read<Param>{span.at<Param>(span.grad)},
      state(kExpAvg), state(kExpAvgSq), max_exp_avg_sq...);
  };
  row.states[kMaxExpAvgSq] == nullptr ? call() : call(state(kMaxExpAvgSq));
}

template <typename Rule, typename Param, typename State>
MULTIVERSION void update_span(const Span& span, const Scalars& scalars) {
  const Update<Rule, Compute<Param>> update(scalars);
  with_streams<Param, State>(span, [&](auto... streams) __attribute__((always_inline)) {
    for_each_element(span, update, streams...);
  });
}

// AdamProxL2's: returns the sum of the squares of what is stored, a block at a time, since it is still in
// the nearest cache.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  const Update<ProxL2, Compute<Param>> update(scalars);
  BlockSums squares;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    const Span block = span.part(first, std::min<int64_t>(span.count - first, kBlockSize));
    with_streams<Param, State>(block, [&](auto... streams) __attribute__((always_inline)) {
      for_each_element(block, update, streams...);
    });
    const Read<Param> stored{block.at<Param>(span.row.param)};
    double sums[kBlockSize / 4];
    int64_t fours = 0, i = 0;
    for (; i + kBatchSize <= block.count; i += kBatchSize) {
      Batch batch(Read<Param>{stored.data + i}, false);
      fours += add_fours<true>(batch.elements().data, kBatchSize, sums + fours);
    }
    fours += add_fours<true>(stored.data + i, block.count - i, sums + fours);
    squares.add(sum_of_fours(sums, fours));
  }
  return squares.total();
}

template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element(span, shrink, ReadWrite<Param>{span.at<Param>(span.row.param)});
}

}  // namespace adamprox
