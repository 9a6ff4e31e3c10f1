// What the kernels of csrc/fused_adam.cuh need of CUDA, for a C++ compiler: each thread of a block
// is a fiber, a barrier hands over to the next fiber, and blocks run one after another.
#pragma once

#include <ucontext.h>

#include <functional>
#include <stdexcept>
#include <vector>

#define CUDART_VERSION 12000  // 4 KB of kernel parameters: payloads beyond that are tested too
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint4 __ldcg(const uint4* from) { return *from; }
inline void __stcg(uint4* to, uint4 value) { *to = value; }

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

class Block {
 public:
  Block(unsigned threads, std::function<void()> kernel)
      : kernel_(std::move(kernel)), fibers_(threads), stacks_(threads * kStack) {}

  void run() {
    running_ = this;
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      fiber.finished = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = &stacks_[t * kStack];
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // Every round takes each thread to the next barrier, or each to its end.
    for (size_t finished = 0; finished == 0;) {
      for (current_ = 0; current_ < fibers_.size(); ++current_) {
        threadIdx.x = current_;
        swapcontext(&scheduler_, &fibers_[current_].context);
        finished += fibers_[current_].finished;
      }
      if (finished != 0 && finished != fibers_.size()) {
        throw std::runtime_error(
            "some threads of a block wait at a barrier that others never reach");
      }
    }
  }

  static void barrier() {
    Block& block = *running_;
    swapcontext(&block.fibers_[block.current_].context, &block.scheduler_);
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  struct Fiber {
    ucontext_t context;
    bool finished;
  };

  static void enter() {
    running_->kernel_();
    running_->fibers_[running_->current_].finished = true;
  }

  static inline Block* running_ = nullptr;
  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<char> stacks_;
  ucontext_t scheduler_;
  unsigned current_ = 0;
};

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  Block block(threads, kernel);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) block.run();
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::barrier(); }
