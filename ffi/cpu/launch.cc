// The launch: operands to slot addresses, tasks to threads, waits and triggers around every task.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include "../event.h"
#include "float_mode.h"
#include "pool.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mpk {
namespace {

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if defined(__SANITIZE_ADDRESS__)
void guard(const char* p, size_t n) { __asan_poison_memory_region(p, n); }
void unguard(const char* p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
void guard(const char*, size_t) {}
void unguard(const char*, size_t) {}
#endif

// Scratch memory of a thread: grows to the largest program that it has run. Large parts are pages that the system fills with
// zeros when a task touches them. Between the parts is room that nobody touches, which AddressSanitizer checks.
class ThreadScratch {
 public:
  ~ThreadScratch() {
    unguard(memory_.get(), capacity_);
  }

  // Throws OutOfMemory, and is then as before.
  Scratch& prepare(const ScratchSize& size) {
    const auto round = [](size_t n) { return (n + 127) / 64 * 64; };
    constexpr size_t scalars = abi::MAX_REGS * abi::LANES * 4, vectors = abi::MAX_REGS * STRIP * 4;
    const size_t panel = std::max<size_t>(4 * PANEL_K * PANEL_N, static_cast<size_t>(size.panel));
    const size_t accesses = 8 * static_cast<size_t>(size.accesses), keys = 8 * static_cast<size_t>(size.keys);
    size_t total = 64 + round(scalars) + 2 * round(vectors) + round(panel) + 2 * round(accesses) + round(keys) + round(size.act);
    for (int64_t n : size.acc) total += round(n);
    if (total > capacity_) {
      Memory memory(static_cast<char*>(std::calloc(total, 1)));
      if (!memory) throw OutOfMemory(total);
      unguard(memory_.get(), capacity_);
      memory_ = std::move(memory), capacity_ = total;
    }
    unguard(memory_.get(), capacity_);
    char* at = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
    const auto take = [&](size_t n) {
      guard(at + n, round(n) - n);
      return std::exchange(at, at + round(n));
    };
    s_.scalars = reinterpret_cast<uint32_t*>(take(scalars));
    s_.vectors = reinterpret_cast<uint32_t*>(take(vectors));
    s_.spread = reinterpret_cast<uint32_t*>(take(vectors));
    s_.panel = reinterpret_cast<float*>(take(panel));
    s_.base = reinterpret_cast<int64_t*>(take(accesses));
    s_.origin = reinterpret_cast<char**>(take(accesses));
    s_.keys = reinterpret_cast<uint64_t*>(take(keys));
    s_.act = take(size.act);
    for (int j = 0; j <= MAX_ACC; ++j) s_.acc[j] = take(size.acc[j]);
    s_.prologue = 0;
    return s_;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<char, Free>;
  Scratch s_{};
  Memory memory_;
  size_t capacity_ = 0;
};

thread_local ThreadScratch thread_scratch;

struct alignas(64) Progress {
  std::atomic<uint64_t> tasks{0};
};

// What made a worker give up. Plain data: building a text may need memory that is not there.
struct Failure {
  enum Kind { kNone, kWaits, kRuns, kMemory } kind = kNone;
  uint32_t worker = 0, task = UINT32_MAX;
  int wait = 0;       // kWaits: which one, and the counter's value
  uint32_t have = 0;
  uint64_t done = 0;  // tasks, in the whole launch
  size_t bytes = 0;   // kMemory: that were asked for
};

struct Launch {
  Launch(Program& p, const Isa& isa, const std::vector<char*>& slots, LaunchState& state, int64_t deadline_ms, uint32_t threads)
      : p(p), isa(isa), slots(slots), state(state), deadline_ms(deadline_ms), progress(threads) {}

  Program& p;
  const Isa& isa;
  const std::vector<char*>& slots;
  LaunchState& state;
  int64_t deadline_ms;
  bool alone = false;
  std::vector<Progress> progress;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  Failure failure;

  uint64_t done() const {
    uint64_t n = 0;
    for (const Progress& x : progress) n += x.tasks.load(std::memory_order_relaxed);
    return n;
  }

  // Every worker that gives up comes here. What counts is the earliest task, the others wait because of it, or a lack of
  // memory.
  void fail(Failure f) noexcept {
    std::lock_guard<std::mutex> lock(mutex);
    if (failure.kind == Failure::kMemory || (f.kind != Failure::kMemory && f.task >= failure.task)) return;
    f.done = done();
    failure = f;
    failed.store(true);
  }

  void waits(uint32_t worker, uint32_t task, int wait) noexcept {
    Failure f;
    f.kind = Failure::kWaits, f.worker = worker, f.task = task, f.wait = wait;
    f.have = __atomic_load_n(&state.counters[p.tasks[task].wait[wait]], __ATOMIC_ACQUIRE);
    fail(f);
  }

  LaunchError error() const {
    const Failure& f = failure;
    const std::string worker = "worker " + std::to_string(f.worker);
    if (f.kind == Failure::kMemory)
      return {LaunchError::kMemory, "out of memory: " + worker + " asked for " + std::to_string(f.bytes) + " bytes of scratch"};
    std::string text = "deadline exceeded: " + worker + ", " + p.task_name(f.task);
    if (f.kind == Failure::kWaits) {
      const abi::Task& t = p.tasks[f.task];
      const uint32_t want = t.want[f.wait];
      text += " waits for event " + std::to_string(t.wait[f.wait]) + ": have " +
              std::to_string(event_have(f.have, state.epoch, want)) + ", want " + std::to_string(want);
    } else {
      text += " has not ended";
    }
    text += "; " + std::to_string(f.done) + " of " + std::to_string(p.tasks.size) + " tasks are done, ";
    return {LaunchError::kDeadline, text + (alone && f.kind == Failure::kWaits ? "no earlier task can trigger it"
                                            : "nothing finished for " + std::to_string(deadline_ms) + " ms")};
  }
};

// Thrown through a task that may not go on.
struct Stopped {};

// A thread at work in a launch: the memory operations of event.h, and the deadline of what it waits for or runs.
class Worker {
 public:
  Worker(Launch& l, uint32_t number) : l_(l), number_(number), scratch_(thread_scratch.prepare(l.p.scratch)) {}

  uint32_t load_acquire(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
  void add_release(uint32_t* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE); }
  bool keep_waiting() {
    if (l_.alone) return false;
    backoff_.step();
    return backoff_.steps() % 64 || !over();
  }

  // False when the launch has failed.
  bool wait(uint32_t task) {
    const abi::Task& t = l_.p.tasks[task];
    for (int i = 0; i < t.n_waits; ++i) {
      start();
      if (event_wait(*this, &l_.state.counters[t.wait[i]], event_target(l_.state.epoch, t.want[i]))) continue;
      l_.waits(number_, task, i);
      return false;
    }
    return true;
  }

  // False when the launch has failed.
  bool run(uint32_t task) {
    const abi::Task& t = l_.p.tasks[task];
    if (static_cast<abi::Kind>(l_.p.ops[t.op].kind) != abi::Kind::NOP) {
      start();
      Pulse pulse{[](void* self) { static_cast<Worker*>(self)->pulse(); }, this};
      try {
        l_.isa.run({&l_.p.view, l_.slots.data(), &scratch_, &pulse}, t.op, t.index);
      } catch (const Stopped&) {
        scratch_.prologue = 0;
        Failure f;
        f.kind = Failure::kRuns, f.worker = number_, f.task = task;
        l_.fail(f);
        return false;
      }
    }
    std::atomic<uint64_t>& done = l_.progress[number_].tasks;
    done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    return true;
  }

  Scratch& scratch() { return scratch_; }

 private:
  Launch& l_;
  const uint32_t number_;
  Scratch& scratch_;
  Backoff backoff_;
  int64_t since_ = -1;
  uint64_t done_ = 0;

  void start() { backoff_ = Backoff(), since_ = -1; }

  // Whether the launch has failed, or no task of it has ended for the deadline since `start`.
  bool over() {
    if (l_.failed.load(std::memory_order_relaxed)) return true;
    const int64_t now = now_ms();
    const uint64_t done = l_.done();
    if (since_ < 0 || done != done_) since_ = now, done_ = done;
    return now - since_ >= l_.deadline_ms;
  }

  void pulse() {
    if (over()) throw Stopped();
  }
};

void run_list(Launch& l, uint32_t worker, const std::vector<uint32_t>& tasks) noexcept {
  const FloatMode mode;
  try {
    Worker w(l, worker);
    for (uint32_t task : tasks) {
      if (!w.wait(task) || !w.run(task)) return;
      const abi::Task& t = l.p.tasks[task];
      for (int i = 0; i < t.n_triggers; ++i) event_trigger(w, &l.state.counters[t.trigger[i]]);
    }
  } catch (const OutOfMemory& e) {
    Failure f;
    f.kind = Failure::kMemory, f.worker = worker, f.bytes = e.bytes;
    l.fail(f);
  }
}

// One thread, in an order that respects the events and nothing else: what the scheduler must be correct under.
void run_random(Launch& l, uint64_t seed) {
  const FloatMode mode;
  Worker w(l, 0);
  l.alone = true;
  uint32_t* counters = l.state.counters.data();
  std::mt19937_64 random(seed);
  std::vector<uint32_t> ready, blocked(l.p.tasks.size);
  std::vector<std::vector<std::pair<uint32_t, uint32_t>>> waiting(l.p.events.size);  // event -> (task, want)
  const auto reached = [&](uint32_t e, uint32_t want) { return event_reached(counters[e], event_target(l.state.epoch, want)); };
  for (uint32_t n = 0; n < l.p.tasks.size; ++n) {
    const abi::Task& t = l.p.tasks[n];
    for (int i = 0; i < t.n_waits; ++i)
      if (!reached(t.wait[i], t.want[i])) ++blocked[n], waiting[t.wait[i]].emplace_back(n, t.want[i]);
    if (!blocked[n]) ready.push_back(n);
  }
  while (!ready.empty()) {
    std::swap(ready[random() % ready.size()], ready.back());
    const uint32_t n = ready.back();
    ready.pop_back();
    const abi::Task& t = l.p.tasks[n];
    w.scratch().prologue = 0;
    if (!w.run(n)) return;
    for (int i = 0; i < t.n_triggers; ++i) {
      ++counters[t.trigger[i]];
      auto& list = waiting[t.trigger[i]];
      for (size_t j = 0; j < list.size();) {
        if (!reached(t.trigger[i], list[j].second)) { ++j; continue; }
        if (!--blocked[list[j].first]) ready.push_back(list[j].first);
        list[j] = list.back();
        list.pop_back();
      }
    }
  }
  for (uint32_t n = 0; n < l.p.tasks.size && !l.failed; ++n)
    for (int i = 0; blocked[n] && i < l.p.tasks[n].n_waits && !l.failed; ++i)
      if (!reached(l.p.tasks[n].wait[i], l.p.tasks[n].want[i])) l.waits(0, n, i);
}

// Empty when the operands are what the program was compiled for.
std::string check(const Program& p, const Operands& o) {
  if (o.args.size() != p.header->args || o.results.size() != p.header->results)
    return "the program has " + std::to_string(p.header->args) + " operands and " + std::to_string(p.header->results) +
           " results, the call " + std::to_string(o.args.size()) + " and " + std::to_string(o.results.size());
  if (o.workspace_bytes < p.header->workspace)
    return "the workspace has " + std::to_string(o.workspace_bytes) + " bytes, not " + std::to_string(p.header->workspace);
  for (const abi::Buffer& b : p.buffers) {
    const auto space = static_cast<abi::Space>(b.space);
    const bool arg = space == abi::Space::ARG;
    if (!arg && space != abi::Space::RESULT) continue;
    const size_t bytes = arg ? o.arg_bytes[b.index] : o.result_bytes[b.index];
    const char* what = arg ? "operand " : "result ";
    if (bytes < b.bytes) return what + std::to_string(b.index) + " has " + std::to_string(bytes) + " bytes, not " + std::to_string(b.bytes);
    if (!arg && b.alias >= 0 && o.arg_bytes[b.alias] < b.bytes) return "operand " + std::to_string(b.alias) + " is too small for its result";
    if (reinterpret_cast<uintptr_t>(arg ? o.args[b.index] : o.results[b.index]) % (bytes >= 4 ? 4 : bytes >= 2 ? 2 : 1))
      return what + std::to_string(b.index) + " is not aligned";
  }
  return "";
}

}  // namespace

LaunchError launch(Program& p, const Operands& o, const LaunchOptions& options) try {
  if (std::string bad = check(p, o); !bad.empty()) return {LaunchError::kArguments, bad};
  std::vector<char*> base(p.buffers.size), slots(p.slots.size);
  for (size_t i = 0; i < p.buffers.size; ++i) {
    const abi::Buffer& b = p.buffers[i];
    switch (static_cast<abi::Space>(b.space)) {
      case abi::Space::ARG: base[i] = o.args[b.index]; break;
      case abi::Space::RESULT:
        base[i] = o.results[b.index];
        if (b.alias >= 0 && b.bytes && o.args[b.alias] != base[i]) std::memmove(base[i], o.args[b.alias], b.bytes);
        break;
      case abi::Space::WORKSPACE: base[i] = o.workspace + b.offset; break;
      default: base[i] = const_cast<char*>(reinterpret_cast<const char*>(p.consts.data)) + b.offset;
    }
  }
  for (size_t i = 0; i < p.slots.size; ++i) slots[i] = base[p.slots[i].buffer] + p.slots[i].offset;

  uint32_t threads = options.threads ? std::min(options.threads, 255u) : default_threads();
  if (p.header->workers) threads = std::max(1u, std::min(threads, options.threads ? threads : p.header->workers));
  auto state = p.take_state();
  ++state->epoch;
  Launch l(p, options.isa ? *options.isa : *isa_named(""), slots, *state, options.deadline_ms, threads);
  if (options.seed >= 0) {
    run_random(l, static_cast<uint64_t>(options.seed));
  } else {
    struct Shared {
      Launch& l;
      const std::vector<std::vector<uint32_t>>& lists;
    } shared{l, p.lists(threads)};
    const auto job = [](void* context, uint32_t worker) noexcept {
      auto& s = *static_cast<Shared*>(context);
      run_list(s.l, worker, s.lists[worker]);
    };
    if (!try_run(threads, job, &shared)) {
      l.alone = true;
      run_list(l, 0, p.lists(1)[0]);
    }
  }
  if (l.failed) return l.error();  // its counters are dropped with `state`
  p.give_state(std::move(state));
  return {};
} catch (const OutOfMemory& e) {
  return {LaunchError::kMemory, "out of memory: a launch asked for " + std::to_string(e.bytes) + " bytes"};
} catch (const std::bad_alloc&) {
  return {LaunchError::kMemory, "out of memory"};
}

}  // namespace mpk
