// Compiled for AVX-512, AVX2 and the baseline, with ADAMPROX_SWEEPS as the name. So nothing here may be
// shared with another file: the linker keeps one of two functions of the same name. What is included is
// always inlined, and the rest is in the anonymous namespace.
#include "sweeps.h"

#include <algorithm>
#include <type_traits>

#include "../math/dispatch.h"
#include "../math/update.h"
#include "loop.h"
#include "reduction_tree.h"
#include "telemetry.h"

namespace adamprox {
namespace {

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

template <typename Param, typename State, typename Rule>
HOST_DEVICE void update_part(const Span& part, const Update<Rule, Compute<Param>>& update) {
  with_streams<Param, State>(part, [&](auto... streams) __attribute__((always_inline)) {
    for_each_element(part, update, streams...);
  });
}

template <typename Rule, typename Param, typename State>
__attribute__((noinline)) void update_span(const Span& span, const Scalars& scalars) {
  update_part<Param, State>(span, Update<Rule, Compute<Param>>(scalars));
}

template <typename Param, int kAhead = kPrefetchAhead>
HOST_DEVICE void shrink_part(const Span& part, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element<kAhead>(part, shrink, ReadWrite<Param>{part.at<Param>(part.row.param)});
}

// Params of a block of the reduction tree as they are computed with, in `room` where they are stored
// otherwise; zeros behind fewer.
template <typename Param>
HOST_DEVICE const Compute<Param>* widened(const Param* params, int64_t count,
                                          Compute<Param>* room) {
  if (count < kBlockSize) {
    std::fill_n(room + count, kBlockSize - count, 0);
  } else if constexpr (std::is_same_v<Param, Compute<Param>>) {
    return params;
  } else if constexpr (std::is_same_v<Param, Half>) {
    widen(params, kBlockSize, room);
    return room;
  }
  for (int64_t i = 0; i < count; ++i) room[i] = Convert<Param>::widen(params[i]);
  return room;
}

// Returns the sum of the squares of what is stored, which goes along with the update: that waits for
// memory.
template <typename Param, typename State>
HOST_DEVICE double update_and_sum_parts(const Span& span,
                                        const Update<ProxL2, Compute<Param>>& update) {
  double sums[kChunkSize / kTerms + 16];
  int64_t count = 0;
  for (int64_t first = 0; first < span.count; first += kBlockSize, count += kBlockSize / kTerms) {
    const Span part = span.part(first, std::min<int64_t>(span.count - first, kBlockSize));
    update_part<Param, State>(part, update);
    alignas(64) Compute<Param> room[kBlockSize];
    add_squares(widened(part.at<Param>(span.row.param), part.count, room), sums + count);
  }
  return count == 0 ? 0 : sum_in_place(sums, count);
}

// A part of one of AdamProxL2's blocks: returns the sum of the squares of what is stored.
template <typename Param, typename State>
__attribute__((noinline)) double update_and_sum(const Span& span, const Scalars& scalars) {
  return update_and_sum_parts<Param, State>(span, Update<ProxL2, Compute<Param>>(scalars));
}

template <typename Param>
__attribute__((noinline)) void shrink_span(const Span& span, double shrinkage) {
  shrink_part<Param, kPrefetchAheadAlone>(span, shrinkage);
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

// A chunk of whole blocks, each of which is shrunk while it is in the nearest cache. Small ones are, a
// part's worth at a time, since one by one they would wait for roots.
template <typename Param, typename State>
__attribute__((noinline)) void update_and_shrink_span(const Span& span, const Scalars& scalars) {
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
  for (int64_t first = 0; first < span.count; first += block) {
    const Span one = span.part(first, std::min(block, span.count - first));
    const double sum = update_and_sum_parts<Param, State>(one, update);
    const double shrinkage = ProxL2::shrinkage(sum, scalars.decay, one.count);
    // Memory would have nothing to do meanwhile but for the first strips of the next block: a few at a
    // time, and not too many for the nearest cache.
    int64_t next = first + block + kPrefetchAhead;
    const int64_t enough = std::min(next + 8 * kStripSize, span.count - kStripSize);
    for (int64_t at = 0; at < one.count; at += kBlockSize) {
      for (int strips = 0; strips < 3 && next < enough; ++strips, next += kStripSize) {
        with_streams<Param, State>(span, [&](auto... streams) __attribute__((always_inline)) {
          (prefetch(streams, next), ...);
        });
      }
      shrink_part<Param>(one.part(at, std::min<int64_t>(kBlockSize, one.count - at)), shrinkage);
    }
  }
}

// ema <- ema + (1 - ema_decay) * (param - ema), of the final param.
template <typename Param>
__attribute__((noinline)) void average_span(const Span& span, const Scalars& scalars) {
  using T = Compute<Param>;
  const auto one_minus_ema = static_cast<T>(scalars.one_minus_ema);
  const auto average = [=](T& param, T& ema) { update_moment(ema, param, one_minus_ema); };
  for_each_element(span, average, Read<Param>{span.at<Param>(span.row.param)},
                   ReadWrite<T>{span.at<T>(span.row.states[kEma])});
}

// Calls f with the row's types.
template <typename F>
void with_dtypes_of(const Span& span, F f) {
  with_dtypes(span.row.param_dtype, span.row.state_dtype, f);
}

template <typename F>
void with_dtype_of(const Span& span, F f) {
  with_dtype(span.row.param_dtype, f);
}

template <typename T>
using TypeOf = typename T::type;

}  // namespace

extern const Sweeps ADAMPROX_SWEEPS;
const Sweeps ADAMPROX_SWEEPS = {
    [](const Span& span, const Scalars& scalars) {
      double squares = 0;
      with_dtypes_of(span, [&](auto param, auto state) {
        squares = update_and_sum<TypeOf<decltype(param)>, TypeOf<decltype(state)>>(span, scalars);
      });
      return squares;
    },
    [](const Span& span, const Scalars& scalars) {
      with_rule(span.row.rule, [&](auto rule) {
        with_dtypes_of(span, [&](auto param, auto state) {
          using Rule = TypeOf<decltype(rule)>;
          using Param = TypeOf<decltype(param)>;
          using State = TypeOf<decltype(state)>;
          if constexpr (std::is_same_v<Rule, ProxL2>) {
            update_and_shrink_span<Param, State>(span, scalars);
          } else {
            if constexpr (!std::is_void_v<typename Rule::Plain>) {
              if (Rule::is_plain(scalars.decay)) {
                return update_span<typename Rule::Plain, Param, State>(span, scalars);
              }
            }
            update_span<Rule, Param, State>(span, scalars);
          }
        });
      });
    },
    [](const Span& span, double shrinkage) {
      with_dtype_of(span,
                    [&](auto param) { shrink_span<TypeOf<decltype(param)>>(span, shrinkage); });
    },
    [](const Span& span, const Scalars& scalars) {
      with_dtype_of(span,
                    [&](auto param) { average_span<TypeOf<decltype(param)>>(span, scalars); });
    },
    [](const Span& span, const Scalars& scalars, Record& record) {
      with_dtypes_of(span, [&](auto param, auto state) {
        note_updates<TypeOf<decltype(param)>, TypeOf<decltype(state)>>(span, scalars, record);
      });
    },
    [](const Span& span, Record& record) {
      with_dtype_of(span, [&](auto param) { note_params<TypeOf<decltype(param)>>(span, record); });
    },
};

}  // namespace adamprox
