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
  if (row.states[kMaxExpAvgSq] == nullptr) {
    call();
  } else {
    call(state(kMaxExpAvgSq));
  }
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
      fours += add_fours<Squares>(batch.elements().data, kBatchSize, sums + fours);
    }
    fours += add_fours<Squares>(stored.data + i, block.count - i, sums + fours);
    squares.add(sum_of_fours(sums, fours));
  }
  return squares.total();
}

// Four places at a time, as many as there are streams in a step: one stream would leave memory idle
// (0.34 of AdamW's time, where four take 0.28).
template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  auto* param = span.at<Param>(span.row.param);
  const int64_t part = span.count / 4;
  const auto shrink_all = [=](auto&... params) { (shrink(params), ...); };
  for_each_element(span.part(0, part).alone(), shrink_all, ReadWrite<Param>{param},
                   ReadWrite<Param>{param + part}, ReadWrite<Param>{param + 2 * part},
                   ReadWrite<Param>{param + 3 * part});
  for_each_element(span.part(4 * part, span.count % 4), shrink, ReadWrite<Param>{param + 4 * part});
}

}  // namespace adamprox
