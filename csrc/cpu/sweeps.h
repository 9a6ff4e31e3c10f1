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

// AdamProxL2's: returns the sum of the squares of what is stored. They are taken a batch at a time, of
// the batch before the one that has just been stored: so memory is prefetched all the time, and no load
// waits for a store. A batch of 256 elements gains 4 % with AVX2 and loses 2 % with AVX-512.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  const Update<ProxL2, Compute<Param>> update(scalars);
  BlockSums squares;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    const Span block = span.part(first, std::min<int64_t>(span.count - first, kBlockSize));
    double sums[kBlockSize / 4];
    int64_t fours = 0;
    const auto add = [&](const auto* stored, int64_t count) __attribute__((always_inline)) {
      fours += add_fours<Squares>(stored, count, sums + fours);
    };
    const auto add_batch = [&](int64_t at) __attribute__((always_inline)) {
      Batch batch(Read<Param>{block.at<Param>(span.row.param) + at}, false);
      add(batch.elements().data, kBatchSize);
    };
    int64_t i = 0;
    for (; i + kBatchSize <= block.count; i += kBatchSize) {
      const Span batch = block.part(i, kBatchSize);
      with_streams<Param, State>(batch, [&](auto... streams) __attribute__((always_inline)) {
        for_each_in_batch(batch.after >= kPrefetchAhead, update, streams...);
      });
      if (i > 0) add_batch(i - kBatchSize);
    }
    if (i > 0) add_batch(i - kBatchSize);
    if (i < block.count) {
      const Span rest = block.part(i, block.count - i);
      with_streams<Param, State>(rest, [&](auto... streams) __attribute__((always_inline)) {
        for_each_element(rest, update, streams...);
      });
      add(rest.at<Param>(span.row.param), rest.count);
    }
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
