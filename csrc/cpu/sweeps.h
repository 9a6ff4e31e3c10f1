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

// The sum of the squares of up to kBlockSize params, as they are stored. Before a batch's are taken,
// before(batch) is called.
template <typename Param, typename F>
HOST_DEVICE double sum_of_part(const Span& part, F before) {
  double sums[kBlockSize / 4];
  int64_t fours = 0;
  for (int64_t i = 0; i < part.count; i += kBatchSize) {
    const Span batch = part.part(i, std::min<int64_t>(kBatchSize, part.count - i));
    before(batch);
    Param* stored = batch.at<Param>(part.row.param);
    if (batch.count == kBatchSize) {
      Batch widened(Read<Param>{stored}, false);
      fours += add_fours<true>(widened.elements().data, kBatchSize, sums + fours);
    } else {
      fours += add_fours<true>(stored, batch.count, sums + fours);
    }
  }
  return sum_of_fours(sums, fours);
}

// The sum goes along with the update, which waits for memory.
template <typename Param, typename State>
HOST_DEVICE double update_and_sum_parts(const Span& span,
                                        const Update<ProxL2, Compute<Param>>& update) {
  BlockSums squares;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    const Span part = span.part(first, std::min<int64_t>(span.count - first, kBlockSize));
    squares.add(sum_of_part<Param>(part, [&](const Span& batch) __attribute__((always_inline)) {
      update_part<Param, State>(batch, update);
    }));
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

// A chunk of whole blocks, which are shrunk once all are updated: norms one after another would wait for
// roots, and a chunk's params are still in a cache. Small blocks are, a part's worth at a time.
template <typename Param, typename State>
MULTIVERSION void update_and_shrink_span(const Span& span, const Scalars& scalars) {
  const Update<ProxL2, Compute<Param>> update(scalars);
  const int64_t block = span.row.block;
  const bool small = block <= kBlockSize / 2;
  const int64_t run = small ? kBlockSize / block * block : span.count;
  for (int64_t first = 0; first < span.count; first += run) {
    const Span blocks = span.part(first, std::min(run, span.count - first));
    double sums[kBlockSize];
    const auto for_each_block = [&](auto f) __attribute__((always_inline)) {
      for (int64_t at = 0, i = 0; at < blocks.count; at += block, ++i) {
        f(blocks.part(at, std::min(block, blocks.count - at)), sums[i]);
      }
    };
    if (small) update_part<Param, State>(blocks, update);
    for_each_block([&](const Span& one, double& sum) __attribute__((always_inline)) {
      sum = small ? sum_of_part<Param>(one, [](const Span&) {})
                  : update_and_sum_parts<Param, State>(one, update);
    });
    for_each_block([&](const Span& one, double& sum) __attribute__((always_inline)) {
      sum = ProxL2::shrinkage(sum, scalars.decay, one.count);
    });
    for_each_block([&](const Span& one, double shrinkage)
                       __attribute__((always_inline)) { shrink_part<Param>(one, shrinkage); });
  }
}

}  // namespace adamprox
