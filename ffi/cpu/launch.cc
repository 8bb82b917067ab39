// The launch: operands to slot addresses, tasks to threads, waits and triggers around every task.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <utility>

#include "../event.h"
#include "float_mode.h"
#include "pool.h"

namespace mpk {
namespace {

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Scratch memory of a thread: grows to the largest program that it has run.
class ThreadScratch {
 public:
  Scratch& prepare(const ScratchSize& size) {
    const auto round = [](int64_t n) { return (static_cast<size_t>(n) + 127) / 64 * 64; };
    const size_t panel = round(4 * std::max<int64_t>(PANEL_K * PANEL_N, PANEL_ROWS * (size.panel + abi::LANES)));
    constexpr size_t scalars = abi::MAX_REGS * abi::LANES * 4, vectors = abi::MAX_REGS * STRIP * 4;
    size_t total = panel + scalars + 2 * vectors + round(size.act) + round(size.keys * 8) + 2 * round(size.accesses * 8);
    for (int64_t n : size.acc) total += round(n);
    if (total > capacity_) {
      memory_ = nullptr;
      memory_ = aligned_bytes(total);
      std::memset(memory_.get(), 0, total);
      capacity_ = total;
    }
    char* at = memory_.get();
    const auto take = [&](size_t n) { return std::exchange(at, at + n); };
    s_.scalars = reinterpret_cast<uint32_t*>(take(scalars));
    s_.vectors = reinterpret_cast<uint32_t*>(take(vectors));
    s_.spread = reinterpret_cast<uint32_t*>(take(vectors));
    s_.panel = reinterpret_cast<float*>(take(panel));
    s_.base = reinterpret_cast<int64_t*>(take(round(size.accesses * 8)));
    s_.origin = reinterpret_cast<char**>(take(round(size.accesses * 8)));
    s_.keys = reinterpret_cast<uint64_t*>(take(round(size.keys * 8)));
    s_.act = take(round(size.act));
    for (int j = 0; j <= MAX_ACC; ++j) s_.acc[j] = take(round(size.acc[j]));
    s_.prologue = 0;
    return s_;
  }

 private:
  Scratch s_{};
  AlignedBytes memory_;
  size_t capacity_ = 0;
};

thread_local ThreadScratch thread_scratch;

struct alignas(64) Progress {
  std::atomic<uint64_t> tasks{0};
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
  std::string text;
  uint32_t blamed = UINT32_MAX;

  uint64_t done() const {
    uint64_t n = 0;
    for (const Progress& x : progress) n += x.tasks.load(std::memory_order_relaxed);
    return n;
  }

  // Every worker that gives up comes here; the message is about the earliest task, the others wait because of it.
  void fail(uint32_t worker, uint32_t task, int wait) {
    const abi::Task& t = p.tasks[task];
    std::lock_guard<std::mutex> lock(mutex);
    if (task >= blamed) return;
    blamed = task;
    const uint32_t event = t.wait[wait], have = __atomic_load_n(&state.counters[event], __ATOMIC_ACQUIRE);
    const std::string why = alone ? "no earlier task can trigger it" : "nothing finished for " + std::to_string(deadline_ms) + " ms";
    text = "deadline exceeded: worker " + std::to_string(worker) + ", " + p.task_name(task) + " waits for event " +
           std::to_string(event) + ": have " + std::to_string(event_have(have, state.epoch, t.want[wait])) + ", want " +
           std::to_string(t.want[wait]) + "; " + std::to_string(done()) + " of " + std::to_string(p.tasks.size) +
           " tasks are done, " + why;
    failed.store(true);
  }
};

// The memory operations of event.h for threads.
class Waiter {
 public:
  explicit Waiter(Launch& l) : l_(l) {}
  uint32_t load_acquire(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
  void add_release(uint32_t* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE); }

  bool keep_waiting() {
    if (l_.alone) return false;
    backoff_.step();
    if (backoff_.steps() % 64) return true;
    if (l_.failed.load(std::memory_order_relaxed)) return false;
    const int64_t now = now_ms();
    const uint64_t done = l_.done();
    if (since_ < 0 || done != done_) since_ = now, done_ = done;
    return now - since_ < l_.deadline_ms;
  }

 private:
  Launch& l_;
  Backoff backoff_;
  int64_t since_ = -1;
  uint64_t done_ = 0;
};

void run_one(const Launch& l, Scratch& scratch, const abi::Task& t) {
  const TaskContext context{&l.p.view, l.slots.data(), &scratch};
  if (static_cast<abi::Kind>(l.p.ops[t.op].kind) != abi::Kind::NOP) l.isa.run(context, t.op, t.index);
}

void run_list(Launch& l, uint32_t worker, const std::vector<uint32_t>& tasks) {
  const FloatMode mode;
  Scratch& scratch = thread_scratch.prepare(l.p.scratch);
  uint32_t* counters = l.state.counters.data();
  std::atomic<uint64_t>& done = l.progress[worker].tasks;
  for (uint32_t number : tasks) {
    const abi::Task& t = l.p.tasks[number];
    Waiter waiter(l);
    for (int i = 0; i < t.n_waits; ++i) {
      if (event_wait(waiter, counters + t.wait[i], event_target(l.state.epoch, t.want[i]))) continue;
      l.fail(worker, number, i);
      return;
    }
    run_one(l, scratch, t);
    for (int i = 0; i < t.n_triggers; ++i) event_trigger(waiter, counters + t.trigger[i]);
    done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
}

// One thread, in an order that respects the events and nothing else: what the scheduler must be correct under.
void run_random(Launch& l, uint64_t seed) {
  const FloatMode mode;
  Scratch& scratch = thread_scratch.prepare(l.p.scratch);
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
    scratch.prologue = 0;
    run_one(l, scratch, t);
    l.progress[0].tasks.fetch_add(1);
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
      if (!reached(l.p.tasks[n].wait[i], l.p.tasks[n].want[i])) l.fail(0, n, i);
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
    if (reinterpret_cast<uintptr_t>(arg ? o.args[b.index] : o.results[b.index]) % 4 && bytes >= 4)
      return what + std::to_string(b.index) + " is not aligned";
  }
  return "";
}

}  // namespace

LaunchError launch(Program& p, const Operands& o, const LaunchOptions& options) {
  if (std::string bad = check(p, o); !bad.empty()) return {LaunchError::kArguments, bad};
  std::vector<char*> base(p.buffers.size), slots(p.slots.size);
  for (size_t i = 0; i < p.buffers.size; ++i) {
    const abi::Buffer& b = p.buffers[i];
    switch (static_cast<abi::Space>(b.space)) {
      case abi::Space::ARG: base[i] = o.args[b.index]; break;
      case abi::Space::RESULT:
        base[i] = o.results[b.index];
        if (b.alias >= 0 && o.args[b.alias] != base[i]) std::memmove(base[i], o.args[b.alias], b.bytes);
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
    const auto job = [](void* context, uint32_t worker) {
      auto& s = *static_cast<Shared*>(context);
      run_list(s.l, worker, s.lists[worker]);
    };
    if (!try_run(threads, job, &shared)) {
      l.alone = true;
      run_list(l, 0, p.lists(1)[0]);
    }
  }
  if (l.failed) return {LaunchError::kDeadline, l.text};  // its counters are dropped with `state`
  p.give_state(std::move(state));
  return {};
}

}  // namespace mpk
