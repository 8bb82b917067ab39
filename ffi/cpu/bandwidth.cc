// The read-only stream: every thread sums its share; all start together, the pass ends with the last one;
// by turns as one stream a thread and as eight.
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

// Reads `bytes` as `streams` parallel streams: which number is fastest differs from machine to machine.
uint64_t sum(const char* p, size_t bytes, int streams) {
  v4 s[4] = {};
  const size_t share = bytes / static_cast<size_t>(streams) / 128 * 128;
  for (size_t i = 0; i < share; i += 128)
    for (int k = 0; k < streams; ++k) {
      const v4* x = reinterpret_cast<const v4*>(p + static_cast<size_t>(k) * share + i);
      __builtin_prefetch(reinterpret_cast<const char*>(x) + 2048);
      __builtin_prefetch(reinterpret_cast<const char*>(x) + 2112);
      for (int j = 0; j < 4; ++j) s[j] += x[j];
    }
  const v4 t = s[0] + s[1] + s[2] + s[3];
  return t[0] + t[1] + t[2] + t[3];
}

}  // namespace

double read_bandwidth(size_t bytes, uint32_t threads, int rounds) {
  AlignedBytes memory = aligned_bytes(bytes);
  std::memset(memory.get(), 1, bytes);
  const size_t share = bytes / threads / 1024 * 1024;
  std::atomic<uint64_t> sink{0};
  std::atomic<uint32_t> started{0}, finished{0};
  double best = 0;
  const auto work = [&](uint32_t w) {
    for (int r = 0; r < 2 * rounds; ++r) {
      started.fetch_add(1);
      while (started.load() < threads * static_cast<uint32_t>(r + 1)) std::this_thread::yield();
      const auto begin = std::chrono::steady_clock::now();
      sink += sum(memory.get() + w * share, share, r % 2 ? 8 : 1);
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
