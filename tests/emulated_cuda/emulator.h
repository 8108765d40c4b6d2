// Runs CUDA kernels on the host, as they are written: every thread of a block is a fiber, __syncthreads() switches to
// the next one, and blocks run one after the other. For tests: what a GPU does at once is done here in an order that
// the test chooses, so that a result which depends on it shows a missing barrier; shared memory begins as NaN and ends
// where it was asked to end, so that the address sanitizer sees what reads or writes beyond.
//
// Included before the kernels. Warp-wide operations and atomics are not here, because the kernels have none.
#pragma once

#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define LALIC_EMULATED_CUDA 1
// The special function unit's roundings: of the product with log2 e, and of the reciprocal.
inline float __expf(float x) { return exp2f(x * 1.4426950408889634f); }
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? 0.0f : a * (1.0f / b); }

#undef __launch_bounds__
#undef __forceinline__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define LALIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulator::shared_memory())

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

enum class Order { kAscending, kDescending, kShuffled };

class Block;
inline Block* running = nullptr;

// One block: its fibers, its shared memory, its barrier.
class Block {
 public:
  Block(dim3 threads, size_t shared_bytes, const std::function<void()>& body) : body_(body), shared_(shared_bytes) {
    std::memset(shared_.data(), 0xff, shared_bytes);  // NaN, in float and in double
    fibers_.resize(size_t(threads.x) * threads.y * threads.z);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].index = {unsigned(i % threads.x), unsigned(i / threads.x % threads.y),
                          unsigned(i / threads.x / threads.y)};
    }
  }

  void run(Order order, std::mt19937& random, std::vector<std::unique_ptr<char[]>>& stacks) {
    while (stacks.size() < fibers_.size()) stacks.emplace_back(new char[kStack]);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      fibers_[i].stack = stacks[i].get();
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack.ss_sp = stacks[i].get();
      fibers_[i].context.uc_stack.ss_size = kStack;
      fibers_[i].context.uc_link = nullptr;
      makecontext(&fibers_[i].context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    running = this;
    std::vector<size_t> turns(fibers_.size());
    std::iota(turns.begin(), turns.end(), size_t(0));
    if (order == Order::kDescending) std::reverse(turns.begin(), turns.end());
    for (size_t live = fibers_.size(); live > 0;) {
      if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
      const size_t before = live;
      for (size_t turn : turns) {
        if (fibers_[turn].done) continue;
        resume(fibers_[turn]);
        live -= fibers_[turn].done;
      }
      // On a GPU a barrier that some threads of a block skip by leaving early is allowed only for all that follow.
      if (live != 0 && live != before && live != fibers_.size()) left_early_ = true;
      if (left_early_ && live != 0) throw std::logic_error("some threads of a block ended before a barrier of the others");
    }
    running = nullptr;
  }

  void barrier() { leave(); }
  unsigned char* shared() { return shared_.data(); }

 private:
  static constexpr size_t kStack = 256 << 10;

  struct Fiber {
    ucontext_t context;
    char* stack = nullptr;
    uint3 index;
    bool done = false;
  };

  static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->main_stack_, &running->main_size_);
#endif
    running->body_();
    running->current_->done = true;
    running->leave();
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, fiber.stack, kStack);
#endif
    swapcontext(&main_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#endif
  }

  void leave() {
    Fiber& fiber = *current_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, main_stack_, main_size_);
#endif
    swapcontext(&fiber.context, &main_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  const std::function<void()>& body_;
  std::vector<unsigned char> shared_;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t main_;
  void* fake_ = nullptr;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
  bool left_early_ = false;
};

inline unsigned char* shared_memory() { return running->shared(); }

// Starts kernels like biwkv_cuda.cu's Launch: launch(kernel, blocks, threads, shared bytes, arguments...).
class Launch {
 public:
  Launch(Order order, unsigned seed) : order_(order), random_(seed) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared, Arguments... arguments) const {
    if (!blocks.x || !blocks.y || !blocks.z || blocks.x > INT32_MAX || blocks.y > 65535 || blocks.z > 65535) {
      throw std::logic_error("a grid that CUDA would refuse");
    }
    if (threads.x * threads.y * threads.z > 1024) throw std::logic_error("a block that CUDA would refuse");
    if (shared > 48 << 10) throw std::logic_error("more shared memory than a launch gets by default");
    const std::function<void()> body = [&] { kernel(arguments...); };
    gridDim = blocks;
    blockDim = threads;
    std::vector<int64_t> turns(int64_t(blocks.x) * blocks.y * blocks.z);
    std::iota(turns.begin(), turns.end(), int64_t(0));
    if (order_ == Order::kDescending) std::reverse(turns.begin(), turns.end());
    if (order_ == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random_);
    for (int64_t block : turns) {
      blockIdx = {unsigned(block % blocks.x), unsigned(block / blocks.x % blocks.y),
                  unsigned(block / blocks.x / blocks.y)};
      Block(threads, size_t(shared), body).run(order_, random_, stacks_);
    }
  }

 private:
  Order order_;
  mutable std::mt19937 random_;
  mutable std::vector<std::unique_ptr<char[]>> stacks_;
};

}  // namespace emulator

inline void __syncthreads() { emulator::running->barrier(); }
