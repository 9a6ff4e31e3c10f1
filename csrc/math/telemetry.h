// What a tracked step notes of a chunk: how many of its updates are of which magnitude, how many of
// its new params are zero, NaN or infinite, and the sums of squares of both.
//
// A magnitude is abs(update) / alpha, alpha being the learning rate without its schedule. Bin 0 has
// what is below 2^-27, bin 28 what is at least 1, bin b between them [2^(b-28), 2^(b-27)). As floats of
// one sign are ordered like their bits, and a power of two only moves the exponent, a difference of
// bits tells the bin: integers, and exact. No bin counts a NaN.
//
// Squares are summed block by block: the halves of a block are added until one number is left, which
// vectors and warps do without looking at neighbours, and in the compute type, which nine roundings
// may cost 2^-21 of the sum. Blocks go by the tree of reduction_tree.h, in double.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "convert.h"

namespace adamprox {

constexpr int kBins = 29;
constexpr int kZeros = kBins, kNaNs = kBins + 1, kInfinities = kBins + 2;  // of the new param
constexpr int kCounts = kBins + 3;

constexpr int kBlockSize = 256;

struct Record {
  double step;  // Scalars::step; 0: nothing has been noted here
  double param_squares, update_squares;
  uint32_t counts[kCounts];
};
static_assert(sizeof(Record) == 19 * 8, "python/adamprox/telemetry.py reads it as 19 words");

// The bits of an absolute value. Signed, since vectors of unsigned integers do not compare before
// AVX-512.
template <typename T>
struct Magnitude {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  static constexpr Bits kInfinity = Bits{sizeof(T) == 4 ? 0xff : 0x7ff} << kMantissa;  // NaN: above
  static constexpr Bits kAllButTheSign = std::numeric_limits<Bits>::max();
  static HOST_DEVICE Bits of(T x) { return bit_cast<Bits>(x) & kAllButTheSign; }
};

template <typename T>
class MagnitudeClasses {
 public:
  explicit HOST_DEVICE MagnitudeClasses(double alpha)
      : lowest_(M::of(static_cast<T>(alpha)) - (Bits{kBins - 1} << M::kMantissa)) {}

  // The bin of an update; a NaN is in the last one, and has to be taken out again.
  HOST_DEVICE uint32_t bin(T update) const {
    const Bits octave = (M::of(update) - lowest_) >> M::kMantissa;  // may be negative
    const Bits bin = octave < kBins - 1 ? octave : Bits{kBins - 1};
    return static_cast<uint32_t>(bin > 0 ? bin : Bits{0});
  }

 private:
  using M = Magnitude<T>;
  using Bits = typename M::Bits;
  Bits lowest_;  // of alpha * 2^-28
};

// Where a param counts, or -1.
template <typename T>
HOST_DEVICE int special_class(T param) {
  const auto bits = Magnitude<T>::of(param);
  if (bits == 0) return kZeros;
  if (bits < Magnitude<T>::kInfinity) return -1;
  return bits == Magnitude<T>::kInfinity ? kInfinities : kNaNs;
}

}  // namespace adamprox
