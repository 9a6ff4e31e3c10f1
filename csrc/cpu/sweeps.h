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

template <typename Param, typename State>
HOST_DEVICE void update_part(const Span& part, const Update<ProxL2, Compute<Param>>& update) {
  with_streams<Param, State>(part, [&](auto... streams) __attribute__((always_inline)) {
    for_each_element(part, update, streams...);
  });
}

// Of up to kBlockSize params, as they are stored.
template <typename Param>
HOST_DEVICE double sum_of_part(const Span& part) {
  const Param* stored = part.at<Param>(part.row.param);
  double sums[kBlockSize / 4];
  int64_t fours = 0, i = 0;
  for (; i + kBatchSize <= part.count; i += kBatchSize) {
    Batch batch(Read<Param>{const_cast<Param*>(stored) + i}, false);
    fours += add_fours<true>(batch.elements().data, kBatchSize, sums + fours);
  }
  fours += add_fours<true>(stored + i, part.count - i, sums + fours);
  return sum_of_fours(sums, fours);
}

// Adds up f(part) for the parts of a span: what f has just stored is in the nearest cache.
template <typename F>
HOST_DEVICE double sum_of_parts(const Span& span, F f) {
  BlockSums squares;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    squares.add(f(span.part(first, std::min<int64_t>(span.count - first, kBlockSize))));
  }
  return squares.total();
}

template <typename Param>
HOST_DEVICE void shrink_part(const Span& part, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element(part, shrink, ReadWrite<Param>{part.at<Param>(part.row.param)});
}

// A part of one of AdamProxL2's blocks: returns the sum of the squares of what is stored.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  const Update<ProxL2, Compute<Param>> update(scalars);
  return sum_of_parts(span, [&](const Span& part) __attribute__((always_inline)) {
    update_part<Param, State>(part, update);
    return sum_of_part<Param>(part);
  });
}

template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  shrink_part<Param>(span, shrinkage);
}

// Whole blocks, so many at a time that they are in the nearest cache when they are shrunk.
template <typename Param, typename State>
MULTIVERSION void update_and_shrink_span(const Span& span, const Scalars& scalars) {
  constexpr int64_t kAtATime = 1024;
  const int64_t block = span.row.block, run = std::max<int64_t>(1, kAtATime / block) * block;
  const Update<ProxL2, Compute<Param>> update(scalars);
  for (int64_t first = 0; first < span.count; first += run) {
    const Span blocks = span.part(first, std::min(run, span.count - first));
    update_part<Param, State>(blocks, update);
    for (int64_t at = 0; at < blocks.count; at += block) {
      const Span one = blocks.part(at, std::min(block, blocks.count - at));
      const double sum = sum_of_parts(one, [](const Span& part) __attribute__((always_inline)) {
        return sum_of_part<Param>(part);
      });
      shrink_part<Param>(one, ProxL2::shrinkage(sum, scalars.decay, one.count));
    }
  }
}

}  // namespace adamprox
