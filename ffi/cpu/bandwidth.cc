// The read-only stream: every thread sums its share; all start together, the pass ends with the last one.
#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "program.h"

namespace mpk {
namespace {

typedef uint64_t v4 __attribute__((vector_size(32), aligned(16)));

uint64_t sum(const char* p, size_t bytes) {
  v4 s[4] = {};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    __builtin_prefetch(p + i + 2048);
    __builtin_prefetch(p + i + 2112);
    __builtin_prefetch(p + i + 2176);
    __builtin_prefetch(p + i + 2240);
    const v4* x = reinterpret_cast<const v4*>(p + i);
    for (int j = 0; j < 8; ++j) s[j % 4] += x[j];
  }
  const v4 t = s[0] + s[1] + s[2] + s[3];
  return t[0] + t[1] + t[2] + t[3];
}

}  // namespace

double read_bandwidth(size_t bytes, uint32_t threads, int rounds) {
  AlignedBytes memory = aligned_bytes(bytes);
  std::memset(memory.get(), 1, bytes);
  const size_t share = bytes / threads / 256 * 256;
  std::atomic<uint64_t> sink{0};
  std::atomic<uint32_t> started{0}, finished{0};
  double best = 0;
  const auto work = [&](uint32_t w) {
    for (int r = 0; r < rounds; ++r) {
      started.fetch_add(1);
      while (started.load() < threads * static_cast<uint32_t>(r + 1)) std::this_thread::yield();
      const auto begin = std::chrono::steady_clock::now();
      sink += sum(memory.get() + w * share, share);
      finished.fetch_add(1);
      while (finished.load() < threads * static_cast<uint32_t>(r + 1)) {}
      const std::chrono::duration<double> t = std::chrono::steady_clock::now() - begin;
      if (w == 0) best = std::max(best, static_cast<double>(share) * threads / t.count());
    }
  };
  std::vector<std::thread> others;
  for (uint32_t w = 1; w < threads; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& t : others) t.join();
  return sink.load() ? best : 0;
}

}  // namespace mpk
