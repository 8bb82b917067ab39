// The process-wide pool of worker threads: one launch at a time owns it, the calling thread is worker 0.
//
// Invariant: `try_run` never waits for another launch. When the pool is busy it returns false and the caller runs the
// program alone, so any number of launches (devices under shard_map, Python threads) make progress on any number of
// cores. Idle workers spin for a short while, because a decode loop launches again soon, and then sleep.
#pragma once
#include <cstdint>

namespace mpk {

// A job runs as job(context, worker) on workers 0 .. threads-1. It does not throw: what it works on is on the caller's stack.
using Job = void (*)(void* context, uint32_t worker) noexcept;

bool try_run(uint32_t threads, Job job, void* context);

// The number of threads of a launch: min(cores that this process may use, JAX_MPK_THREADS), at least 1.
uint32_t default_threads();

// One step of waiting: pauses at first, then gives the processor away.
class Backoff {
 public:
  void step();
  uint32_t steps() const { return steps_; }

 private:
  uint32_t steps_ = 0;
};

}  // namespace mpk
