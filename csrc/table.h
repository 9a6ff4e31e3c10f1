// The table that one step hands to a backend: pointers, sizes, types and scalars; no maths.
#pragma once

#include <cstdint>
#include <vector>

#include "math/recipes.h"
#include "math/telemetry.h"

namespace adamprox {

// A tile is a Triton block, 256 threads of 8 elements, and what a tracked CUDA step does in a turn.
// A chunk is the unit of work that threads and blocks share out.
constexpr int64_t kTileSize = 2048;
constexpr int64_t kChunkSize = 8 * kTileSize;
// A tensor up to this size is a warp's work on a GPU; several of them are a block's.
constexpr int64_t kPackedNumel = 1024;

struct TensorRow {
  void* param;
  void* states[kStates];  // null where there is none
  int64_t numel;          // reals: a complex number counts twice
  int32_t scalars;        // index into TensorTable::scalars
  int32_t first_chunk;    // index of this tensor's first chunk
  DType param_dtype;      // of param and grad
  DType state_dtype;      // of the moments
  Decay rule;
  uint8_t aligned;    // 1: all pointers are multiples of 16 bytes, grad's included
  uint8_t unused[4];  // named, so that equal rows are equal bytes
};
static_assert(sizeof(TensorRow) == 8 * (4 + kStates), "Triton reads it as words");

struct Chunk {
  int32_t row;
  int32_t index;  // within the tensor: it starts at index * kChunkSize
};

HOST_DEVICE constexpr int64_t num_chunks_of(int64_t numel) {
  return (numel + kChunkSize - 1) / kChunkSize;
}

// How far a tensor of AdamProxL2 is on a GPU.
struct Progress {
  uint32_t done;  // at a tensor's first chunk: how many it has updated, and then shrunk
  int32_t below;  // the chunk that the same block put aside before this one, or -1
};

// Where the kernels on a GPU work: behind the metadata, zeros at first. What counts (the ticket and
// Progress::done) is zero again after every launch.
struct Workspace {
  uint32_t* ticket;  // how many chunks blocks have taken
  double* sums;      // AdamProxL2's sums of squares, one a chunk; and then
  Progress* progress;

  Workspace(void* memory, int64_t num_chunks)
      : ticket(static_cast<uint32_t*>(memory)),
        sums(static_cast<double*>(memory) + 1),
        progress(reinterpret_cast<Progress*>(sums + num_chunks)) {}

  static size_t bytes(bool blocks, int64_t num_chunks) {
    return sizeof(double) + blocks * num_chunks * (sizeof(double) + sizeof(Progress));
  }
};

struct TensorTable {
  std::vector<TensorRow> rows;
  std::vector<void*> grads;  // one a row; apart from it, since they change from step to step
  std::vector<Scalars> scalars;
  // With recipes the device makes the scalars; these have their number, and nothing else.
  RecipesHead head{{1, nullptr, 0}, {0, nullptr, 0}, 0, 0};
  std::vector<GroupRecipe> group_recipes;
  std::vector<ScalarsRecipe> scalars_recipes;
  // Those of the elementwise rules come first, with the packed ones last, then those of blocks.
  std::vector<Chunk> chunks;
  int64_t num_packed = 0, num_of_blocks = 0;  // chunks
  int64_t numel = 0;
  std::vector<double> sums;   // the CPU's, of the squares of each chunk, and then of each tensor
  Record* records = nullptr;  // one a chunk, where a tracked step is noted; null: it is not

  bool has_recipes() const { return !scalars_recipes.empty(); }

  void lay_out_chunks() {
    chunks.clear();
    const auto add = [this](auto wanted) {
      const size_t before = chunks.size();
      for (size_t i = 0; i < rows.size(); ++i) {
        if (!wanted(has_blocks(rows[i].rule), rows[i].numel <= kPackedNumel)) continue;
        rows[i].first_chunk = static_cast<int32_t>(chunks.size());
        const auto count = static_cast<int32_t>(num_chunks_of(rows[i].numel));
        for (int32_t c = 0; c < count; ++c) chunks.push_back({static_cast<int32_t>(i), c});
      }
      return static_cast<int64_t>(chunks.size() - before);
    };
    add([](bool blocks, bool tiny) { return !blocks && !tiny; });
    num_packed = add([](bool blocks, bool tiny) { return !blocks && tiny; });
    num_of_blocks = add([](bool blocks, bool) { return blocks; });
    sums.resize(num_of_blocks > 0 ? chunks.size() : 0);
  }
};

}  // namespace adamprox
