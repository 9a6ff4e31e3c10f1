// The table that one step hands to a backend: pointers, sizes, types and scalars; no maths.
#pragma once

#include <algorithm>
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
  int64_t block;          // reals of one of its blocks, of which the last one may be smaller
  int32_t scalars;        // index into TensorTable::scalars
  int32_t first_chunk;    // index of this tensor's first chunk
  DType param_dtype;      // of param and grad
  DType state_dtype;      // of the moments
  Decay rule;
  uint8_t aligned;  // 1: all pointers are multiples of 16 bytes, grad's included
  // Several rows may be one block together. All such rows of the table are numbered. `slot` is this row's
  // number, `first_slot` is that of the block's first row. `num_slots` is how many rows the block has; it
  // is 0 if the row has blocks of its own.
  int32_t slot, first_slot, num_slots;
};
static_assert(sizeof(TensorRow) == 8 * (6 + kStates), "Triton reads it as words");

// Either a part of a block, which is one of its `parts` chunks, of which `first` is the first; or several
// blocks, and `parts` is 0.
struct Chunk {
  int64_t begin;  // within the tensor
  int32_t row, count, first, parts;
};
static_assert(sizeof(Chunk) == 24, "Triton reads it as words");

HOST_DEVICE constexpr int64_t num_chunks_of(int64_t numel) {
  return (numel + kChunkSize - 1) / kChunkSize;
}

// The reals of the block that a chunk is a part of.
HOST_DEVICE int64_t numel_of_block(const TensorRow& row, const Chunk& chunk, int64_t index) {
  if (row.num_slots > 0) return row.block;
  const int64_t rest = row.numel - (chunk.begin - (index - chunk.first) * kChunkSize);
  return rest < row.block ? rest : row.block;
}

// How far AdamProxL2 is on a GPU.
struct Progress {
  uint32_t done;   // at a tensor's or a block's first chunk: how many are updated, and then shrunk
  uint32_t ready;  // how many of those that are one block together are updated, and then shrunk
  int32_t below;   // the chunk that the same block of threads put aside before this one, or -1
  int32_t unused;
};

// Where the kernels on a GPU work: behind the metadata, zeros at first. What counts (the ticket, `done`
// and `ready`) is zero again after every launch. A place is for a chunk; those of slots follow.
struct Workspace {
  uint32_t* ticket;  // how many chunks blocks have taken
  double* sums;      // AdamProxL2's sums of squares, one a place; and then
  Progress* progress;

  Workspace(void* memory, int64_t num_places)
      : ticket(static_cast<uint32_t*>(memory)),
        sums(static_cast<double*>(memory) + 1),
        progress(reinterpret_cast<Progress*>(sums + num_places)) {}

  static size_t bytes(bool blocks, int64_t num_places) {
    return sizeof(double) + blocks * num_places * (sizeof(double) + sizeof(Progress));
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
  int64_t num_slots = 0;
  int64_t numel = 0;
  std::vector<double> sums;   // the CPU's, of the squares of each chunk, and then of each block
  Record* records = nullptr;  // one a chunk, where a tracked step is noted; null: it is not

  void lay_out_chunks() {
    chunks.clear();
    const auto add = [this](auto wanted) {
      const size_t before = chunks.size();
      for (size_t i = 0; i < rows.size(); ++i) {
        if (wanted(rows[i])) add_chunks(static_cast<int32_t>(i));
      }
      return static_cast<int64_t>(chunks.size() - before);
    };
    const auto tiny = [](const TensorRow& row) { return row.numel <= kPackedNumel; };
    add([&](const TensorRow& row) { return !has_blocks(row.rule) && !tiny(row); });
    num_packed = add([&](const TensorRow& row) { return !has_blocks(row.rule) && tiny(row); });
    num_of_blocks =
        add([](const TensorRow& row) { return has_blocks(row.rule) && row.num_slots == 0; });
    num_of_blocks += add([](const TensorRow& row) { return row.num_slots > 0; });
    sums.resize(num_of_blocks > 0 ? chunks.size() : 0);
  }

 private:
  void add_chunks(int32_t index) {
    TensorRow& row = rows[index];
    const auto num_chunks = [this] { return static_cast<int32_t>(chunks.size()); };
    row.first_chunk = num_chunks();
    const bool own = row.num_slots == 0;
    const int64_t block = own ? row.block : row.numel;
    if (own && 0 < block && block <= kChunkSize) {
      // Eight blocks are a multiple of 16 bytes.
      const int64_t fit = kChunkSize / block, size = (fit < 8 ? fit : fit / 8 * 8) * block;
      for (int64_t begin = 0; begin < row.numel; begin += size) {
        const auto count = static_cast<int32_t>(std::min(size, row.numel - begin));
        chunks.push_back({begin, index, count, num_chunks(), count <= block});
      }
      return;
    }
    for (int64_t begin = 0; begin < row.numel; begin += block) {
      const int64_t numel = std::min(block, row.numel - begin);
      const auto first = num_chunks(), parts = static_cast<int32_t>(num_chunks_of(numel));
      for (int64_t at = 0; at < numel; at += kChunkSize) {
        const auto count = static_cast<int32_t>(std::min(kChunkSize, numel - at));
        chunks.push_back({begin + at, index, count, first, parts});
      }
    }
    if (own || row.slot + 1 < row.first_slot + row.num_slots) return;
    // The last of the tensors that are one block: the chunks of all are its parts.
    const TensorRow* of_block = &row;
    while (of_block->num_slots == 0 || of_block->slot != row.first_slot) --of_block;
    const int32_t first = of_block->first_chunk, parts = num_chunks() - first;
    for (int32_t i = first; i < num_chunks(); ++i) {
      chunks[i].first = first;
      chunks[i].parts = parts;
    }
  }
};

}  // namespace adamprox
