// Workers: claiming, running, waiting and taking over; and what is said when a launch fails.
#include "schedule.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <string>
#include <utility>

#include "../event.h"
#include "float_mode.h"
#include "scratch.h"

namespace mpk {
namespace {

constexpr int64_t kPatience = 500;                      // us that a worker spins for an event before it sleeps
constexpr auto kSleep = std::chrono::milliseconds(10);  // at most: the deadline is looked at in between

uint64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Stopped {};  // thrown through a task that may not go on

// The memory operations of event.h for threads. Sequentially consistent where sleepers are looked at afterwards.
struct Counters {
  static uint32_t load_acquire(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
  static void add_release(uint32_t* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_SEQ_CST); }
};

}  // namespace

// A thread at work in a launch.
class Worker {
 public:
  Worker(Schedule& s, uint32_t number) : s_(s), number_(number), at_(s.lists_.size()) {
    s.progress_[number].here.store(true, std::memory_order_relaxed);
  }

  // Until nothing is left to claim; worker 0 until the launch has ended. Returns early when it has failed.
  void run() {
    const uint32_t threads = static_cast<uint32_t>(s_.lists_.size());
    while (!s_.failed()) {
      if (!number_ && s_.rouse_at_ && now_us() >= s_.rouse_at_) rouse(threads), s_.rouse_at_ = 0;
      const uint32_t own = next(number_);
      if (own != kNone && s_.blocked(own) < 0) {
        if (execute(own)) backoff_ = Backoff(kPatience);
        continue;
      }
      if (own == kNone && (number_ ? all_claimed() : s_.complete())) return;
      if (threads == 1) return s_.overdue();  // nobody else can trigger it
      if (const uint32_t task = stranded(); task != kNone && execute(task)) continue;
      if (!backoff_.step()) sleep();
      if (backoff_.steps() % 64 == 0 && over()) s_.overdue();
    }
  }

  // Runs a task that nobody else has claimed; false if somebody has, or the launch has failed. Throws OutOfMemory.
  bool execute(uint32_t task) {
    if (!scratch_) scratch_ = &thread_scratch(s_.program_->scratch);
    Schedule::Progress& mine = s_.progress_[number_];
    mine.running.store(task + 1);  // before the claim and the look at `failed`: whoever fails then waits for us
    if (s_.failed_.load() || !s_.claim(task)) {
      mine.running.store(0, std::memory_order_release);
      return false;
    }
    uint64_t* times = s_.times_ ? s_.times_ + 3 * size_t{task} : nullptr;
    if (times) times[0] = now_ns(), times[2] = number_;
    const bool ended = body(task);
    if (times) times[1] = now_ns();
    if (ended) {
      const abi::Task& t = s_.tasks_[task];
      Counters counters;
      for (int i = 0; i < t.n_triggers; ++i) event_trigger(counters, &s_.state_->counters[t.trigger[i]]);
      mine.done.fetch_add(1);
    }
    mine.running.store(0, std::memory_order_release);
    s_.wake_sleepers();
    since_ = -1;
    return ended;
  }

  // Another activation than the one of the operator that ran before.
  void forget_prologue() {
    if (scratch_) scratch_->prologue = 0;
  }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  Schedule& s_;
  const uint32_t number_;
  Scratch* scratch_ = nullptr;
  std::vector<size_t> at_;  // of every list: everything before it is claimed
  Backoff backoff_{kPatience};
  int64_t since_ = -1;  // when something last happened, as far as this worker has looked
  uint64_t done_ = 0;

  // The first task of a list that nobody has claimed.
  uint32_t next(uint32_t list) {
    const std::vector<uint32_t>& tasks = s_.lists_[list];
    size_t& at = at_[list];
    while (at < tasks.size() && s_.claimed(tasks[at])) ++at;
    return at < tasks.size() ? tasks[at] : kNone;
  }

  bool all_claimed() {
    for (uint32_t i = 0; i < at_.size(); ++i)
      if (next(i) != kNone) return false;
    return true;
  }

