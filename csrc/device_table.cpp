#include "device_table.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

namespace adamprox {
namespace {

// But for what follows from all rows: scalars, chunks, slots, and the block that has slots.
bool same_row(const TensorRow& a, int norm_of_a, const TensorRow& b, int norm_of_b) {
  return std::memcmp(&a, &b, offsetof(TensorRow, block)) == 0 && a.param_dtype == b.param_dtype &&
         a.state_dtype == b.state_dtype && a.rule == b.rule && norm_of_a == norm_of_b &&
         (norm_of_a >= 0 || a.block == b.block);
}

template <typename T>
void append_bytes(std::string& out, const std::vector<T>& values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

}  // namespace

void DeviceTable::clear() {
  table.rows.clear();
  table.grads.clear();
  table.numel = 0;
  table.records = nullptr;
  table.group_recipes.clear();
  table.scalars_recipes.clear();
  table.head = {{1, nullptr, 0}, {0, nullptr, 0}, 0, 0};
  members.clear();
  counts.clear();
  norms.clear();
  values.clear();
  value_of_.clear();
  recipes = deferred = begun_ = launched = false;
  loss_scale = 1;
}

void DeviceTable::add(const Entry& entry, int member, const RowValues& row_values) {
  table.rows.push_back(entry.row);
  table.grads.push_back(entry.grad);
  table.numel += entry.row.numel;
  members.push_back(member);
  counts.push_back(entry.count);
  norms.push_back(entry.norm);
  if (values.empty() || !(row_values == values.back())) values.push_back(row_values);
  value_of_.push_back(static_cast<int>(values.size() - 1));
}

std::vector<int> DeviceTable::uncountable() const {
  std::vector<int> rows;
  for (size_t i = 0; i < counts.size(); ++i) {
    const StepCount& c = counts[i];
    const bool there = c.at != nullptr && c.device == (recipes ? device : Device{});
    const bool counts_on = there && (recipes || (c.read() >= 0 && std::isfinite(c.read())));
    if (!counts_on) rows.push_back(static_cast<int>(i));
  }
  return rows;
}

bool DeviceTable::is_same(size_t i, const Entry& e) const {
  return same_row(e.row, e.norm, table.rows[i], norms[i]) && e.grad == table.grads[i] &&
         e.count.at == counts[i].at;
}

void DeviceTable::append_written(size_t i, std::vector<Interval>& out) const {
  const TensorRow& row = table.rows[i];
  const auto append = [&](const void* data, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (data != nullptr && bytes > 0) out.push_back({begin, begin + bytes, int(i), true});
  };
  append(row.param, row.numel * size_of(row.param_dtype));
  for (int s = 0; s < kStates; ++s) {
    const bool moment = kStateKeys[s].type == kMoment;
    append(row.states[s],
           row.numel * size_of(moment ? row.state_dtype : compute_type(row.param_dtype)));
  }
  // The host counts one row after the other in any case.
  if (recipes) append(counts[i].at, counts[i].is_double ? 8 : 4);
}

bool DeviceTable::overlaps_written(size_t i) const {
  const auto begin = reinterpret_cast<uintptr_t>(table.grads[i]);
  const uintptr_t end = begin + table.rows[i].numel * size_of(table.rows[i].param_dtype);
  const auto next = std::lower_bound(written_.begin(), written_.end(), Interval{end, 0, 0, true});
  return begin != end && next != written_.begin() && next[-1].end > begin;
}

std::vector<int> DeviceTable::arrange() {
  std::vector<TensorRow>& rows = table.rows;
  const auto count_of = [&](size_t i) { return recipes ? counts[i].at : nullptr; };
  bool known = rows.size() == known_rows_.size();
  for (size_t i = 0; known && i < rows.size(); ++i) {
    known = same_row(rows[i], norms[i], known_rows_[i], known_norms_[i]) &&
            count_of(i) == known_counts_[i];
  }
  for (size_t i = 0; known && i < rows.size(); ++i) {
    const TensorRow& r = known_rows_[i];
    rows[i].block = r.block;
    rows[i].first_chunk = r.first_chunk;
    rows[i].slot = r.slot;
    rows[i].first_slot = r.first_slot;
    rows[i].num_slots = r.num_slots;
  }
  if (!known) {
    known_rows_.clear();  // in case that memory runs out amid this
    known_counts_.clear();
    known_norms_ = norms;
    number_slots();
    table.lay_out_chunks();
    written_.clear();
    for (size_t i = 0; i < rows.size(); ++i) {
      known_counts_.push_back(count_of(i));
      append_written(i, written_);
    }
    std::sort(written_.begin(), written_.end());
    overlap_ = false;
    uintptr_t reach = 0;  // the end of all so far
    for (Interval& i : written_) {
      overlap_ |= i.begin < reach;
      i.end = reach = std::max(reach, i.end);
    }
    known_rows_ = rows;
  }
  bool overlap = overlap_;
  for (size_t i = 0; !overlap && i < rows.size(); ++i) overlap = overlaps_written(i);
  if (!overlap) return {};
  std::vector<Interval> memory;
  for (size_t i = 0; i < rows.size(); ++i) {
    append_written(i, memory);
    const auto begin = reinterpret_cast<uintptr_t>(table.grads[i]);
    const uintptr_t bytes = rows[i].numel * size_of(rows[i].param_dtype);
    memory.push_back({begin, begin + bytes, static_cast<int>(i), false});
  }
  std::sort(memory.begin(), memory.end());
  std::set<int> later;
  for (size_t i = 0; i < memory.size(); ++i) {
    for (size_t j = i + 1; j < memory.size() && memory[j].begin < memory[i].end; ++j) {
      const Interval &a = memory[i], &b = memory[j];
      if ((a.written || b.written) && b.begin != b.end) later.insert(std::max(a.row, b.row));
    }
  }
  return {later.begin(), later.end()};
}

void DeviceTable::number_slots() {
  std::vector<TensorRow>& rows = table.rows;
  table.num_slots = 0;
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    while (end < rows.size() && norms[end] == norms[begin]) ++end;
    if (norms[begin] < 0) continue;
    int64_t numel = 0;
    int32_t slot = static_cast<int32_t>(table.num_slots), count = 0;
    for (size_t i = begin; i < end; ++i) {
      numel += rows[i].numel;
      count += rows[i].numel > 0;
    }
    for (size_t i = begin; i < end; ++i) {
      rows[i].block = numel;
      if (rows[i].numel == 0) continue;
      rows[i].slot = slot++;
      rows[i].first_slot = static_cast<int32_t>(table.num_slots);
      rows[i].num_slots = count;
    }
    table.num_slots += count;
  }
}

void DeviceTable::begin() {
  launched = false;
  table.scalars.clear();
  made_for_.clear();
  table.scalars.reserve(counts.size());  // so that nothing fails once a count is written
  made_for_.reserve(counts.size());
  begun_ = true;
  for (size_t i = 0; i < counts.size(); ++i) {
    StepCount& count = counts[i];
    if (recipes) {
      const auto dtype = count.is_double ? DType::kFloat64 : DType::kFloat32;
      table.rows[i].scalars = static_cast<int32_t>(i);
      table.scalars_recipes.push_back({count.at, value_of_[i], static_cast<int16_t>(dtype),
                                       static_cast<int16_t>(table.rows[i].param_dtype)});
      table.scalars.emplace_back();
    } else {
      count.before = count.read();
      count.write(count.before + 1);
      table.rows[i].scalars = scalars_of(value_of_[i], count.before + 1, table.rows[i].param_dtype);
    }
  }
  table.head.num_groups = static_cast<int64_t>(table.group_recipes.size());
  table.head.num_scalars = static_cast<int64_t>(table.scalars_recipes.size());
}

void DeviceTable::undo() {
  for (size_t i = counts.size(); i-- > 0 && begun_ && !launched && !recipes;) {
    counts[i].write(counts[i].before);
  }
  begun_ = false;
}

// Rows with the same values, at the same step, share them; with bounds, rows of the same dtype.
int32_t DeviceTable::scalars_of(int value, double step, DType dtype) {
  std::vector<Scalars>& all = table.scalars;
  const RowValues& v = values[value];
  const bool bounded = std::isfinite(v.h.number[kLow]) || std::isfinite(v.h.number[kHigh]);
  const int made_for = 4 * value + (bounded ? static_cast<int>(dtype) : 0);
  constexpr size_t kRecent = 8;  // steps that params of a group may be at, in turns
  for (size_t i = all.size(); i-- > 0 && i + kRecent >= all.size();) {
    if (made_for_[i] == made_for && all[i].step == step) return static_cast<int32_t>(i);
  }
  bias_.update(v.h, step);
  all.push_back(make_scalars(v.rule, v.h, bias_, loss_scale, dtype));
  made_for_.push_back(made_for);
  return static_cast<int32_t>(all.size() - 1);
}

size_t DeviceTable::payload_size() const {
  const auto size = [](const auto& values) { return values.size() * sizeof(values[0]); };
  const size_t made = size(table.scalars),
               made_there =
                   sizeof(table.head) + size(table.group_recipes) + size(table.scalars_recipes);
  return size(table.grads) + (recipes ? made_there : made);
}

std::string DeviceTable::payload() const {
  std::string bytes;
  bytes.reserve(payload_size());
  append_bytes(bytes, table.grads);
  if (recipes) {
    bytes.append(reinterpret_cast<const char*>(&table.head), sizeof(table.head));
    append_bytes(bytes, table.group_recipes);
    append_bytes(bytes, table.scalars_recipes);
  } else {
    append_bytes(bytes, table.scalars);
  }
  return bytes;
}

std::string DeviceTable::metadata() const {
  std::string bytes;
  append_bytes(bytes, table.rows);
  append_bytes(bytes, table.chunks);
  const int64_t num_places = static_cast<int64_t>(table.chunks.size()) + table.num_slots;
  bytes.append(Workspace::bytes(table.num_of_blocks > 0, num_places), '\0');
  return bytes;
}

bool DeviceTable::metadata_is_uploaded() const {
  const std::vector<TensorRow>& rows = table.rows;
  return rows.size() == uploaded_rows_.size() &&
         std::memcmp(rows.data(), uploaded_rows_.data(), rows.size() * sizeof(TensorRow)) == 0;
}

std::set<std::tuple<int, int, int, int, int>> DeviceTable::variants() const {
  std::set<std::tuple<int, int, int, int, int>> result;
  for (const TensorRow& row : table.rows) {
    if (row.numel == 0) continue;
    int states = 0, size = 0;
    for (int s = 0; s < kStates; ++s) states |= (row.states[s] != nullptr) << s;
    if (has_blocks(row.rule) && row.block < row.numel) {
      size = 1;
      for (int64_t n = 1; n < row.block && n <= kTileSize; n *= 2) ++size;
    }
    result.emplace(static_cast<int>(row.param_dtype), static_cast<int>(row.state_dtype),
                   static_cast<int>(row.rule), states, size);
  }
  return result;
}

}  // namespace adamprox
