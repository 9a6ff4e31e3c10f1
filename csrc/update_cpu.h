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

// Calls f with the streams of a step: with a fifth one for amsgrad.
template <typename Param, typename State, typename F>
HOST_DEVICE void with_streams(const Span& span, F f) {
  const TensorRow& row = span.row;
  const auto call = [&](auto... max_exp_avg_sq) __attribute__((always_inline)) {
    f(ReadWrite<Param>{span.at<Param>(row.param)}, Read<Param>{span.at<Param>(span.grad)},
      ReadWrite<State>{span.at<State>(row.exp_avg)},
      ReadWrite<State>{span.at<State>(row.exp_avg_sq)}, max_exp_avg_sq...);
  };
  if (row.max_exp_avg_sq == nullptr) {
    call();
  } else {
    call(ReadWrite<State>{span.at<State>(row.max_exp_avg_sq)});
  }
}

template <typename Rule, typename Param, typename State>
MULTIVERSION void update_span(const Span& span, const Scalars& scalars) {
  const Update<Rule, Compute<Param>> update(scalars);
  with_streams<Param, State>(span, [&](auto... streams) __attribute__((always_inline)) {
    for_each_element(span, update, streams...);
  });
}

// Calls f(block) for what is so little that it is in the first cache when it is looked at again.
template <typename F>
HOST_DEVICE void for_each_block(const Span& span, F f) {
  for (int64_t i = 0; i < span.count; i += kBlockSize) {
    f(span.part(i, std::min<int64_t>(span.count - i, kBlockSize)));
  }
}

// AdamProxL2's: returns the sum of the squares of what is stored. They are taken a few strips at a
// time, of those before the ones that have just been stored, so that memory is asked for all the
// time and nobody waits for a store.
template <typename Param, typename State>
MULTIVERSION double update_and_sum(const Span& span, const Scalars& scalars) {
  const Update<ProxL2, Compute<Param>> update(scalars);
  BlockSums squares;
  for_each_block(span, [&](const Span& block) __attribute__((always_inline)) {
    double sums[kBlockSize / 4];
    int64_t fours = 0;
    const auto add = [&](const auto* stored, int64_t count) __attribute__((always_inline)) {
      fours += add_fours<Squares>(stored, count, sums + fours);
    };
    const auto add_few = [&](int64_t first) __attribute__((always_inline)) {
      Few few(Read<Param>{block.at<Param>(span.row.param) + first}, false);
      add(few.seen().data, kFewSize);
    };
    int64_t i = 0;
    for (; i + kFewSize <= block.count; i += kFewSize) {
      const Span few = block.part(i, kFewSize);
      with_streams<Param, State>(few, [&](auto... streams) __attribute__((always_inline)) {
        for_each_of_few(few.after >= kPrefetchAhead, update, streams...);
      });
      if (i > 0) add_few(i - kFewSize);
    }
    if (i > 0) add_few(i - kFewSize);
    if (i < block.count) {
      const Span rest = block.part(i, block.count - i);
      with_streams<Param, State>(rest, [&](auto... streams) __attribute__((always_inline)) {
        for_each_element(rest, update, streams...);
      });
      add(rest.at<Param>(span.row.param), rest.count);
    }
    squares.add(sum_of_fours(sums, fours));
  });
  return squares.total();
}

// Whole blocks of float32: what a few strips have been updated by is noted while the next are.
template <typename Rule, typename Param, typename State>
MULTIVERSION void update_and_note(const Span& span, const Scalars& scalars, ChunkNotes& notes) {
  using T = Compute<Param>;
  const Update<Rule, T> update(scalars);
  const Note<T> note(scalars.alpha);
  const auto keep = [=](T& kept, auto&... elements) { kept = update(elements...); };
  BlockNotes<T> of_block;
  for (int64_t first = 0; first < span.count; first += kBlockSize) {
    for (int at = 0; at < kBlockSize; at += kFewSize) {
      const Span few = span.part(first + at, kFewSize);
      alignas(64) T updates[kFewSize];
      with_streams<Param, State>(few, [&](auto... streams) __attribute__((always_inline)) {
        for_each_of_few(few.after >= kPrefetchAhead, keep, Write<T>{updates}, streams...);
      });
      for_each_of<kFewSize>(0, note, Write<uint32_t>{of_block.classes + at},
                            Write<T>{of_block.update_squares + at},
                            Write<T>{of_block.param_squares + at}, Read<T>{updates},
                            Read<Param>{few.at<Param>(span.row.param)});
    }
    add_block(of_block, kBlockSize, notes);
  }
}

