// Worker threads, a slot each: the ticket of a slot says that something was offered.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace mpk {
namespace {

constexpr int64_t kIdle = 60;       // us that an idle worker spins
constexpr int64_t kTakenAway = 50;  // us: a pause that takes longer gave the processor to somebody else

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Slot {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint32_t> ticket{0};
  std::shared_ptr<Job> job;  // offered, and not taken up yet
  bool asleep = false;

  // The lock is the caller's only for a moment, and what was there is destroyed outside of it.
  void put(std::shared_ptr<Job> offered) {
    std::lock_guard<std::mutex> lock(mutex);
    job.swap(offered);
    if (job) ticket.fetch_add(1, std::memory_order_release);
  }

  void rouse() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!asleep || !job) return;
    }
    wake.notify_one();
  }

  void serve(uint32_t worker) {
    for (uint32_t seen = 0;;) {
      for (Backoff b(kIdle); ticket.load(std::memory_order_acquire) == seen && b.step();) {}
      std::shared_ptr<Job> taken;
      {
        std::unique_lock<std::mutex> lock(mutex);
        asleep = true;
        wake.wait(lock, [&] { return ticket.load(std::memory_order_relaxed) != seen; });
        asleep = false;
        seen = ticket.load(std::memory_order_relaxed);
        taken.swap(job);
      }
      if (taken) taken->work(worker);
    }
  }
};

class Pool {
 public:
  bool offer(uint32_t threads, const std::shared_ptr<Job>& job) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    try {
      slots_.reserve(threads - 1);
      while (slots_.size() + 1 < threads) {
        auto slot = std::make_unique<Slot>();
        std::thread([s = slot.get(), worker = static_cast<uint32_t>(slots_.size() + 1)] { s->serve(worker); }).detach();
        slots_.push_back(std::move(slot));
      }
    } catch (const std::exception&) {  // no more threads, or no memory for them: those that there are will do
    }
    for (size_t i = 0; i < offered(threads); ++i) slots_[i]->put(job);
    return true;
  }

  void rouse(uint32_t threads) {
    for (size_t i = 0; i < offered(threads); ++i) slots_[i]->rouse();
  }

  void withdraw(uint32_t threads) {
    for (size_t i = 0; i < offered(threads); ++i) slots_[i]->put(nullptr);
    busy_.store(false, std::memory_order_release);
  }

 private:
  size_t offered(uint32_t threads) const { return std::min<size_t>(slots_.size(), threads - 1); }

  std::atomic<bool> busy_{false};
  std::vector<std::unique_ptr<Slot>> slots_;  // of whoever holds busy_; a slot lives as long as its thread: for ever
};

std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool.store(new Pool);  // never destroyed: its threads may outlive static destructors
    // A forked child has no worker threads: it starts a pool of its own.
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  return *pool.load();
}

}  // namespace

bool offer(uint32_t threads, const std::shared_ptr<Job>& job) { return threads > 1 && the_pool().offer(threads, job); }
void rouse(uint32_t threads) { the_pool().rouse(threads); }
void withdraw(uint32_t threads) { the_pool().withdraw(threads); }

int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

uint32_t default_threads() {
  static const uint32_t threads = [] {
    uint32_t cores = std::max(1u, std::thread::hardware_concurrency());
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) cores = std::max(1, CPU_COUNT(&set));
#endif
    const char* option = std::getenv("JAX_MPK_THREADS");
    const long wanted = option ? std::atol(option) : 0;
    if (wanted > 0) cores = std::min<long>(cores, wanted);
    return std::min(cores, 255u);
  }();
  return threads;
}

bool Backoff::step() {
  if (++steps_ <= kPauses) {
    pause();
    if (steps_ % 64) return true;
  } else {
    std::this_thread::yield();
  }
  const int64_t now = now_us();
  if (!start_) start_ = last_ = now;
  const bool taken = now - last_ > kTakenAway;
  last_ = now;
  return !taken && now - start_ < patience_;
}

}  // namespace mpk
