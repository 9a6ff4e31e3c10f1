// torch's threads that help the calling one. A forked child has one thread only.
#pragma once

#include <functional>

namespace adamprox {

// Calls work() on the calling thread and on up to `helpers` others; returns when every call that
// began has ended. So work() must share out its work itself; it may run on the caller alone, or on
// one thread several times.
void run_in_parallel(int helpers, const std::function<void()>& work);

}  // namespace adamprox
