// The rows on one device, and what follows from them alone: chunks, overlaps, step counts, scalars, and
// the bytes that a GPU is given. It knows addresses; neither Python nor torch.
#pragma once

#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "table.h"
#include "tensor_view.h"

namespace adamprox {

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

// What a step reads of a param: the row, and what changes from step to step.
struct Entry {
  TensorRow row{};
  void* grad = nullptr;
  StepCount count{};
  int norm = -1;  // rows with the same number here are one block together
};

// The values of a row's param group; some may be known on the device only.
struct RowValues {
  HyperParameters h;
  Decay rule;
  int group;
  bool on_device;

  bool operator==(const RowValues& o) const {
    return rule == o.rule && (group == o.group || (!on_device && !o.on_device && h == o.h));
  }
};

class DeviceTable {
 public:
  explicit DeviceTable(Device d) : device(d) {}

  void clear();
  void add(const Entry& entry, int member, const RowValues& values);

  // Once all rows are there: lays out the chunks. Returns the rows that share memory with an earlier one
  // where one of the two writes, or with themselves.
  std::vector<int> arrange();

  // Whether a row that is read anew is the one that is there.
  bool is_same(size_t i, const Entry& entry) const;

  // The rows whose step count does not lie where it is counted, or is no number to count on from.
  std::vector<int> uncountable() const;

  // Counts the step and makes the scalars, or recipes for them if table.group_recipes has one for each of
  // `values`. undo() takes the count back, unless the step was launched.
  void begin();
  void undo();

  // What changes at each step: the grads' pointers, void*[num_rows], and then Scalars[], or RecipesHead,
  // GroupRecipe[] and ScalarsRecipe[].
  std::string payload() const;
  size_t payload_size() const;
  // What seldom changes: TensorRow[num_rows], Chunk[num_chunks], and a Workspace.
  std::string metadata() const;
  bool metadata_is_uploaded() const;  // as it is now, if note_upload() has been told of it
  void note_upload() { uploaded_rows_ = table.rows; }
  // The distinct (param's dtype, moments' dtype, rule, which states are there as bits, size of blocks) of
  // the rows. The last is 0 for a row of one block. Else it is 1 + log2 of the block's size, rounded up to
  // a power of two. All sizes above kTileSize count as 2 * kTileSize.
  std::set<std::tuple<int, int, int, int, int>> variants() const;

  const Device device;
  TensorTable table;
  std::vector<int> members;  // one a row, as are the two that follow
  std::vector<StepCount> counts;
  std::vector<int> norms;
  std::vector<RowValues> values;  // rows that follow one another share theirs
  bool recipes = false;           // whether the scalars are made on the device
  bool deferred = false;          // whether the decay of a row is: see Gather::is_deferred
  bool launched = false;
  double loss_scale = 1;  // the host's

 private:
  struct Interval {
    uintptr_t begin, end;
    int row;
    bool written;
    bool operator<(const Interval& o) const { return begin < o.begin; }
  };
  void number_slots();
  void append_written(size_t row, std::vector<Interval>& out) const;
  bool overlaps_written(size_t row) const;
  int32_t scalars_of(int value, double step, DType dtype);

  bool begun_ = false;
  std::vector<int> value_of_;  // one a row
  std::vector<int> made_for_;  // one a scalars: the values, and the dtype where it matters
  BiasCorrections bias_;
  // Kept from step to step: the rows and counts as they were when arranged, what they write to, sorted, each
  // with the end of all up to it, and whether some of it overlaps. So a step compares its new grads, and
  // sorts nothing.
  std::vector<TensorRow> known_rows_;
  std::vector<void*> known_counts_;
  std::vector<int> known_norms_;
  std::vector<Interval> written_;
  bool overlap_ = false;
  std::vector<TensorRow> uploaded_rows_;
};

}  // namespace adamprox
