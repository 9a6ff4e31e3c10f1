// Fetches ahead what a step's reads will touch: thousands of small objects all over the heap, which
// would otherwise be waited for one after another.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace adamprox {

// Remembers the places that a step visits, in their order. The next step visits nearly the same
// ones, so at each of them it fetches the one that comes some places later. A place is only a hint,
// never read through: one that has moved is fetched in vain.
class Trail {
 public:
  void start() { here_ = 0; }

  template <int kBytes = 64>
  void visit(const void* place) {
    if (here_ + kAhead < places_.size()) {
      const Place& next = places_[here_ + kAhead];
      for (int i = 0; i < next.bytes; i += 64) __builtin_prefetch(next.address + i);
    } else if (here_ == places_.size()) {
      places_.emplace_back();
    }
    places_[here_++] = {static_cast<const char*>(place), kBytes};
  }

  // A tensor's implementation, and what seems to lie behind it: after a vtable and a reference
  // count, pointers to the storage, to autograd's data and (after one more) to the version. If they
  // are something else, that does no harm.
  void visit_implementation(const void* place) {
    const void* words[4];
    std::memcpy(words, static_cast<const char*>(place) + 2 * sizeof(void*), sizeof(words));
    visit<192>(place);
    visit<128>(words[0]);
    if (words[1] != nullptr) {  // of a param
      visit<128>(words[1]);
      visit(words[3]);
    }
  }

 private:
  static constexpr size_t kAhead = 32;
  struct Place {
    const char* address;
    int bytes;
  };
  std::vector<Place> places_;
  size_t here_ = 0;
};

}  // namespace adamprox
