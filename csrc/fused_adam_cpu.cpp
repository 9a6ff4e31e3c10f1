// One step on the CPU: threads share out the table's chunks.
#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "fused_adam.h"
#include "multi_tensor_apply_cpu.h"
#include "thread_pool.h"
#include "update_cpu.h"

namespace adamprox {
namespace {

// Below this many elements, waking a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

class Step {
 public:
  Step(const TensorTable& table, int threads) : table_(table), threads_(threads) {}

  template <typename Rule>
  void update() const {
    share_out(static_cast<int64_t>(table_.chunks.size()),
              [&](int64_t chunk) { update_chunk<Rule>(span_of(chunk), chunk); });
  }

  // AdamProxL2. A tensor of one chunk shrinks at once; one of several when all of them have been
  // updated, soon enough to find what was updated last in the cache.
  void update_and_shrink() const {
    const std::vector<Item> items = items_in_order();
    std::vector<double> sums(table_.chunks.size());
    std::vector<RowProgress> progress(table_.rows.size());
    share_out(static_cast<int64_t>(items.size()), [&](int64_t i) {
      const int64_t chunk = items[i].chunk;
      const int32_t index = table_.chunks[chunk].row;
      const TensorRow& row = table_.rows[index];
      const int64_t chunks = TensorTable::num_chunks(row.numel);
      const Span span = span_of(chunk);
      RowProgress& p = progress[index];
      if (!items[i].shrinks) {
        sums[chunk] = update_chunk<ProxL2>(span, chunk);
        if (p.updated.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
        WaitingSums<> squares;
        for (int64_t i = 0; i < chunks; ++i) squares.add(i, sums[row.first_chunk + i]);
        p.shrinkage = ProxL2::shrinkage(squares.total(chunks), table_.scalars[row.scalars].decay);
        p.ready.store(true, std::memory_order_release);
        if (chunks > 1) return;
      }
      // Items are taken in order, so the updates that this one waits for are under way.
      while (!p.ready.load(std::memory_order_acquire)) std::this_thread::yield();
      shrink_chunk(span, p.shrinkage);
      if (tracked()) note_chunk(span, chunk);
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
  // into the next tensor, so that nobody waits for the last of its updates.
  std::vector<Item> items_in_order() const {
    std::vector<Item> items;
    items.reserve(2 * table_.chunks.size());
    const TensorRow* previous = nullptr;
    const auto shrink_previous = [&] {
      if (previous == nullptr) return;
      for (int64_t i = TensorTable::num_chunks(previous->numel); i-- > 0;) {
        items.push_back({static_cast<uint32_t>(previous->first_chunk + i), 1});
      }
      previous = nullptr;
    };
    for (const TensorRow& row : table_.rows) {
      const int64_t chunks = TensorTable::num_chunks(row.numel);
      for (int64_t i = 0; i < chunks; ++i) {
        items.push_back({static_cast<uint32_t>(row.first_chunk + i), 0});
        if (i + 1 == threads_) shrink_previous();
      }
      if (chunks > 1) {
        shrink_previous();
        previous = &row;
      }
    }
    shrink_previous();
    return items;
  }

  Span span_of(int64_t chunk) const {
    const Chunk& c = table_.chunks[chunk];
    const TensorRow& row = table_.rows[c.row];
    const int64_t first = int64_t{c.index} * kChunkSize;
    return Span{row, table_.grads[c.row], first, std::min(row.numel - first, kChunkSize), 0};
  }

  // Returns, for AdamProxL2, the sum of the squares of the new params.
  template <typename Rule>
  double update_chunk(const Span& span, int64_t chunk) const {
    double squares = 0;
    with_dtypes(span.row.param_dtype, span.row.state_dtype, [&](auto param, auto state) {
      using Param = typename decltype(param)::type;
      using State = typename decltype(state)::type;
      const Scalars& scalars = table_.scalars[span.row.scalars];
      if (tracked()) {
        squares = update_and_note<Rule, Param, State>(span, scalars, table_.records[chunk]);
      } else if constexpr (std::is_same_v<Rule, ProxL2>) {
        squares = update_and_sum<Param, State>(span, scalars);
      } else {
        update_span<Rule, Param, State>(span, scalars);
      }
    });
    return squares;
  }

  bool tracked() const { return table_.records != nullptr; }

  // Of AdamProxL2's params, once they have shrunk.
  void note_chunk(const Span& span, int64_t chunk) const {
    with_dtype(span.row.param_dtype, [&](auto param) {
      note_params<typename decltype(param)::type>(span, table_.records[chunk]);
    });
  }

  static void shrink_chunk(const Span& span, double shrinkage) {
    with_dtype(span.row.param_dtype,
               [&](auto param) { shrink_span<typename decltype(param)::type>(span, shrinkage); });
  }

  // Calls f(0), ..., f(count - 1), begun in this order, on several threads where it pays.
  template <typename F>
  void share_out(int64_t count, F f) const {
    const int64_t useful = std::max<int64_t>(1, table_.numel / kElementsPerThread);
    const int threads = static_cast<int>(std::min<int64_t>(threads_, useful));
    // A thread takes about a full chunk's worth at a time, and has several turns, so that one that
    // starts late or is disturbed holds up nobody.
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

// Asks the same dispatcher that chooses among the clones above.
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

void fused_adam_cpu(const TensorTable& table, int threads) {
  const Step step(table, threads);
  with_rule(table.decay, [&](auto rule) {
    using Rule = typename decltype(rule)::type;
    if constexpr (std::is_same_v<Rule, ProxL2>) {
      step.update_and_shrink();
    } else {
      step.update<Rule>();
    }
  });
}

}  // namespace adamprox
