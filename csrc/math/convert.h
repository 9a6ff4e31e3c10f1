// Storage types and their compute types: bfloat16 and float16 are widened to float32 on load and
// rounded to nearest even on store; float32 and float64 compute as they are stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace adamprox {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename To, typename From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename Storage>
struct Convert {  // float, double
  using Compute = Storage;
  static HOST_DEVICE Compute widen(Storage x) { return x; }
  static HOST_DEVICE Storage narrow(Compute x) { return x; }
};

template <>
struct Convert<BFloat16> {
  using Compute = float;
  static HOST_DEVICE float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
  static HOST_DEVICE BFloat16 narrow(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // in one instruction
    uint16_t rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const auto rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    // The one NaN of the specification: the instruction has another one, and adding the rounding
    // bias could carry a NaN over into zero or infinity.
    return {x != x ? uint16_t{0x7fc0} : rounded};
  }
};

template <>
struct Convert<Half> {
  using Compute = float;
#if defined(__CUDA_ARCH__)
  static __device__ __forceinline__ float widen(Half x) {
    return __half2float(__ushort_as_half(x.bits));
  }
  static __device__ __forceinline__ Half narrow(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
  }
#else
  // Branch-free, so that the loop vectorises with any compiler and instruction set; and without a
  // subnormal float, which takes some processors a hundred times as long: a subnormal half is what
  // its bits add to the least normal one.
  static HOST_DEVICE float widen(Half x) {
    const uint32_t sign = (uint32_t{x.bits} & 0x8000u) << 16;
    const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
    const bool subnormal = magnitude < (1u << 23), special = magnitude >= (31u << 23);
    const float added = bit_cast<float>(magnitude + (subnormal ? 113u << 23 : 112u << 23));
    const float value = added - (subnormal ? 0x1p-14f : 0.0f);
    return bit_cast<float>(sign | bit_cast<uint32_t>(value) | (special ? 0x7f800000u : 0));
  }
  static HOST_DEVICE Half narrow(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: round the 13 bits that are dropped, then move the exponent's bias by 112.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 makes the float unit round at 2^-24, a subnormal half's unit.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on: infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
    return {static_cast<uint16_t>(sign | half)};
  }
#endif
};

template <typename Storage>
using Compute = typename Convert<Storage>::Compute;

}  // namespace adamprox
