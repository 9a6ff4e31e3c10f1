// What a step does to a chunk on the CPU, for each instruction set: sweeps.cpp, compiled once for each.
#pragma once

#include <cstdint>

#include "../table.h"

namespace adamprox {

struct Span {  // some elements of one row
  const TensorRow& row;
  void* grad;
  int64_t begin, count;
  int64_t after;  // how many the same thread is about to work on next

  template <typename T>
  HOST_DEVICE T* at(void* data) const {
    return static_cast<T*>(data) + begin;
  }

  HOST_DEVICE Span part(int64_t first, int64_t size) const {
    return {row, grad, begin + first, size, after + count - first - size};
  }
};

struct Sweeps {
  // Updates a part of one of AdamProxL2's blocks. Returns the sum of the squares of the new params.
  double (*update_part)(const Span&, const Scalars&);
  // Updates any other span. It shrinks whole blocks, too.
  void (*update)(const Span&, const Scalars&);
  void (*shrink)(const Span&, double shrinkage);
  void (*average)(const Span&, const Scalars&);  // into the state "ema"
  // Telemetry's notes. Those of params are taken once the params are final.
  void (*note_updates)(const Span&, const Scalars&, Record&);
  void (*note_params)(const Span&, Record&);
};

extern const Sweeps sweeps_baseline;
#if defined(ADAMPROX_X86)
extern const Sweeps sweeps_avx2, sweeps_avx512;
#endif

}  // namespace adamprox
