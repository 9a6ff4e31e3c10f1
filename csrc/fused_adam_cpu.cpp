// One step on the CPU: threads share out the table's chunks; each loop is compiled for AVX-512,
// AVX2 and the baseline from the one definition in update.h, and chosen when the library loads.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "fused_adam.h"
#include "multi_tensor_apply_cpu.h"
#include "reduction_tree.h"
#include "thread_pool.h"
#include "update.h"

#if defined(ADAMPROX_TARGET_CLONES)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

namespace adamprox {
namespace {

// Below this many elements, waking a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

struct Span {  // some elements of one row
  const TensorRow& row;
  void* grad;
  int64_t begin, count;

  template <typename T>
  T* at(void* data) const {
    return static_cast<T*>(data) + begin;
  }
};

template <typename Rule, typename Param, typename State>
MULTIVERSION void update_span(const Span& span, const Scalars& scalars) {
  const TensorRow& row = span.row;
  const Update<Rule, Compute<Param>> update(scalars);
  const ReadWrite<Param> param{span.at<Param>(row.param)};
  const Read<Param> grad{span.at<Param>(span.grad)};
  const ReadWrite<State> exp_avg{span.at<State>(row.exp_avg)};
  const ReadWrite<State> exp_avg_sq{span.at<State>(row.exp_avg_sq)};
  if (row.max_exp_avg_sq == nullptr) {
    for_each_element(span.count, update, param, grad, exp_avg, exp_avg_sq);
  } else {
    const ReadWrite<State> max_exp_avg_sq{span.at<State>(row.max_exp_avg_sq)};
    for_each_element(span.count, update, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  }
}

template <typename Term, typename Storage>
MULTIVERSION void add_to_lanes(const Storage* values, int64_t count, double* lanes) {
  for_each_element(count, Term{}, Read<Storage>{values}, ReadWrite<double>{lanes});
}

template <typename Term, typename Storage>
double tree_sum(const Storage* values, int64_t count) {
  double lanes[kTileSize];
  const int64_t active = std::min(count, kTileSize);
  std::fill_n(lanes, active, 0.0);
  for (int64_t i = 0; i < count; i += kTileSize) {
    add_to_lanes<Term>(values + i, std::min(count - i, kTileSize), lanes);
  }
  return sum_lanes(lanes, active, 0, 1, [] {});
}

template <typename Param>
MULTIVERSION void shrink_span(const Span& span, double shrinkage) {
  const Shrink<Compute<Param>> shrink{static_cast<Compute<Param>>(shrinkage)};
  for_each_element(span.count, shrink, ReadWrite<Param>{span.at<Param>(span.row.param)});
}

class Step {
 public:
  Step(const TensorTable& table, int threads) : table_(table), threads_(threads) {}

  template <typename Rule>
  void update() const {
    for_each_chunk([&](int64_t, const Span& span) { update_chunk<Rule>(span); });
  }

  // AdamProxL2: the second sweep needs the norms, so every chunk's sum of squares.
  void update_and_shrink() const {
    std::vector<double> sums(table_.chunks.size());
    for_each_chunk([&](int64_t chunk, const Span& span) {
      update_chunk<ProxL2>(span);
      with_dtype(span.row.param_dtype, [&](auto param) {
        using Param = typename decltype(param)::type;
        sums[chunk] = tree_sum<AddSquare>(span.at<Param>(span.row.param), span.count);
      });
    });
    std::vector<double> shrinkages;
    for (const TensorRow& row : table_.rows) {
      const double sum = tree_sum<Add>(&sums[row.first_chunk], TensorTable::num_chunks(row.numel));
      shrinkages.push_back(ProxL2::shrinkage(sum, table_.scalars[row.scalars].decay));
    }
    for_each_chunk([&](int64_t chunk, const Span& span) {
      with_dtype(span.row.param_dtype, [&](auto param) {
        shrink_span<typename decltype(param)::type>(span, shrinkages[table_.chunks[chunk].row]);
      });
    });
  }

 private:
  template <typename Rule>
  void update_chunk(const Span& span) const {
    with_dtypes(span.row.param_dtype, span.row.state_dtype, [&](auto param, auto state) {
      using Param = typename decltype(param)::type;
      using State = typename decltype(state)::type;
      update_span<Rule, Param, State>(span, table_.scalars[span.row.scalars]);
    });
  }

  template <typename F>
  void for_each_chunk(F f) const {
    const int64_t chunks = static_cast<int64_t>(table_.chunks.size());
    const int64_t useful = std::max<int64_t>(1, table_.numel / kElementsPerThread);
    const int threads = static_cast<int>(std::min<int64_t>(threads_, useful));
    // Several takes a thread, so that one that starts late or is disturbed holds up nobody.
    const int64_t take = std::max<int64_t>(1, std::min<int64_t>(64, chunks / (8 * threads)));
    std::atomic<int64_t> next{0};
    run_in_parallel(threads - 1, [&] {
      for (;;) {
        const int64_t begin = next.fetch_add(take, std::memory_order_relaxed);
        if (begin >= chunks) return;
        const int64_t end = std::min(begin + take, chunks);
        for (int64_t i = begin; i < end; ++i) {
          const Chunk& chunk = table_.chunks[i];
          const TensorRow& row = table_.rows[chunk.row];
          const int64_t first = int64_t{chunk.index} * kChunkSize;
          const int64_t count = std::min(row.numel - first, kChunkSize);
          f(i, Span{row, table_.grads[chunk.row], first, count});
        }
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
