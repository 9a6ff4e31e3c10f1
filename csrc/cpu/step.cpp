#include "step.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/reduction_tree.h"
#include "sweeps.h"
#include "threads.h"

#if defined(ADAMPROX_X86)
#include <cpuid.h>
#endif

namespace adamprox {
namespace {

// The widest that this processor runs is chosen.
struct InstructionSet {
  const char* name;
  bool runs_here;
  const Sweeps& sweeps;
};

const std::vector<InstructionSet>& instruction_sets() {
  static const auto sets = [] {
    std::vector<InstructionSet> widest_first;
#if defined(ADAMPROX_X86)
    unsigned eax, ebx, ecx = 0, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    widest_first.push_back({"AVX-512", avx512, sweeps_avx512});
    widest_first.push_back({"AVX2", avx2, sweeps_avx2});
#endif
    widest_first.push_back({"baseline", true, sweeps_baseline});
    return widest_first;
  }();
  return sets;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> widest = [] {
    const auto runs_here = [](const InstructionSet& set) { return set.runs_here; };
    const auto& sets = instruction_sets();
    return &*std::find_if(sets.begin(), sets.end(), runs_here);
  }();
  return widest;
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
    int64_t numel_of_elementwise = 0;
    for (int64_t i = 0; i < elementwise; ++i) numel_of_elementwise += table_.chunks[i].count;
    share_out(elementwise, numel_of_elementwise, [&](int64_t chunk) {
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
    if (has_blocks(span.row.rule) && table_.chunks[chunk].parts > 0) {
      squares = sweeps_.update_part(span, scalars_of(span));
    } else {
      sweeps_.update(span, scalars_of(span));
    }
    if (table_.records != nullptr) {
      sweeps_.note_updates(span, scalars_of(span), table_.records[chunk]);
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
    sweeps_.shrink(span, shrinkage);
    finish_chunk(chunk);
  }

  // What follows from a chunk's params, once they are final.
  void finish_chunk(int64_t chunk) const {
    const Span span = span_of(chunk);
    if (span.row.states[kEma] != nullptr) sweeps_.average(span, scalars_of(span));
    if (table_.records != nullptr) sweeps_.note_params(span, table_.records[chunk]);
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
  const Sweeps& sweeps_ = chosen().load()->sweeps;
};

}  // namespace

std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs_here) names.push_back(set.name);
  }
  return names;
}

const char* cpu_instruction_set() { return chosen().load()->name; }

void use_cpu_instruction_set(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.name == name && set.runs_here) {
      chosen() = &set;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' does not run here");
}

void step_on_cpu(TensorTable& table, int threads) noexcept { Step(table, threads).run(); }

}  // namespace adamprox