  // The first task of another list that nobody has claimed and that can run now: of a worker that is not here yet, or, after
  // some waiting, of any.
  uint32_t stranded() {
    const auto lists = static_cast<uint32_t>(at_.size());
    for (uint32_t i = 1; i < lists; ++i) {
      const uint32_t list = (number_ + i) % lists;
      if (!backoff_.slow() && s_.progress_[list].here.load(std::memory_order_relaxed)) continue;
      const uint32_t task = next(list);
      if (task != kNone && s_.blocked(task) < 0) return task;
    }
    return kNone;
  }

  // Sleeps until something happens, but not long. Whoever changes something counts the sleepers afterwards.
  void sleep() {
    std::unique_lock<std::mutex> lock(s_.sleep_mutex_);
    s_.sleepers_.fetch_add(1);
    const uint32_t own = next(number_);
    const bool idle = own == kNone ? !(number_ ? all_claimed() : s_.complete()) : s_.blocked(own) >= 0;
    if (idle && !s_.failed_.load() && stranded() == kNone) s_.wake_.wait_for(lock, kSleep);
    s_.sleepers_.fetch_sub(1);
    lock.unlock();
    backoff_ = Backoff(kPatience, true);
  }

  // Whether no task of the launch has ended for the deadline, since this worker began to wait or to run.
  bool over() {
    const int64_t now = now_ms();
    const uint64_t done = s_.done();
    if (since_ < 0 || done != done_) since_ = now, done_ = done;
    return now - since_ >= s_.deadline_ms_;
  }

  void pulse() {
    if (!s_.failed() && over()) s_.overdue();
    if (s_.failed()) throw Stopped();
  }