// Anything else, which is less to compile: a block, from what has been stored and is in the cache.
template <typename Param, typename State>
MULTIVERSION void note_block(const Span& block, const Scalars& scalars, ChunkNotes& notes) {
  using T = Compute<Param>;
  const auto step_size = static_cast<T>(scalars.step_size), eps = static_cast<T>(scalars.eps);
  const Note<T> note(scalars.alpha);
  const TensorRow& row = block.row;
  void* exp_avg_sq = row.max_exp_avg_sq != nullptr ? row.max_exp_avg_sq : row.exp_avg_sq;
  const auto step = [=](uint32_t& classes, T& update_square, T& param_square, T& param, T& m,
                        T& v) {
    note(classes, update_square, param_square, adam_update(m, v, step_size, eps), param);
  };
  BlockNotes<T> of_block;
  for_each_element(
      block.alone(), step, Write<uint32_t>{of_block.classes}, Write<T>{of_block.update_squares},
      Write<T>{of_block.param_squares}, Read<Param>{block.at<Param>(row.param)},
      Read<State>{block.at<State>(row.exp_avg)}, Read<State>{block.at<State>(exp_avg_sq)});
  call_add_block(of_block, block.count, notes);
}

// A tracked step's; returns the same for AdamProxL2, whose params are noted once they have shrunk.
template <typename Rule, typename Param, typename State>
double update_and_note(const Span& span, const Scalars& scalars, Record& record) {
  constexpr bool kFinal = !std::is_same_v<Rule, ProxL2>;
  BlockSums squares;
  ChunkNotes notes;
  int64_t done = 0;
  if constexpr (kFinal && std::is_same_v<Param, float>) {
    done = span.count - span.count % kBlockSize;
    update_and_note<Rule, Param, State>(span.part(0, done), scalars, notes);
  }
  for_each_block(span.part(done, span.count - done), [&](const Span& block) {
    if constexpr (kFinal) {
      update_span<Rule, Param, State>(block, scalars);
    } else {
      squares.add(update_and_sum<Param, State>(block, scalars));
    }
    note_block<Param, State>(block, scalars, notes);
  });
  record.step = scalars.step;
  notes.write(record);
  if (kFinal) count_special(span.at<Param>(span.row.param), span.count, record);
  return squares.total();
}

// Four places at a time, as many as there are streams in a step: one stream would leave memory idle.
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

template <typename Param>
MULTIVERSION void note_params(const Span& span, ChunkNotes& notes) {
  using T = Compute<Param>;
  const auto note = [](auto&... elements) { Note<T>::note_param(elements...); };
  BlockNotes<T> of_block{};
  for_each_block(span, [&](const Span& block) __attribute__((always_inline)) {
    for_each_element(block, note, Write<uint32_t>{of_block.classes},
                     Write<T>{of_block.param_squares},
                     Read<Param>{block.at<Param>(span.row.param)});
    call_add_block(of_block, block.count, notes);
  });
}

// AdamProxL2's params, once they have shrunk.
template <typename Param>
void note_params(const Span& span, Record& record) {
  ChunkNotes notes;
  note_params<Param>(span, notes);
  Record of_params;
  notes.write(of_params);
  record.param_squares = of_params.param_squares;
  std::copy(of_params.counts + kZeros, of_params.counts + kCounts, record.counts + kZeros);
  count_special(span.at<Param>(span.row.param), span.count, record);
}

}  // namespace adamprox
