// One step by the CUDA kernels, run on the CPU; called through ctypes by tests/cuda_on_host.
#include "cuda_on_host.h"

#include <cstring>
#include <string>

namespace adamprox {
struct ChunkNotes;
ChunkNotes* chunk_notes();
}  // namespace adamprox

#include "cuda/kernel.cuh"

using namespace adamprox;

ChunkNotes* adamprox::chunk_notes() {
  __shared__ ChunkNotes notes;
  return &notes;
}

struct Step {
  void* metadata;
  int64_t num_rows, num_chunks, num_packed, num_of_blocks, num_slots, num_recipes;
  const void* payload;
  int64_t payload_bytes;
  void* prepared;
  Record* records;
  unsigned blocks, resident, seed;                        // see cuda_on_host.h
  int prepare_launches, update_launches, block_launches;  // how many there were, by kernel
  int sleeps;
};

extern "C" const char* step(Step* s) {
  static std::string error;
  const bool is_inline = s->payload_bytes <= kInlinePayload;
  LaunchArgs args(s->metadata, s->num_rows, s->num_chunks, s->num_slots,
                  is_inline ? nullptr : s->payload, s->prepared, s->records);
  if (is_inline) std::memcpy(args.inline_payload, s->payload, s->payload_bytes);
  cuda_on_host::Launch::sleeps = 0;
  const auto launch = [s](void (*kernel)(LaunchArgs), const LaunchArgs& args, int64_t) {
    cuda_on_host::launch(s->blocks, s->resident, kThreads, s->seed, [&] { kernel(args); });
    s->prepare_launches += kernel == prepare_kernel;
    s->update_launches += kernel == update_kernel<false>;
    s->block_launches += kernel == update_kernel<true>;
  };
  try {
    for_each_launch(args, s->num_recipes, s->num_chunks, s->num_packed, s->num_of_blocks, launch);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  s->sleeps = cuda_on_host::Launch::sleeps;
  return nullptr;
}
