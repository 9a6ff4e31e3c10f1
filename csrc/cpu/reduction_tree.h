// The reduction tree on a CPU, some of its levels at a time: neighbours are in one vector, where adding
// them takes shuffles, of which there are fewest for several vectors together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../math/convert.h"
#include "../math/reduction_tree.h"
#include "../math/telemetry.h"
#include "loop.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adamprox {

#if defined(__AVX2__)
using Four = __m256d;
HOST_DEVICE Four load_four(const double* from) { return _mm256_loadu_pd(from); }
HOST_DEVICE Four load_four(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
HOST_DEVICE Four square_four(Four x) { return _mm256_mul_pd(x, x); }

// The sums of four neighbours each, of four vectors.
HOST_DEVICE void add_fours(Four a, Four b, Four c, Four d, double* sums) {
  const auto add_twos = [](Four x, Four y) __attribute__((always_inline)) {
    return _mm256_add_pd(_mm256_unpacklo_pd(x, y), _mm256_unpackhi_pd(x, y));
  };
  const Four ab = add_twos(a, b), cd = add_twos(c, d);
  const Four low = _mm256_permute2f128_pd(ab, cd, 0x20);
  _mm256_storeu_pd(sums, _mm256_add_pd(low, _mm256_permute2f128_pd(ab, cd, 0x31)));
}
#else
struct Four {
  double of[4];
};
template <typename T>
HOST_DEVICE Four load_four(const T* from) {
  return {{from[0], from[1], from[2], from[3]}};
}
HOST_DEVICE Four square_four(const Four& x) {
  return {{square(x.of[0]), square(x.of[1]), square(x.of[2]), square(x.of[3])}};
}
HOST_DEVICE void add_fours(const Four& a, const Four& b, const Four& c, const Four& d,
                           double* sums) {
  const Four* vectors[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    const double* four = vectors[i]->of;
    sums[i] = (four[0] + four[1]) + (four[2] + four[3]);
  }
}
#endif

// The sums of the squares of kTerms neighbours each, of a block's kBlockSize values.
constexpr int kTerms = 64;

template <typename T>
HOST_DEVICE void add_squares(const T* values, double* sums) {
  double fours[kBlockSize / 4], sixteens[kBlockSize / 16];
  for (int i = 0; i < kBlockSize; i += 16) {
    const auto squares = [=](int first) __attribute__((always_inline)) {
      return square_four(load_four(values + i + first));
    };
    add_fours(squares(0), squares(4), squares(8), squares(12), fours + i / 4);
  }
  const auto add = [](const double* from, double* to) __attribute__((always_inline)) {
    add_fours(load_four(from), load_four(from + 4), load_four(from + 8), load_four(from + 12), to);
  };
  for (int i = 0; i < kBlockSize / 4; i += 16) add(fours + i, sixteens + i / 4);
  add(sixteens, sums);
}

#if defined(__AVX512F__)
HOST_DEVICE void add_squares(const float* values, double* sums) {
  // A vector of a0 to a7 and one of b0 to b7, say, become [a01 b01 a23 b23 a45 b45 a67 b67].
  const auto add_twos = [](__m512d a, __m512d b) __attribute__((always_inline)) {
    return _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
  };
  // A float's square is exact in double, so that a fused addition rounds as the plain one does.
  const auto add_squares = [](const float* of) __attribute__((always_inline)) {
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(of));
    const __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(of + 8));
    const __m512d even = _mm512_unpacklo_pd(a, b), odd = _mm512_unpackhi_pd(a, b);
    return _mm512_fmadd_pd(even, even, _mm512_mul_pd(odd, odd));
  };
  // Four pairs of lanes are in a vector. The second is added to the first, and the fourth to the third.
  // The sums of x come first, then those of y.
  const auto add_pairs = [](__m512d x, __m512d y) __attribute__((always_inline)) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd));
  };
  const auto eights = [=](const float* of) __attribute__((always_inline)) {
    return add_pairs(add_pairs(add_squares(of), add_squares(of + 16)),
                     add_pairs(add_squares(of + 32), add_squares(of + 48)));
  };
  const __m512d ab = add_twos(eights(values), eights(values + 64));
  const __m512d cd = add_twos(eights(values + 128), eights(values + 192));
  const __m512d halves = add_pairs(ab, cd);
  _mm256_storeu_pd(sums, _mm512_castpd512_pd256(add_pairs(halves, halves)));
}
#endif

// Returns the sum of `count` values. It overwrites them, and up to 16 places behind them.
HOST_DEVICE double sum_in_place(double* values, int64_t count) {
  for (; count > 1; count = (count + 3) / 4) {
    std::fill_n(values + count, 16, 0.0);
    for (int64_t i = 0; i < count; i += 16) {
      const double* v = values + i;
      add_fours(load_four(v), load_four(v + 4), load_four(v + 8), load_four(v + 12),
                values + i / 4);
    }
  }
  return values[0];
}

// The sum of squares of a chunk's blocks, one after another.
class BlockSums {
 public:
  HOST_DEVICE void add(double sum) { sums_[count_++] = sum; }
  HOST_DEVICE double total() { return count_ == 0 ? 0 : sum_in_place(sums_, count_); }

 private:
  double sums_[kChunkSize / kBlockSize + 16];
  int64_t count_ = 0;
};

}  // namespace adamprox
