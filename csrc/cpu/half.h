// float16 by the processor's own conversions, which compilers (GCC 12) do not find in a loop: those of
// convert.h are dozens of instructions. `count` is a multiple of 16.
#pragma once

#include <cstdint>

#include "../math/convert.h"

#if defined(ADAMPROX_TARGET_CLONES)
#include <immintrin.h>
#define VERSION(instructions) __attribute__((target(instructions)))
#else
#define VERSION(instructions)
#endif

namespace adamprox {

VERSION("default") inline void widen(const Half* halves, int count, float* floats) {
  for (int i = 0; i < count; ++i) floats[i] = Convert<Half>::widen(halves[i]);
}

VERSION("default") inline void narrow(const float* floats, int count, Half* halves) {
  for (int i = 0; i < count; ++i) halves[i] = Convert<Half>::narrow(floats[i]);
}

#if defined(ADAMPROX_TARGET_CLONES)

VERSION("arch=x86-64-v3") inline void widen(const Half* halves, int count, float* floats) {
  for (int i = 0; i < count; i += 8) {
    const auto* from = reinterpret_cast<const __m128i*>(halves + i);
    _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128(from)));
  }
}

VERSION("arch=x86-64-v3") inline void narrow(const float* floats, int count, Half* halves) {
  for (int i = 0; i < count; i += 8) {
    auto* to = reinterpret_cast<__m128i*>(halves + i);
    _mm_storeu_si128(to, _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT));
  }
}

VERSION("arch=x86-64-v4") inline void widen(const Half* halves, int count, float* floats) {
  for (int i = 0; i < count; i += 16) {
    const auto* from = reinterpret_cast<const __m256i*>(halves + i);
    _mm512_storeu_ps(floats + i, _mm512_cvtph_ps(_mm256_loadu_si256(from)));
  }
}

VERSION("arch=x86-64-v4") inline void narrow(const float* floats, int count, Half* halves) {
  for (int i = 0; i < count; i += 16) {
    auto* to = reinterpret_cast<__m256i*>(halves + i);
    const __m512 from = _mm512_loadu_ps(floats + i);
    _mm256_storeu_si256(to, _mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
  }
}

#endif
#undef VERSION

}  // namespace adamprox
