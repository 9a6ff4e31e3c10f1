#include "thread_pool.h"

#include <pthread.h>

#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace adamprox {
namespace {

class ThreadPool {
 public:
  void run(int helpers, const std::function<void()>& work) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (helpers <= 0 || work_ != nullptr) {
      lock.unlock();
      return work();
    }
    for (; threads_ < helpers; ++threads_) {
      std::thread([this] { help(); }).detach();
    }
    work_ = &work;
    vacancies_ = helpers;
    std::fegetenv(&environment_);
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
      // The caller's rounding and flush-to-zero modes, so that the helpers give the same bits.
      std::fesetenv(&environment_);
      const std::function<void()>& work = *work_;
      lock.unlock();
      work();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void()>* work_ = nullptr;
  std::fenv_t environment_{};
  int threads_ = 0, vacancies_ = 0, active_ = 0;
};

// Never destroyed: its threads outlive static destructors. A forked child has the object but not
// the threads, and perhaps a locked mutex, so it starts over.
ThreadPool* pool = nullptr;

}  // namespace

void run_in_parallel(int helpers, const std::function<void()>& work) {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new ThreadPool;
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });
  });
  pool->run(helpers, work);
}

}  // namespace adamprox
