// Worker threads: a ticket announces a job, a counter its end.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace mpk {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  bool try_run(uint32_t threads, Job job, void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    try {
      for (; workers_ < threads - 1; ++workers_) std::thread([this, i = workers_, t = ticket_.load()] { work(i, t); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had
      busy_.store(false, std::memory_order_release);
      return false;
    }
    job_ = job, context_ = context;
    left_.store(threads - 1, std::memory_order_relaxed);
    generation_ = (generation_ + 1) & 0xffffff;
    ticket_.store(generation_ << 8 | (threads - 1));  // sequentially consistent, as `sleepers_`: one sees the other
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    job(context, 0);
    for (Backoff b; left_.load(std::memory_order_acquire);) b.step();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void work(uint32_t index, uint32_t seen) {
    for (;;) {
      const uint32_t ticket = next(seen);
      seen = ticket;
      // Only participants may look at the job: the others may be late, and the next job already in place.
      if (index >= (ticket & 0xff)) continue;
      job_(context_, index + 1);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint32_t next(uint32_t seen) {
    using clock = std::chrono::steady_clock;
    const auto sleep_at = clock::now() + std::chrono::microseconds(60);
    for (uint32_t i = 0;; ++i) {
      const uint32_t ticket = ticket_.load(std::memory_order_acquire);
      if (ticket != seen) return ticket;
      pause();
      if (i % 64 == 63 && clock::now() > sleep_at) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return ticket_.load() != seen; });
    sleepers_.fetch_sub(1);
    return ticket_.load();
  }

  std::atomic<bool> busy_{false};
  std::atomic<uint32_t> ticket_{0}, left_{0}, sleepers_{0};
  uint32_t generation_ = 0, workers_ = 0;  // owned by whoever holds busy_
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

std::atomic<Pool*> pool{nullptr};

}  // namespace

bool try_run(uint32_t threads, Job job, void* context) {
  static std::once_flag once;
  std::call_once(once, [] {
    pool.store(new Pool);  // never destroyed: its threads may outlive static destructors
    // A forked child has no worker threads: it starts a pool of its own.
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  if (threads < 2) return false;
  return pool.load()->try_run(std::min(threads, 256u), job, context);
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

void Backoff::step() {
  if (++steps_ < 256) pause();
  else std::this_thread::yield();
}

}  // namespace mpk
