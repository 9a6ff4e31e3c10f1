#include "step.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>
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

class Step {
 public:
  Step(const TensorTable& table, int threads) : table_(table), threads_(threads) {}

  // Every chunk is updated. A tensor of AdamProxL2 is shrunk when all of its chunks have been, soon
  // enough to find what was updated last in the cache.
  void run() const {
    // Kept, since an allocation amid a training loop may have to sort all that a backward pass has freed.
    thread_local std::vector<Item> items;
    thread_local std::vector<double> sums;
    thread_local std::deque<RowProgress> progress;
    const bool blocks = table_.num_of_blocks > 0;
    put_in_order(items);
    if (blocks && sums.size() < table_.chunks.size()) sums.resize(table_.chunks.size());
    while (blocks && progress.size() < table_.rows.size()) progress.emplace_back();
    for (size_t row = 0; blocks && row < table_.rows.size(); ++row) {
      progress[row].updated.store(0, std::memory_order_relaxed);
      progress[row].ready.store(false, std::memory_order_relaxed);
    }
    // By reference: the names are those of the thread that reads them.
    auto& in_order = items;
    auto& squares_of = sums;
    auto& progress_of = progress;
    const auto count = static_cast<int64_t>(blocks ? in_order.size() : table_.chunks.size());
    share_out(count, [&](int64_t i) {
      const int64_t chunk = blocks ? in_order[i].chunk : i;
      const Span span = span_of(chunk);
      if (!has_blocks(span.row.rule)) {
        update_chunk(span, chunk);
        return finish_chunk(span, chunk);
      }
      const int64_t chunks = num_chunks_of(span.row.numel);
      RowProgress& p = progress_of[table_.chunks[chunk].row];
      if (!in_order[i].shrinks) {
        squares_of[chunk] = update_chunk(span, chunk);
        if (p.updated.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
        WaitingSums<> squares;
        for (int64_t c = 0; c < chunks; ++c) squares.add(c, squares_of[span.row.first_chunk + c]);
        p.shrinkage = ProxL2::shrinkage(squares.total(chunks), scalars_of(span).decay[0]);
        p.ready.store(true, std::memory_order_release);
        if (chunks > 1) return;
      }
      // Items are taken in order, so the updates that this one waits for are under way.
      while (!p.ready.load(std::memory_order_acquire)) std::this_thread::yield();
      with_dtype(span.row.param_dtype, [&](auto param) {
        shrink_span<typename decltype(param)::type>(span, p.shrinkage);
      });
      finish_chunk(span, chunk);
    });
  }

 private:
  struct Item {  // what there is to do: one of a chunk's two sweeps
    uint32_t chunk : 31, shrinks : 1;
  };

  struct RowProgress {
    std::atomic<int64_t> updated{0};
    double shrinkage = 0;
    std::atomic<bool> ready{false};
  };

  // The second sweep of a tensor goes backwards, from what is still cached, and begins a few chunks
  // into the next tensor, so that no thread waits for the last of its updates. None without blocks.
  void put_in_order(std::vector<Item>& items) const {
    items.clear();
    if (table_.num_of_blocks == 0) return;
    const TensorRow* previous = nullptr;
    const auto shrink_previous = [&] {
      if (previous == nullptr) return;
      for (int64_t i = num_chunks_of(previous->numel); i-- > 0;) {
        items.push_back({static_cast<uint32_t>(previous->first_chunk + i), 1});
      }
      previous = nullptr;
    };
    for (const TensorRow& row : table_.rows) {
      const int64_t chunks = num_chunks_of(row.numel);
      for (int64_t i = 0; i < chunks; ++i) {
        items.push_back({static_cast<uint32_t>(row.first_chunk + i), 0});
        if (i + 1 == threads_) shrink_previous();
      }
      if (chunks > 1) {
        shrink_previous();
        if (has_blocks(row.rule)) previous = &row;
      }
    }
    shrink_previous();
  }

  Span span_of(int64_t chunk) const {
    const Chunk& c = table_.chunks[chunk];
    const TensorRow& row = table_.rows[c.row];
    const int64_t first = int64_t{c.index} * kChunkSize;
    return Span{row, table_.grads[c.row], first, std::min(row.numel - first, kChunkSize), 0};
  }

  const Scalars& scalars_of(const Span& span) const { return table_.scalars[span.row.scalars]; }

  // Returns, for AdamProxL2, the sum of the squares of the new params.
  double update_chunk(const Span& span, int64_t chunk) const {
    double squares = 0;
    with_rule(span.row.rule, [&](auto rule) {
      with_dtypes(span.row.param_dtype, span.row.state_dtype, [&](auto param, auto state) {
        using Rule = typename decltype(rule)::type;
        using Param = typename decltype(param)::type;
        using State = typename decltype(state)::type;
        if constexpr (std::is_same_v<Rule, ProxL2>) {
          squares = update_and_sum<Param, State>(span, scalars_of(span));
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

  // What follows from a chunk's params, once they are final.
  void finish_chunk(const Span& span, int64_t chunk) const {
    with_dtype(span.row.param_dtype, [&](auto param) {
      using Param = typename decltype(param)::type;
      if (span.row.states[kEma] != nullptr) average_span<Param>(span, scalars_of(span));
      if (table_.records != nullptr) note_params<Param>(span, table_.records[chunk]);
    });
  }

  // Calls f(0), ..., f(count - 1), begun in this order, on several threads where it pays.
  template <typename F>
  void share_out(int64_t count, F f) const {
    const int64_t useful = std::max<int64_t>(1, table_.numel / kElementsPerThread);
    const int threads = static_cast<int>(std::min<int64_t>(threads_, useful));
    // A thread takes about a full chunk's worth at a time, and has several turns, so that one that
    // starts late or is disturbed does not hold up the others.
    const int64_t worth = kChunkSize * count / std::max<int64_t>(1, table_.numel);
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

  const TensorTable& table_;
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

void step_on_cpu(const TensorTable& table, int threads) { Step(table, threads).run(); }

}  // namespace adamprox
