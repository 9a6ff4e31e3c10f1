// The rows on one device, and what follows from them alone: chunks, overlaps, step counts, scalars, and
// the bytes that a GPU is given. It knows addresses; neither Python nor torch.
#pragma once

#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "table.h"

namespace adamprox {

struct Device {
  bool gpu = false;
  int id = 0;
  bool operator==(const Device& o) const { return gpu == o.gpu && id == o.id; }
};

// Where a row's step count lies.
struct StepCount {
  void* at = nullptr;
  bool is_double = false;
  Device device{};
  double before = 0;  // this step, once it is counted

  // On the host.
  double read() const { return is_double ? *static_cast<double*>(at) : *static_cast<float*>(at); }
  void write(double value) const {
    if (is_double) {
      *static_cast<double*>(at) = value;
    } else {
      *static_cast<float*>(at) = static_cast<float>(value);
    }
  }
};

// The values that rows of one or more param groups share: on the host, and as a recipe.
struct RowValues {
  HyperParameters h{};
  Decay rule{};
  int group = 0;  // one of them
  GroupRecipe recipe{};
};

inline DType compute_type(DType type) {
  return type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

class DeviceTable {
 public:
  explicit DeviceTable(Device d) : device(d) {}

  void clear();
  void add(const TensorRow& row, void* grad, int member, const StepCount& count);

  // Once all rows are there: lays out the chunks. Returns the rows that share memory with an earlier one
  // where one of the two writes, or with themselves.
  std::vector<int> arrange();

  // Whether a row that is read anew is the one that is there.
  bool is_same(size_t i, const TensorRow& row, const void* grad, const StepCount& count) const;

  // Counts the step and makes the scalars, or the recipes for them; `values[value_of[i]]` are row i's.
  // undo() takes the count back, unless the step was launched.
  void begin(const std::vector<RowValues>& values, const std::vector<int>& value_of);
  void undo();

  // What changes at each step: the grads' pointers, void*[num_rows], and then Scalars[], or RecipesHead,
  // GroupRecipe[] and ScalarsRecipe[].
  std::string payload() const;
  // What seldom changes: TensorRow[num_rows], Chunk[num_chunks], and a Workspace.
  std::string metadata() const;
  bool metadata_is_uploaded() const;  // as it is now, if note_upload() has been told of it
  void note_upload() { uploaded_rows_ = table.rows; }
  // The distinct (param's dtype, moments' dtype, rule, which states are there as bits) of the rows.
  std::set<std::tuple<int, int, int, int>> variants() const;

  const Device device;
  TensorTable table;
  std::vector<int> members;  // one a row, as is
  std::vector<StepCount> counts;
  bool recipes = false;  // whether the scalars are made on the device
  bool launched = false;
  double loss_scale = 1;  // the host's

 private:
  struct Interval;
  void append_written(size_t row, std::vector<Interval>& out) const;
  bool overlaps_written(size_t row) const;
  int32_t scalars_of(const RowValues& values, int number, double step);

  bool begun_ = false;
  std::vector<int> scalars_values_;  // one a scalars: whose they are
  BiasCorrections bias_;
  // Kept from step to step: the rows and counts as they were when arranged, what they write to, sorted
  // and merged, and whether some of it overlaps. So a step compares its new grads, and sorts nothing.
  std::vector<TensorRow> known_rows_;
  std::vector<void*> known_counts_;
  std::vector<uintptr_t> begins_, ends_;
  bool overlap_ = false;
  std::vector<TensorRow> uploaded_rows_;
};

}  // namespace adamprox
