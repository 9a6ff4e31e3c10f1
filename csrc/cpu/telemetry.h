// What a tracked step notes of a chunk, on the CPU: from what has just been stored and is still in a
// cache. Tracked steps are few, so this is plain.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math/adam.h"
#include "../math/telemetry.h"
#include "loop.h"
#include "reduction_tree.h"

namespace adamprox {

// The halves of a block's squares are added until one number is left.
template <typename T>
HOST_DEVICE double sum_of_block(T* squares) {
  for (int half = kBlockSize / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) squares[i] = squares[i] + squares[i + half];
  }
  return squares[0];
}

// Calls f(block, values) for each block of a span, `values` being memory for a number an element, zeros
// at first; then adds up their squares. Returns the sum of all.
template <typename T, typename F>
HOST_DEVICE double sum_of_squares(const Span& span, F f) {
  BlockSums sums;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    alignas(64) T values[kBlockSize] = {};
    f(span.part(first, std::min<int64_t>(span.count - first, kBlockSize)), values);
    for (T& value : values) value = value * value;
    sums.add(sum_of_block(values));
  }
  return sums.total();
}

template <typename Param, typename State>
HOST_DEVICE void note_updates(const Span& span, const Scalars& scalars, Record& record) {
  using T = Compute<Param>;
  const auto step_size = static_cast<T>(scalars.step_size), eps = static_cast<T>(scalars.eps);
  const MagnitudeClasses<T> magnitudes(scalars.alpha);
  const TensorRow& row = span.row;
  void* exp_avg_sq = row.states[row.states[kMaxExpAvgSq] != nullptr ? kMaxExpAvgSq : kExpAvgSq];
  constexpr int kLanes = 4;  // so that one count need not wait for the one before
  uint32_t counts[kLanes][kBins + 1] = {};
  record.step = scalars.step;
  record.update_squares =
      sum_of_squares<T>(span, [&](const Span& block, T* updates) __attribute__((always_inline)) {
        const auto update = [=](T& result, T& m, T& v) {
          result = adam_update(m, adam_denominator(v, eps), step_size);
        };
        for_each_element(block, update, Write<T>{updates},
                         Read<State>{block.at<State>(row.states[kExpAvg])},
                         Read<State>{block.at<State>(exp_avg_sq)});
        uint32_t bins[kBlockSize];
        for (int i = 0; i < kBlockSize; ++i) {
          bins[i] =
              updates[i] == updates[i] ? magnitudes.bin(updates[i]) : kBins;  // no bin has a NaN
        }
        for (int64_t i = 0; i < block.count; ++i) ++counts[i % kLanes][bins[i]];
      });
  for (int bin = 0; bin < kBins; ++bin) {
    record.counts[bin] = counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
  }
}

// Once the params are final.
template <typename Param>
HOST_DEVICE void note_params(const Span& span, Record& record) {
  using T = Compute<Param>;
  const auto* params = span.at<Param>(span.row.param);
  record.param_squares =
      sum_of_squares<T>(span, [&](const Span& block, T* values) __attribute__((always_inline)) {
        for_each_element(
            block, [](T& value, T& param) { value = param; }, Write<T>{values},
            Read<Param>{block.at<Param>(span.row.param)});
      });
  uint32_t zeros = 0, nans = 0, infinities = 0;
  for (int64_t i = 0; i < span.count; ++i) {
    const int kind = special_class(Convert<Param>::widen(params[i]));
    zeros += kind == kZeros;
    nans += kind == kNaNs;
    infinities += kind == kInfinities;
  }
  record.counts[kZeros] = zeros;
  record.counts[kNaNs] = nans;
  record.counts[kInfinities] = infinities;
}

}  // namespace adamprox
