#include "thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>

namespace adamprox {
namespace {

using Work = std::function<void()>;

// Threads of our own: for a forked child, where OpenMP's would be waited for in vain, and for a
// torch that does not lend its own.
class ThreadPool {
 public:
  void run(int helpers, const Work& work) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (work_ != nullptr) {  // another thread has the helpers
      lock.unlock();
      return work();
    }
    for (; threads_ < helpers; ++threads_) {
      std::thread([this] { help(); }).detach();
    }
    work_ = &work;
    vacancies_ = helpers;
    lock.unlock();
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    work();
    lock.lock();
    vacancies_ = 0;  // a helper that wakes from now on is too late: nothing is left to do
    idle_.wait(lock, [this] { return active_ == 0; });
    work_ = nullptr;
  }

 private:
  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return vacancies_ > 0; });
      --vacancies_;
      ++active_;
      const Work& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const Work* work_ = nullptr;
  int threads_ = 0, vacancies_ = 0, active_ = 0;
};

// torch's own threads, by libtorch's stable C ABI: they are awake where a backward pass has just
// ended, and spin for a while then, on the cores that threads of our own would need.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                     void (*body)(int64_t, int64_t, void*), void* context);

TorchParallelFor find_torch_parallel_for() {
  TorchParallelFor function = nullptr;
  if (void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW)) {
    void* symbol = dlsym(library, "torch_parallel_for");
    std::memcpy(&function, &symbol, sizeof(symbol));
  }
  return function;
}

// Never destroyed: its threads outlive static destructors. A forked child has the object but not
// the threads, and perhaps a locked mutex, so it starts over.
ThreadPool* pool = new ThreadPool;
bool forked = false;

// When the library is loaded: torch may have used its threads before the first step, too.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  pool = new ThreadPool;
  forked = true;
});

}  // namespace

void run_in_parallel(int helpers, const Work& work) {
  if (helpers <= 0) return work();
  static const TorchParallelFor torch_parallel_for = find_torch_parallel_for();
  // The caller's rounding and flush-to-zero modes, so that the helpers give the same bits.
  std::fenv_t callers;
  std::fegetenv(&callers);
  const Work alike = [&] {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&callers);
    work();
    std::fesetenv(&own);
  };
  if (torch_parallel_for == nullptr || forked) return pool->run(helpers, alike);
  const auto body = [](int64_t, int64_t, void* context) { (*static_cast<const Work*>(context))(); };
  const int32_t error = torch_parallel_for(0, helpers + 1, 1, body, const_cast<Work*>(&alike));
  if (error != 0) work();  // whatever it has left undone
}

}  // namespace adamprox
