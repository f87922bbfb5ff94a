// A block's threads on one thread of the CPU. Each runs until it has to wait for others (a barrier, a shuffle) and is
// then left as a fiber; when all it waits for are there, they go on. In order or in reverse: of two threads that
// touch one place with no barrier between, one order has the other go first. What a GPU would fail at, or leave
// undefined, ends the launch with a message.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#pragma GCC visibility push(hidden)  // several libraries of kernels are loaded side by side

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// Where __shared__ variables lie, which one block after the other uses. The names are the linker's.
extern char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));

namespace emulated {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

// Runs threads one after the other until one of them waits; that one keeps it.
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool fresh = true;
  char stack[STACK_BYTES];
};

enum class State { NEW, WAITS_FOR_WARP, WAITS_FOR_BLOCK, ENDED };

struct Thread {
  State state = State::NEW;
  Fiber* fiber = nullptr;   // while it waits
  uint64_t shown, seen;     // to and by the other lanes, at the last meeting of the warp
};

// A thread's work: `run` of `what`.
struct Kernel {
  void (*run)(const void* what);
  const void* what;
};

struct Block {
  std::vector<Thread> threads;
  unsigned started, current;
  Kernel kernel;
};
inline Block block;
inline jmp_buf scheduler;
inline Fiber* running;  // null in the scheduler
inline std::vector<Fiber*> fibers;  // all, and those that nobody needs
inline std::vector<Fiber*> idle;
inline bool backwards;
inline char message[256];  // of the fault; empty where there was none

// setjmp and longjmp, since swapcontext asks the system for the signal mask each time.
inline void leave() {
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

// Ends the launch; from a kernel it does not return.
inline void fault(const char* what) {
  std::snprintf(message, sizeof(message), "CUDA emulation: %s (block %u %u, thread %u)", what, blockIdx.x, blockIdx.y,
                threadIdx.x);
  if (running) _longjmp(scheduler, 1);
}

// The i-th in the order of this launch.
inline unsigned in_order(unsigned i, unsigned count) { return backwards ? count - 1 - i : i; }

inline void now(unsigned thread) { block.current = threadIdx.x = thread; }

inline void run_threads() {
  for (;;) {
    while (block.started < block.threads.size()) {
      now(in_order(block.started++, block.threads.size()));
      block.kernel.run(block.kernel.what);
      block.threads[block.current].state = State::ENDED;
    }
    idle.push_back(running);
    leave();
  }
}

inline void wait(State state) {
  block.threads[block.current].state = state;
  block.threads[block.current].fiber = running;
  leave();
}

// Returns when the fiber's thread waits, no thread is left to start, or after a fault.
inline void resume(Fiber* fiber) {
  running = fiber;
  if (!_setjmp(scheduler)) {
    if (!fiber->fresh) _longjmp(fiber->at, 1);
    fiber->fresh = false;
    setcontext(&fiber->start);
  }
  running = nullptr;
}

inline Fiber* some_fiber() {
  if (idle.empty()) {
    Fiber* fiber = new Fiber;
    fibers.push_back(fiber);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack;
    fiber->start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber->start, run_threads, 0);
    return fiber;
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// Lets `count` threads go on from a meeting; false where not all of them are at it.
inline bool meet(unsigned first, unsigned count, State state) {
  Thread* threads = &block.threads[first];
  for (unsigned i = 0; i < count; ++i)
    if (threads[i].state != state) return false;
  for (unsigned i = 0; i < count; ++i) threads[i].seen = threads[i].shown;
  for (unsigned i = 0; i < count && !*message; ++i) {
    now(first + in_order(i, count));
    resume(block.threads[block.current].fiber);
  }
  return true;
}

inline bool some_meet() {
  const unsigned count = block.threads.size(), warps = (count + WARP - 1) / WARP;
  bool met = false;
  for (unsigned i = 0; i < warps && !*message; ++i) {
    const unsigned first = WARP * in_order(i, warps);
    met |= meet(first, count - first < WARP ? count - first : WARP, State::WAITS_FOR_WARP);
  }
  return met || meet(0, count, State::WAITS_FOR_BLOCK);
}

inline void run_block(const Kernel& kernel, unsigned threads) {
  char* const shared = __start_emulated_shared;
  if (shared) std::memset(shared, 0xff, __stop_emulated_shared - shared);  // NaN until written
  block.threads.assign(threads, Thread{});
  block.started = 0;
  block.kernel = kernel;
  while (block.started < threads && !*message) resume(some_fiber());
  while (!*message && some_meet()) {
  }
  if (*message) return;
  for (const Thread& t : block.threads)
    if (t.state != State::ENDED) return fault("some threads wait for others that do not come");
}

// While it lives, a kernel's access to a guard page, and what -fsanitize=undefined finds, are faults. Outside of kernels
// they are what they were before.
class Signals {
 public:
  Signals() {
    struct sigaction action {};
    action.sa_sigaction = [](int number, siginfo_t*, void*) {
      if (running) fault(number == SIGSEGV ? "memory that is not there" : "misaligned access, or otherwise undefined");
      restore();
    };
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // a fault leaves it by longjmp
    for (int i = 0; i < 3; ++i) sigaction(NUMBERS[i], &action, &before[i]);
  }
  ~Signals() { restore(); }

 private:
  static constexpr int NUMBERS[] = {SIGSEGV, SIGILL, SIGTRAP};
  static inline struct sigaction before[3];
  static void restore() {
    for (int i = 0; i < 3; ++i) sigaction(NUMBERS[i], &before[i], nullptr);
  }
};

// All blocks of a grid, one after the other.
inline void run_grid(dim3 grid, unsigned threads, const Kernel& kernel) {
  const Signals signals;
  *message = 0;
  gridDim = grid;
  blockDim = dim3(threads);
  const uint64_t blocks = uint64_t{grid.x} * grid.y;
  for (uint64_t i = 0; i < blocks && !*message; ++i) {
    const uint64_t at = backwards ? blocks - 1 - i : i;
    blockIdx = dim3(at % grid.x, at / grid.x, 0);
    run_block(kernel, threads);
  }
  if (*message) {  // some fibers are in the middle of a kernel
    for (Fiber* fiber : fibers) delete fiber;
    fibers.clear();
    idle.clear();
  }
}

}  // namespace emulated

#pragma GCC visibility pop
