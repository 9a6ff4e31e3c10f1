#include "step.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "../math/dispatch.h"
#include "sweeps.h"
#include "telemetry.h"
#include "threads.h"

namespace adamprox {
namespace {

// ema <- ema + (1 - ema_decay) * (param - ema), of the final param.
template <typename Param>
MULTIVERSION void average_span(const Span& span, const Scalars& scalars) {
  using T = Compute<Param>;
  const auto one_minus_ema = static_cast<T>(scalars.one_minus_ema);
  const auto average = [=](T& param, T& ema) { update_moment(ema, param, one_minus_ema); };
  for_each_element(span, average, Read<Param>{span.at<Param>(span.row.param)},
                   ReadWrite<T>{span.at<T>(span.row.states[kEma])});
}

// Below this many elements, waking a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;
// AdamProxL2's blocks are shrunk while they are in a cache: one of up to kAlone chunks by the thread that
// updates it, larger ones in batches.
constexpr int64_t kAlone = 2 * kElementsPerThread / kChunkSize;
constexpr int64_t kBatchPerThread = 8 * kElementsPerThread;

class Step {
 public:
  Step(TensorTable& table, int threads) : table_(table), threads_(threads) {}

  void run() const {
    const auto all = static_cast<int64_t>(table_.chunks.size());
    const int64_t elementwise = all - table_.num_of_blocks;
    share_out(elementwise, table_.numel, [&](int64_t chunk) {
      update_chunk(chunk);
      finish_chunk(chunk);
    });
    for (int64_t begin = elementwise, end = begin; begin < all; begin = end) {
      int64_t numel = 0, numel_of_large = 0;
      while (end < all && numel_of_large < threads_ * kBatchPerThread) {
        const bool large = is_large(end);
        for (const int64_t after = end_of_block(end); end < after; ++end) {
          numel += table_.chunks[end].count;
          numel_of_large += large ? table_.chunks[end].count : 0;
        }
      }
      share_out(end - begin, numel, [&](int64_t i) {
        const int64_t chunk = begin + i;
        if (is_large(chunk)) {
          table_.sums[chunk] = update_chunk(chunk);
        } else if (table_.chunks[chunk].first == chunk) {
          update_and_shrink(chunk);
        }
      });
      if (numel_of_large == 0) continue;
      for (int64_t chunk = begin; chunk < end; chunk = end_of_block(chunk)) {
        if (is_large(chunk)) sum_block(chunk);
      }
      // Backwards, from what is still cached.
      share_out(end - begin, numel_of_large, [&](int64_t i) {
        const int64_t chunk = end - 1 - i;
        if (is_large(chunk)) shrink_chunk(chunk);
      });
    }
  }

 private:
  Span span_of(int64_t chunk) const {
    const Chunk& c = table_.chunks[chunk];
    return Span{table_.rows[c.row], table_.grads[c.row], c.begin, c.count, 0};
  }

  const Scalars& scalars_of(const Span& span) const { return table_.scalars[span.row.scalars]; }

  bool is_large(int64_t chunk) const { return table_.chunks[chunk].parts > kAlone; }

  // `first` is the first chunk of a block, or has several blocks. Returns the chunk behind them.
  int64_t end_of_block(int64_t first) const {
    return first + std::max(table_.chunks[first].parts, 1);
  }

  // Returns, for a part of a block of AdamProxL2, the sum of the squares of the new params; whole blocks
  // are shrunk.
  double update_chunk(int64_t chunk) const {
    const Span span = span_of(chunk);
    double squares = 0;
    with_rule(span.row.rule, [&](auto rule) {
      with_dtypes(span.row.param_dtype, span.row.state_dtype, [&](auto param, auto state) {
        using Rule = typename decltype(rule)::type;
        using Param = typename decltype(param)::type;
        using State = typename decltype(state)::type;
        if constexpr (std::is_same_v<Rule, ProxL2>) {
          if (table_.chunks[chunk].parts > 0) {
            squares = update_and_sum<Param, State>(span, scalars_of(span));
          } else {
            update_and_shrink_span<Param, State>(span, scalars_of(span));
          }
        } else if constexpr (std::is_void_v<typename Rule::Plain>) {
          update_span<Rule, Param, State>(span, scalars_of(span));
        } else if (Rule::is_plain(scalars_of(span).decay)) {
          update_span<typename Rule::Plain, Param, State>(span, scalars_of(span));
        } else {
          update_span<Rule, Param, State>(span, scalars_of(span));
        }
      });
    });
    if (table_.records != nullptr) {
      with_dtypes(span.row.param_dtype, span.row.state_dtype, [&](auto param, auto state) {
        note_updates<typename decltype(param)::type, typename decltype(state)::type>(
            span, scalars_of(span), table_.records[chunk]);
      });
    }
    return squares;
  }

