// torch's threads that help the calling one. A forked child has one thread only.
#pragma once

#include <pthread.h>

#include <cfenv>
#include <cstdint>

#include "../host/torch_abi.h"

namespace adamprox {

// A forked child has OpenMP's state, but not its threads: it would wait for them in vain.
inline bool forked = false;
inline const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls work() on the calling thread and on up to `helpers` others; returns when every call that
// began has ended. So work() must share out its work itself; it may run on the caller alone, or on
// one thread several times.
template <typename Work>
void run_in_parallel(int helpers, const Work& work) {
  // By libtorch's stable C ABI: its threads are awake where a backward pass has just ended, and spin
  // for a while then, on the cores that threads of our own would need.
  const auto parallel_for = TorchAbi::get().parallel_for;
  if (helpers <= 0 || forked || parallel_for == nullptr) return work();
  // The caller's rounding and flush-to-zero modes, so that the helpers give the same bits.
  std::fenv_t callers;
  std::fegetenv(&callers);
  auto alike = [&] {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&callers);
    work();
    std::fesetenv(&own);
  };
  const auto body = [](int64_t, int64_t, void* f) { (*static_cast<decltype(alike)*>(f))(); };
  const int32_t error = parallel_for(0, helpers + 1, 1, body, &alike);
  if (error != 0) work();  // what it has left undone
}

}  // namespace adamprox
