// What the kernels of csrc/cuda need of CUDA, for a C++ compiler: each thread of a block is a fiber,
// and a barrier hands over to the next fiber. Blocks are host threads that take turns, as a seed has
// it: one that comes to an atomic, a fence, a sleep or a barrier may have to let others go first. No
// more than `resident` of them have begun and not ended, as on a GPU that is too small.
#pragma once

#include <ucontext.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#define CUDART_VERSION 12000  // 4 KB of kernel parameters: payloads beyond that are tested too
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // of the host thread: of the block

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// As a GPU, which traps.
template <typename T>
T* aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) {
    throw std::runtime_error("an access is not aligned");
  }
  return address;
}
template <typename T>
T __ldcg(const T* from) {
  return *aligned(from);
}
inline uint4 __ldcs(const uint4* from) { return *aligned(from); }
inline void __stcg(uint4* to, uint4 value) { *aligned(to) = value; }
inline void __stcs(uint4* to, uint4 value) { *aligned(to) = value; }

struct Dim {
  unsigned x;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim gridDim;

namespace cuda_on_host {

// One launch: which block may run.
class Launch {
 public:
  Launch(unsigned blocks, unsigned resident, unsigned seed)
      : blocks_(blocks), resident_(resident), random_(seed) {}

  void run(const std::function<void()>& block) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < blocks_; ++i) {
      threads.emplace_back([this, i, &block] {
        current = this;
        blockIdx.x = i;
        wait_for_turn();
        try {
          block();
        } catch (const std::exception& e) {
          if (error_.empty()) error_ = e.what();
        }
        end();
      });
    }
    begin_more();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      pass_turn();
    }
    for (std::thread& thread : threads) thread.join();
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Lets any block go on, this one included.
  void yield() {
    if (running_.size() > 1) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        pass_turn();
      }
      wait_for_turn();
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  void sleep() {
    ++sleeps;
    if (++idle_ > 1000 * running_.size()) throw std::runtime_error("every block waits");
    yield();
  }

  void get_on() { idle_ = 0; }

  std::mt19937& random() { return random_; }

  static inline thread_local Launch* current = nullptr;
  static inline int sleeps = 0;

 private:
  void begin_more() {
    while (running_.size() < resident_ && begun_ < blocks_) running_.push_back(begun_++);
  }

  void pass_turn() {
    if (!running_.empty()) turn_ = running_[random_() % running_.size()];
    changed_.notify_all();
  }

  void wait_for_turn() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == static_cast<int>(blockIdx.x); });
  }

  void end() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < running_.size(); ++i) {
      if (running_[i] == blockIdx.x) running_.erase(running_.begin() + i--);
    }
    begin_more();
    pass_turn();
  }

  const unsigned blocks_, resident_;
  std::mt19937 random_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<unsigned> running_;
  unsigned begun_ = 0;
  int turn_ = -1;
  size_t idle_ = 0;  // sleeps since something has happened
  std::string error_;
};

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel)
      : kernel_(kernel), fibers_(threads), stacks_(new char[threads * kStack]) {}

  void run() {
    running_ = this;
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = &stacks_[t * kStack];
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // Every round takes each thread to the next barrier, or each to its end, the first or the last
    // thread first.
    for (size_t finished = 0; finished == 0;) {
      const bool backwards = Launch::current->random()() % 2 != 0;
      for (unsigned warp = 0; warp < fibers_.size(); warp += kWarp) {
        // Every round takes each of its threads to the next shuffle, or none.
        for (unsigned shuffling = kWarp; shuffling == kWarp;) {
          shuffling = 0;
          for (unsigned t = warp; t < warp + kWarp; ++t) {
            current_ = backwards ? fibers_.size() - 1 - t : t;
            threadIdx.x = current_;
            fibers_[current_].shuffles = false;
            swapcontext(&scheduler_, &fibers_[current_].context);
            if (!error_.empty()) throw std::runtime_error(error_);
            shuffling += fibers_[current_].shuffles;
          }
          if (shuffling % kWarp != 0) {
            throw std::runtime_error("some threads of a warp shuffle without the others");
          }
        }
      }
      for (const Fiber& fiber : fibers_) finished += fiber.finished;
      if (finished != 0 && finished != fibers_.size()) {
        throw std::runtime_error(
            "some threads of a block wait at a barrier that others never reach");
      }
      voted_ = vote_;
      vote_ = false;
      if (Launch::current->random()() % 8 == 0) Launch::current->yield();
    }
  }

  static bool barrier(bool vote) {
    Block& block = *running_;
    block.vote_ |= vote;
    swapcontext(&block.fibers_[block.current_].context, &block.scheduler_);
    return block.voted_;
  }

  // What the thread that is `distance` away, by exclusive or, gives; all of a warp call it.
  static double shuffle(double value, unsigned distance) {
    Block& block = *running_;
    Fiber& fiber = block.fibers_[block.current_];
    const unsigned partner = block.current_ ^ distance;
    const unsigned turn = fiber.turn++ % 2;  // a late thread still finds the value of the last one
    fiber.given[turn] = value;
    fiber.shuffles = true;
    swapcontext(&fiber.context, &block.scheduler_);
    return block.fibers_[partner].given[turn];
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  static constexpr unsigned kWarp = 32;
  struct Fiber {
    ucontext_t context;
    bool finished = false, shuffles = false;
    unsigned turn = 0;
    double given[2];
  };

  static void enter() {
    try {
      running_->kernel_();
    } catch (const std::exception& e) {
      running_->error_ = e.what();
    }
    running_->fibers_[running_->current_].finished = true;
  }

  static inline thread_local Block* running_ = nullptr;
  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  ucontext_t scheduler_;
  unsigned current_ = 0;
  bool vote_ = false, voted_ = false;
  std::string error_;
};

inline void launch(unsigned blocks, unsigned resident, unsigned threads, unsigned seed,
                   const std::function<void()>& kernel) {
  gridDim.x = blocks;
  Launch(blocks, resident, seed).run([&] { Block(threads, kernel).run(); });
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::barrier(false); }
inline int __syncthreads_or(int vote) { return cuda_on_host::Block::barrier(vote != 0); }
inline double __shfl_xor_sync(unsigned, double value, int distance) {
  return cuda_on_host::Block::shuffle(value, distance);
}
inline void __threadfence() { cuda_on_host::Launch::current->yield(); }
inline void __nanosleep(unsigned) { cuda_on_host::Launch::current->sleep(); }
inline unsigned atomicInc(unsigned* address, unsigned most) {
  cuda_on_host::Launch::current->yield();
  const unsigned old = *address;
  *address = old >= most ? 0 : old + 1;
  cuda_on_host::Launch::current->get_on();
  cuda_on_host::Launch::current->yield();
  return old;
}
// In shared memory, which the threads of a block touch one after another.
inline void atomicAdd(unsigned* address, unsigned value) { *address += value; }
