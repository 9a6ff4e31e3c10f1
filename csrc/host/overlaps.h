// Which rows share memory. Such rows are stepped one after the other, in the order of the param groups.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace adamprox {

struct Interval {
  uintptr_t begin, end;
  int row;
  bool written;

  Interval(const void* data, int64_t bytes, int r, bool w)
      : begin(reinterpret_cast<uintptr_t>(data)), end(begin + bytes), row(r), written(w) {}
};

// What is written to, sorted and merged; kept while the rows stay, so that a step compares its new grads
// with it and sorts nothing.
class WrittenMemory {
 public:
  // False: some of it overlaps.
  bool assign(std::vector<Interval> written) {
    std::sort(written.begin(), written.end(),
              [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
    begins_.clear();
    ends_.clear();
    for (const Interval& i : written) {
      if (i.begin == i.end) continue;
      if (!ends_.empty() && i.begin < ends_.back()) return false;
      if (!ends_.empty() && i.begin == ends_.back()) {
        ends_.back() = i.end;
      } else {
        begins_.push_back(i.begin);
        ends_.push_back(i.end);
      }
    }
    return true;
  }

  bool overlaps(const void* data, int64_t bytes) const {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (begins_.empty() || bytes == 0) return false;
    const uintptr_t* base = begins_.data();  // the last one that begins before the end
    for (size_t n = begins_.size(); n > 1; n -= n / 2) {
      base = base[n / 2] < begin + bytes ? base + n / 2 : base;
    }
    return *base < begin + bytes && ends_[base - begins_.data()] > begin;
  }

 private:
  std::vector<uintptr_t> begins_, ends_;
};

// For each row the turn in which it is stepped: after every earlier row that it shares memory with, if one
// of the two writes there. `alone(interval, other)` is called where a row overlaps itself.
template <typename F>
std::vector<int> turns_of(size_t rows, std::vector<Interval> memory, F alone) {
  std::sort(memory.begin(), memory.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<std::pair<int, int>> conflicts;  // the later row, the earlier one
  for (size_t i = 0; i < memory.size(); ++i) {
    for (size_t j = i + 1; j < memory.size() && memory[j].begin < memory[i].end; ++j) {
      const Interval &a = memory[i], &b = memory[j];
      if ((!a.written && !b.written) || b.begin == b.end) continue;
      if (a.row == b.row) {
        alone(a, b);
      } else {
        conflicts.emplace_back(std::max(a.row, b.row), std::min(a.row, b.row));
      }
    }
  }
  std::sort(conflicts.begin(), conflicts.end());
  std::vector<int> turns(rows, 0);
  for (const auto& [later, earlier] : conflicts) {
    turns[later] = std::max(turns[later], turns[earlier] + 1);
  }
  return turns;
}

}  // namespace adamprox
