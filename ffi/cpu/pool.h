// The process-wide pool of worker threads. A launch offers its work to some of them; the calling thread is worker 0.
//
// Invariant: nobody waits for the pool. One launch at a time may offer, others run alone; a worker that the system does
// not let run takes up its offer late or never, and the offer is withdrawn when the launch has ended. Only the workers
// that are offered something wake up. Idle workers spin for a short while, because a decode loop launches again soon,
// unless somebody else needs the processor, and then sleep.
#pragma once
#include <cstdint>
#include <memory>

namespace mpk {

// What a launch has to do. Workers share it: one that comes late finds nothing left to do, and no dangling memory.
class Job {
 public:
  virtual ~Job() = default;
  virtual void work(uint32_t worker) noexcept = 0;
};

// Offers `job` to the workers 1 .. threads-1 (to fewer when there are no more threads to be had). False when another
// launch has the pool, and for a single thread. Otherwise `withdraw` must follow. Workers that sleep do not hear of it
// until `rouse`, which takes the caller about as long as a short launch.
bool offer(uint32_t threads, const std::shared_ptr<Job>& job);
void rouse(uint32_t threads);
void withdraw(uint32_t threads);

int64_t now_us();

// The number of threads of a launch: min(cores that this process may use, JAX_MPK_THREADS), at least 1.
uint32_t default_threads();

// Waiting: pauses at first, then gives the processor away, then says that it is time to sleep: after `patience`, or at
// once when the processor was not given back soon, because then somebody else needs it.
class Backoff {
 public:
  explicit Backoff(int64_t patience_us, bool slow = false) : patience_(patience_us), steps_(slow ? kPauses : 0) {}
  // False when the caller should sleep.
  bool step();
  uint32_t steps() const { return steps_; }
  // Past the first pauses: whatever is waited for is not about to happen.
  bool slow() const { return steps_ >= kPauses; }

 private:
  static constexpr uint32_t kPauses = 256;
  int64_t patience_, start_ = 0, last_ = 0;
  uint32_t steps_;
};

}  // namespace mpk