  double sum_of_chunks(int64_t first, int64_t count) const {
    WaitingSums<> squares;
    for (int64_t i = 0; i < count; ++i) squares.add(i, table_.sums[first + i]);
    return squares.total(count);
  }

  // From the sums of its chunks, the block's at the place of the first; of several tensors, from theirs.
  void sum_block(int64_t first) const {
    const Chunk& chunk = table_.chunks[first];
    const int32_t tensors = table_.rows[chunk.row].num_slots;
    double sum;
    if (tensors == 0) {
      sum = sum_of_chunks(first, chunk.parts);
    } else {
      WaitingSums<> squares;
      int64_t at = first;
      for (int32_t i = 0; i < tensors; ++i) {
        const int64_t count = num_chunks_of(table_.rows[table_.chunks[at].row].numel);
        squares.add(i, sum_of_chunks(at, count));
        at += count;
      }
      sum = squares.total(tensors);
    }
    table_.sums[first] = sum;
  }

  void update_and_shrink(int64_t first) const {
    const int64_t end = end_of_block(first);
    for (int64_t chunk = first; chunk < end; ++chunk) table_.sums[chunk] = update_chunk(chunk);
    if (table_.chunks[first].parts == 0) return finish_chunk(first);
    sum_block(first);
    for (int64_t chunk = end; chunk-- > first;) shrink_chunk(chunk);
  }

  void shrink_chunk(int64_t chunk) const {
    const Span span = span_of(chunk);
    const Chunk& c = table_.chunks[chunk];
    const double shrinkage = ProxL2::shrinkage(table_.sums[c.first], scalars_of(span).decay,
                                               numel_of_block(span.row, c, chunk));
    with_dtype(span.row.param_dtype,
               [&](auto param) { shrink_span<typename decltype(param)::type>(span, shrinkage); });
    finish_chunk(chunk);
  }

  // What follows from a chunk's params, once they are final.
  void finish_chunk(int64_t chunk) const {
    const Span span = span_of(chunk);
    with_dtype(span.row.param_dtype, [&](auto param) {
      using Param = typename decltype(param)::type;
      if (span.row.states[kEma] != nullptr) average_span<Param>(span, scalars_of(span));
      if (table_.records != nullptr) note_params<Param>(span, table_.records[chunk]);
    });
  }

  // Calls f(0), ..., f(count - 1), of `numel` elements in all, on several threads where it pays.
  template <typename F>
  void share_out(int64_t count, int64_t numel, F f) const {
    if (count == 0) return;
    const int64_t useful = std::max<int64_t>(1, numel / kElementsPerThread);
    const int threads = static_cast<int>(std::min<int64_t>(threads_, useful));
    // A thread takes about a full chunk's worth at a time, and has several turns, so that one that
    // starts late or is disturbed does not hold up the others.
    const int64_t worth = kChunkSize * count / std::max<int64_t>(1, numel);
    const int64_t take = std::max<int64_t>(1, std::min(worth, count / (16 * threads)));
    std::atomic<int64_t> next{0};
    run_in_parallel(threads - 1, [&] {
      for (;;) {
        const int64_t begin = next.fetch_add(take, std::memory_order_relaxed);
        if (begin >= count) return;
        const int64_t end = std::min(begin + take, count);
        for (int64_t i = begin; i < end; ++i) f(i);
      }
    });
  }

  TensorTable& table_;
  const int threads_;
};

// Asks the same dispatcher that chooses among the clones.
#if defined(ADAMPROX_TARGET_CLONES)
__attribute__((target("arch=x86-64-v4"))) const char* instruction_set() { return "AVX-512"; }
__attribute__((target("arch=x86-64-v3"))) const char* instruction_set() { return "AVX2"; }
__attribute__((target("default")))
#endif
const char* instruction_set() {
  return "baseline";
}

}  // namespace

const char* cpu_instruction_set() { return instruction_set(); }

void step_on_cpu(TensorTable& table, int threads) noexcept { Step(table, threads).run(); }

}  // namespace adamprox
