// The table that one step hands to a backend: pointers, sizes, types and scalars; no maths.
#pragma once

#include <cstdint>
#include <vector>

#include "telemetry.h"

namespace adamprox {

// A tile is a Triton block, 256 threads of 8 elements, and what a tracked CUDA step does in a turn.
// A chunk is the unit of work that threads and blocks share out.
constexpr int64_t kTileSize = 2048;
constexpr int64_t kChunkSize = 8 * kTileSize;
// Up to this size a tensor is worth no block of CUDA's: a warp takes it, one of a pack.
constexpr int64_t kPackedNumel = 1024;

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class Decay : uint8_t { kCoupled, kDecoupled, kProxSqL2, kProxL1, kProxL2 };

// What changes with the step count, in double: computed once on the host, rounded once to the
// compute type where it is used.
struct Scalars {
  double one_minus_beta1;
  double one_minus_beta2;
  double step_size;   // lr * sqrt(1 - beta2^t) / (1 - beta1^t)
  double eps;         // eps * sqrt(1 - beta2^t)
  double decay;       // see decay.h: one meaning a rule
  double grad_scale;  // of the grads: 1, or -1 to maximize, divided by the loss scale, if any
  double alpha;       // what telemetry measures updates by
  double step;        // the count with this step, t
};

struct TensorRow {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  int64_t numel;         // reals: a complex number counts twice
  int32_t scalars;       // index into TensorTable::scalars
  int32_t first_chunk;   // index of this tensor's first chunk
  DType param_dtype;     // of param and grad
  DType state_dtype;     // of exp_avg, exp_avg_sq, max_exp_avg_sq
  uint8_t aligned;       // 1: all pointers are multiples of 16 bytes, grad's included
  uint8_t unused[5];     // named, so that equal rows are equal bytes
};
static_assert(sizeof(TensorRow) == 56, "triton_kernels/fused_adam.py reads it as 7 words");

struct Chunk {
  int32_t row;
  int32_t index;  // within the tensor: it starts at index * kChunkSize
};

// How far AdamProxL2 is on a GPU.
struct Progress {
  uint32_t done;  // at a tensor's first chunk: how many it has updated, and then shrunk
  int32_t below;  // the chunk that the same block put aside before this one, or -1
};

// Where the kernels on a GPU work: behind the metadata, zeros at first. What counts (the ticket and
// Progress::done) is zero again after every launch.
struct Workspace {
  uint32_t* ticket;  // how many chunks blocks have taken
  double* sums;      // AdamProxL2: of squares, one a chunk; and then
  Progress* progress;

  Workspace(void* memory, int64_t num_chunks)
      : ticket(static_cast<uint32_t*>(memory)),
        sums(static_cast<double*>(memory) + 1),
        progress(reinterpret_cast<Progress*>(sums + num_chunks)) {}

  static size_t bytes(Decay decay, int64_t num_chunks) {
    const bool norms = decay == Decay::kProxL2;
    return sizeof(double) + norms * num_chunks * (sizeof(double) + sizeof(Progress));
  }
};

// A number that the host knows, or one that is read where it lies.
struct Number {
  double value;
  const void* at;  // null: `value`
  int64_t dtype;   // the DType of what lies there
};

// How one of TensorTable::scalars is made where the tensors are; see recipes.h.
struct Recipe {
  Number lr, beta1, beta2, eps, weight_decay, initial_lr;
  Number step;    // the count before this step, always read; if it lies nowhere:
  Scalars given;  // the host has made them
  bool decay_by_schedule;
  bool maximize;
  bool counts;  // of the recipes with the same step count, one writes it
  uint8_t unused[5];
};
static_assert(sizeof(Recipe) == 30 * 8, "triton_kernels/recipes.py reads it as 30 words");

// Before Recipe[count] in a payload.
struct RecipesHead {
  Number loss_scale;
  Number found_inf;  // not 0: nothing is to be stepped, and no step counted
  int64_t count;
};

// Before Scalars[count], which the recipes become.
struct PreparedHead {
  int64_t skip;
};

struct TensorTable {
  Decay decay = Decay::kCoupled;
  std::vector<TensorRow> rows;
  std::vector<void*> grads;  // one a row; apart from it, since they change from step to step
  std::vector<Scalars> scalars;
  // Empty, or one for each of the scalars, which then are not to be used.
  std::vector<Recipe> recipes;
  RecipesHead recipes_head{{1, nullptr, 0}, {0, nullptr, 0}, 0};
  std::vector<Chunk> chunks;  // of all rows; those of the rows that are packed come last
  int64_t num_packed = 0;     // how many these are
  int64_t numel = 0;
  Record* records = nullptr;  // one a chunk, where a tracked step is noted; null: it is not

  static int64_t num_chunks(int64_t numel) { return (numel + kChunkSize - 1) / kChunkSize; }

  void clear() {
    rows.clear();
    grads.clear();
    scalars.clear();
    recipes.clear();
    recipes_head = {{1, nullptr, 0}, {0, nullptr, 0}, 0};
    numel = 0;
    records = nullptr;
  }

  // Once all rows are there. The chunks stay from step to step, unless sizes have changed.
  void lay_out_chunks() {
    bool same = places_.size() == rows.size();
    for (size_t i = 0; same && i < rows.size(); ++i) same = places_[i].numel == rows[i].numel;
    if (!same) {
      places_.resize(rows.size());
      chunks.clear();
      for (const bool packed : {false, true}) {
        const size_t before = chunks.size();
        for (size_t i = 0; i < rows.size(); ++i) {
          if ((rows[i].numel <= kPackedNumel) == packed) add_chunks(i);
        }
        num_packed = static_cast<int64_t>(chunks.size() - before);
      }
    }
    for (size_t i = 0; i < rows.size(); ++i) rows[i].first_chunk = places_[i].first_chunk;
  }

 private:
  struct Place {
    int64_t numel;
    int32_t first_chunk;
  };

  void add_chunks(size_t row) {
    places_[row] = {rows[row].numel, static_cast<int32_t>(chunks.size())};
    const auto count = static_cast<int32_t>(num_chunks(rows[row].numel));
    for (int32_t i = 0; i < count; ++i) chunks.push_back({static_cast<int32_t>(row), i});
  }

  std::vector<Place> places_;  // of the rows that `chunks` are of
};

}  // namespace adamprox
