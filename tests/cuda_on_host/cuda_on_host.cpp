// One step by the CUDA kernel, run on the CPU; called through ctypes by tests/cuda_on_host.
#include "cuda_on_host.h"

#include <cstring>
#include <string>

namespace adamprox {
struct ChunkNotes;
ChunkNotes* chunk_notes();
}  // namespace adamprox

#include "fused_adam.cuh"

using namespace adamprox;

ChunkNotes* adamprox::chunk_notes() {
  __shared__ ChunkNotes notes;
  return &notes;
}

struct Step {
  int decay;
  void* metadata;
  int64_t num_rows;
  int64_t num_chunks, num_packed;
  const void* payload;
  int64_t payload_bytes;
  void* prepared;
  Record* records;
  unsigned blocks, resident, seed;  // see cuda_on_host.h
  int launches, sleeps;             // how many there were
};

extern "C" const char* step(Step* s) {
  static std::string error;
  const bool is_inline = s->payload_bytes <= kInlinePayload;
  const auto decay = static_cast<Decay>(s->decay);
  LaunchArgs args(decay, s->metadata, s->num_rows, s->num_chunks, s->num_packed,
                  is_inline ? nullptr : s->payload, s->prepared, s->records);
  if (is_inline) std::memcpy(args.inline_payload, s->payload, s->payload_bytes);
  cuda_on_host::Launch::sleeps = 0;
  s->launches = 0;
  try {
    if (args.prepared != nullptr) {
      cuda_on_host::launch(1, 1, kThreads, s->seed, [&] { prepare_kernel(args, decay); });
      ++s->launches;
    }
    with_rule(decay, [&](auto rule) {
      cuda_on_host::launch(s->blocks, s->resident, kThreads, s->seed,
                           [&] { update_kernel<typename decltype(rule)::type>(args); });
      ++s->launches;
    });
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  s->sleeps = cuda_on_host::Launch::sleeps;
  return nullptr;
}
