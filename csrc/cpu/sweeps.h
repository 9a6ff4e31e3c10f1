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

template <typename Param>
HOST_DEVICE void shrink_part(const Span& part, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element(part, shrink, ReadWrite<Param>{part.at<Param>(part.row.param)});
}

// Returns the sum of the squares of what is stored, which goes along with the update: that waits for
// memory.
template <typename Param, typename State>
HOST_DEVICE double update_and_sum_parts(const Span& span,
                                        const Update<ProxL2, Compute<Param>>& update) {
  BlockSums squares;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    const Span part = span.part(first, std::min<int64_t>(span.count - first, kBlockSize));
    double sums[kBlockSize / 4];
    int64_t fours = 0;
    for (int64_t i = 0; i < part.count; i += kBatchSize) {
      const Span batch = part.part(i, std::min<int64_t>(kBatchSize, part.count - i));
      update_part<Param, State>(batch, update);
      Param* stored = batch.at<Param>(span.row.param);
      if (batch.count == kBatchSize) {
        Batch widened(Read<Param>{stored}, false);
        fours += add_fours<true>(widened.elements().data, kBatchSize, sums + fours);
      } else {
        fours += add_fours<true>(stored, batch.count, sums + fours);
      }
    }
    squares.add(sum_of_fours(sums, fours));
  }
  return squares.total();
}

// A part of one of AdamProxL2's blocks: returns the sum of the squares of what is stored.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  return update_and_sum_parts<Param, State>(span, Update<ProxL2, Compute<Param>>(scalars));
}

template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  shrink_part<Param>(span, shrinkage);
}

// Blocks of a few params, of which a part has some, so that all but the tree's first levels is vectors.
template <typename Param>
HOST_DEVICE void shrink_small_blocks(const Span& part, const double* k) {
  using T = Compute<Param>;
  const int64_t block = part.row.block;
  const ReadWrite<Param> param{part.at<Param>(part.row.param)};
  double sums[kBlockSize];
  for_each_element(
      part, [](double& sum, T& p) { sum = square(p); }, Write<double>{sums},
      Read<Param>{param.data});
  T shrinkages[kBlockSize];
  for (int64_t first = 0; first < part.count; first += block) {
    const int64_t count = std::min(block, part.count - first);
    for (int64_t step = 1; step < count; step *= 2) {
      for (int64_t i = 0; i + step < count; i += 2 * step)
        sums[first + i] += sums[first + i + step];
    }
    const double shrinkage = ProxL2::shrinkage(sums[first], k, count);
    std::fill_n(shrinkages + first, count, static_cast<T>(shrinkage));
  }
  for_each_element(
      part, [](T& p, T& shrinkage) { p = ProxL2::shrink(p, shrinkage); }, param,
      Read<T>{shrinkages});
}

// A chunk of whole blocks, which are shrunk once all are updated: norms one after another would wait for
// roots, and a chunk's params are still in a cache. Small blocks are, a part's worth at a time.
template <typename Param, typename State>
MULTIVERSION void update_and_shrink_span(const Span& span, const Scalars& scalars) {
  constexpr int64_t kSmall = kBlockSize / 4;
  const Update<ProxL2, Compute<Param>> update(scalars);
  const int64_t block = span.row.block;
  if (block <= kSmall) {
    const int64_t run = kBlockSize / block * block;
    for (int64_t first = 0; first < span.count; first += run) {
      const Span part = span.part(first, std::min(run, span.count - first));
      update_part<Param, State>(part, update);
      shrink_small_blocks<Param>(part, scalars.decay);
    }
    return;
  }
  double of_blocks[kChunkSize / kSmall];  // sums, and then shrinkages
  const auto for_each_block = [&](auto f) __attribute__((always_inline)) {
    for (int64_t first = 0, i = 0; first < span.count; first += block, ++i) {
      f(span.part(first, std::min(block, span.count - first)), of_blocks[i]);
    }
  };
  for_each_block([&](const Span& one, double& sum) __attribute__((always_inline)) {
    sum = update_and_sum_parts<Param, State>(one, update);
  });
  for_each_block([&](const Span& one, double& sum) __attribute__((always_inline)) {
    sum = ProxL2::shrinkage(sum, scalars.decay, one.count);
  });
  for_each_block([&](const Span& one, double shrinkage)
                     __attribute__((always_inline)) { shrink_part<Param>(one, shrinkage); });
}

}  // namespace adamprox