  bool body(uint32_t task) {
    const abi::Task& t = s_.tasks_[task];
    if (static_cast<abi::Kind>(s_.program_->ops[t.op].kind) == abi::Kind::NOP) return true;
    since_ = -1;
    Pulse pulse{[](void* self) { static_cast<Worker*>(self)->pulse(); }, this};
    try {
      s_.isa_.run({&s_.program_->view, s_.slots_.data(), scratch_, &pulse}, t.op, t.index);
    } catch (const Stopped&) {
      return false;
    }
    return true;
  }
};

Schedule::Schedule(std::shared_ptr<Program> program, const Isa& isa, std::vector<char*> slots,
                   std::shared_ptr<LaunchState> state, int64_t deadline_ms, uint32_t threads, uint64_t* times)
    : program_(std::move(program)), isa_(isa), slots_(std::move(slots)), state_(std::move(state)),
      epoch_(state_->epoch), deadline_ms_(deadline_ms), lists_(program_->lists(threads)), tasks_(program_->tasks),
      progress_(threads), times_(times) {}

void Schedule::work(uint32_t worker) noexcept {
  const FloatMode mode;
  try {
    Worker(*this, worker).run();
  } catch (const OutOfMemory& e) {
    out_of_memory(worker, e.bytes);
  } catch (const std::bad_alloc&) {
    out_of_memory(worker, 0);
  }
  if (worker || !failed()) return;
  for (const Progress& p : progress_)  // operands are the caller's again when nobody is in a task
    for (Backoff b(kPatience); p.running.load(std::memory_order_acquire);) b.step();
}

void Schedule::work_in_random_order(uint64_t seed) {
  const FloatMode mode;
  Worker worker(*this, 0);
  std::mt19937_64 random(seed);
  std::vector<uint32_t> ready;
  std::vector<std::vector<uint32_t>> waiting(state_->counters.size());  // event -> tasks
  for (uint32_t n = 0; n < tasks_.size; ++n) {
    if (blocked(n) < 0) ready.push_back(n);
    else
      for (int i = 0; i < tasks_[n].n_waits; ++i) waiting[tasks_[n].wait[i]].push_back(n);
  }
  while (!ready.empty()) {
    std::swap(ready[random() % ready.size()], ready.back());
    const uint32_t task = ready.back();
    ready.pop_back();
    worker.forget_prologue();
    if (claimed(task)) continue;  // it waits for two events and was found twice
    if (!worker.execute(task)) return;
    for (int i = 0; i < tasks_[task].n_triggers; ++i)
      for (uint32_t n : waiting[tasks_[task].trigger[i]])
        if (!claimed(n) && blocked(n) < 0) ready.push_back(n);
  }
  if (!complete()) overdue();
}

bool Schedule::claimed(uint32_t task) const {
  // A late worker sees the claims of later launches with the same counters, which are not its to take either.
  return static_cast<int32_t>(__atomic_load_n(&state_->claims[task], __ATOMIC_RELAXED) - epoch_) >= 0;
}

bool Schedule::claim(uint32_t task) {
  uint32_t before = __atomic_load_n(&state_->claims[task], __ATOMIC_RELAXED);
  return static_cast<int32_t>(before - epoch_) < 0 &&
         __atomic_compare_exchange_n(&state_->claims[task], &before, epoch_, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}

int Schedule::blocked(uint32_t task) const {
  const abi::Task& t = tasks_[task];
  for (int i = 0; i < t.n_waits; ++i)
    if (!event_reached(Counters::load_acquire(&state_->counters[t.wait[i]]), event_target(epoch_, t.want[i]))) return i;
  return -1;
}

uint64_t Schedule::done() const {
  uint64_t n = 0;
  for (const Progress& p : progress_) n += p.done.load();
  return n;
}

void Schedule::wake_sleepers() {
  if (!sleepers_.load()) return;
  { std::lock_guard<std::mutex> lock(sleep_mutex_); }  // whoever counted itself is asleep by now
  wake_.notify_all();
}

void Schedule::fail(const Failure& f) noexcept {
  std::lock_guard<std::mutex> lock(failure_mutex_);
  if (failed_.load()) return;
  failure_ = f, failure_.done = done();
  failed_.store(true);
  wake_sleepers();
}

// The earliest task that has not ended: the others wait because of it.
void Schedule::overdue() noexcept {
  const auto threads = static_cast<uint32_t>(progress_.size());
  for (uint32_t n = 0; n < tasks_.size; ++n) {
    Failure f;
    f.task = n, f.worker = tasks_[n].worker % threads;
    if (!claimed(n)) {
      f.kind = Failure::kWaits, f.wait = blocked(n);
      if (f.wait >= 0) f.have = Counters::load_acquire(&state_->counters[tasks_[n].wait[f.wait]]);
      return fail(f);
    }
    for (uint32_t w = 0; w < threads; ++w)
      if (progress_[w].running.load(std::memory_order_relaxed) == n + 1) {
        f.kind = Failure::kRuns, f.worker = w;
        return fail(f);
      }
  }
}

void Schedule::out_of_memory(uint32_t worker, size_t bytes) noexcept {
  Failure f;
  f.kind = Failure::kMemory, f.worker = worker, f.bytes = bytes;
  fail(f);
}

LaunchError Schedule::error() const {
  const Failure& f = failure_;
  const std::string worker = "worker " + std::to_string(f.worker);
  if (f.kind == Failure::kNone) return {};
  if (f.kind == Failure::kMemory)
    return {LaunchError::kMemory,
            "out of memory: " + worker + " asked for " + std::to_string(f.bytes) + " bytes of scratch"};
  std::string text = "deadline exceeded: " + worker + ", " + program_->task_name(f.task);
  std::string why = "nothing finished for " + std::to_string(deadline_ms_) + " ms";
  if (f.kind == Failure::kRuns) {
    text += " has not ended";
  } else if (f.wait < 0) {
    text += " has not begun";
  } else {
    const abi::Task& t = tasks_[f.task];
    const uint32_t want = t.want[f.wait];
    text += " waits for event " + std::to_string(t.wait[f.wait]) + ": have " +
            std::to_string(event_have(f.have, epoch_, want)) + ", want " + std::to_string(want);
    if (progress_.size() == 1) why = "no earlier task can trigger it";
  }
  return {LaunchError::kDeadline,
          text + "; " + std::to_string(f.done) + " of " + std::to_string(tasks_.size) + " tasks are done, " + why};
}

}  // namespace mpk
