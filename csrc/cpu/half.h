// float16 by the processor's own conversions, which compilers (GCC 12) do not find in a loop: those of
// convert.h are dozens of instructions. `count` is a multiple of 16.
#pragma once

#include <cstdint>

#include "../math/convert.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace adamprox {

HOST_DEVICE void widen(const Half* halves, int count, float* floats) {
#if defined(__AVX512F__)
  for (int i = 0; i < count; i += 16) {
    const auto* from = reinterpret_cast<const __m256i*>(halves + i);
    _mm512_storeu_ps(floats + i, _mm512_cvtph_ps(_mm256_loadu_si256(from)));
  }
#elif defined(__F16C__)
  for (int i = 0; i < count; i += 8) {
    const auto* from = reinterpret_cast<const __m128i*>(halves + i);
    _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128(from)));
  }
#else
  for (int i = 0; i < count; ++i) floats[i] = Convert<Half>::widen(halves[i]);
#endif
}

HOST_DEVICE void narrow(const float* floats, int count, Half* halves) {
#if defined(__AVX512F__)
  for (int i = 0; i < count; i += 16) {
    auto* to = reinterpret_cast<__m256i*>(halves + i);
    const __m512 from = _mm512_loadu_ps(floats + i);
    _mm256_storeu_si256(to, _mm512_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  for (int i = 0; i < count; i += 8) {
    auto* to = reinterpret_cast<__m128i*>(halves + i);
    _mm_storeu_si128(to, _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < count; ++i) halves[i] = Convert<Half>::narrow(floats[i]);
#endif
}

}  // namespace adamprox
