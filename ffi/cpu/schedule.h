// Running the tasks of one launch on any number of threads, under the event protocol.
//
// A worker goes through its own list in record order and runs a task when its events are there. While it waits, it takes
// over the first task of another list that can run: a worker that the system does not let run (or that came late, or
// never) holds up nothing but the task that it is in the middle of. Every task is claimed before it runs, and run by who
// claimed it. Results do not depend on who that is.
//
// A launch has ended when every task has; nobody waits for workers to leave. Those that are late hold the schedule and
// with it the program, but touch no operand, since there is nothing left to claim.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "launch.h"
#include "pool.h"

namespace mpk {

class Schedule final : public Job {
 public:
  // `slots`: address of every slot of the program. The state's epoch is this launch's. `times`: see LaunchOptions.
  Schedule(std::shared_ptr<Program> program, const Isa& isa, std::vector<char*> slots,
           std::shared_ptr<LaunchState> state, int64_t deadline_ms, uint32_t threads, uint64_t* times);

  // Workers that sleep are roused by worker 0 at this time (now_us; 0: never).
  void rouse_at(int64_t time) { rouse_at_ = time; }

  // What worker `worker` does; worker 0 returns when the launch has ended or failed, and no task is running.
  void work(uint32_t worker) noexcept override;

  // Instead of `work`: every task on this thread, in an order that respects the events and nothing else. What the
  // schedule must be correct under. Throws std::bad_alloc.
  void work_in_random_order(uint64_t seed);

  // What went wrong (kNone: nothing), once worker 0 has returned.
  LaunchError error() const;

 private:
  friend class Worker;

  // Of one worker; read by the others.
  struct alignas(64) Progress {
    std::atomic<uint64_t> done{0};     // tasks, and their triggers
    std::atomic<uint32_t> running{0};  // the task that it is in, plus 1
    std::atomic<bool> here{false};     // it has begun
  };

  // What made the launch fail. Plain data: a text may need memory that is not there.
  struct Failure {
    enum Kind { kNone, kWaits, kRuns, kMemory } kind = kNone;
    uint32_t worker = 0, task = 0;
    int wait = 0;  // kWaits: which one (-1: none, but nobody began), and the counter's value
    uint32_t have = 0;
    uint64_t done = 0;  // tasks, in the whole launch
    size_t bytes = 0;   // kMemory: that were asked for
  };

  bool claimed(uint32_t task) const;
  bool claim(uint32_t task);         // false when somebody else has
  int blocked(uint32_t task) const;  // its first wait that is not satisfied, or -1
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  uint64_t done() const;
  bool complete() const { return done() == tasks_.size; }

  void overdue() noexcept;
  void out_of_memory(uint32_t worker, size_t bytes) noexcept;
  void fail(const Failure& f) noexcept;
  void wake_sleepers();

  const std::shared_ptr<Program> program_;
  const Isa& isa_;
  const std::vector<char*> slots_;
  const std::shared_ptr<LaunchState> state_;
  const uint32_t epoch_;
  const int64_t deadline_ms_;
  const std::vector<std::vector<uint32_t>>& lists_;
  const Span<abi::Task> tasks_;
  std::vector<Progress> progress_;
  int64_t rouse_at_ = 0;
  uint64_t* const times_;

  std::atomic<bool> failed_{false};
  std::mutex failure_mutex_;
  Failure failure_;

  // Waiting beyond a while: `sleepers_` is counted up before a last look, and looked at after every change.
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

}  // namespace mpk
