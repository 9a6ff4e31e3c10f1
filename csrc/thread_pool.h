// Threads that help the calling one, kept between steps: torch's, or in a forked child our own.
#pragma once

#include <functional>

namespace adamprox {

// Calls work() on the calling thread and on up to `helpers` others; returns when every call that
// began has ended, so work() must share out its work itself and may run on the caller alone, or on
// one thread several times.
void run_in_parallel(int helpers, const std::function<void()>& work);

}  // namespace adamprox
