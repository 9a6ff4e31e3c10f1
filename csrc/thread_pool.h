// Threads that help the calling one, kept between steps.
#pragma once

#include <functional>

namespace adamprox {

// Calls work() on the calling thread and on up to `helpers` others; returns when every call that
// began has ended, so work() must share out its work itself and may run on the caller alone (which
// it does when another thread has the helpers). A forked child gets helpers of its own.
void run_in_parallel(int helpers, const std::function<void()>& work);

}  // namespace adamprox
