// Scratch memory: one block a thread, cut into the parts of the program that it runs.
#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mpk {
namespace {

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
  ~ThreadScratch() { unguard(memory_.get(), capacity_); }

  // Throws OutOfMemory, and is then as before.
  Scratch& prepare(const ScratchSize& size) {
    const auto round = [](size_t n) { return (n + 127) / 64 * 64; };
    constexpr size_t scalars = abi::MAX_REGS * abi::LANES * 4, vectors = abi::MAX_REGS * STRIP * 4;
    const size_t panel = std::max<size_t>(4 * PANEL_K * PANEL_N, static_cast<size_t>(size.panel));
    const size_t accesses = 8 * static_cast<size_t>(size.accesses), keys = 8 * static_cast<size_t>(size.keys);
    size_t total =
        64 + round(scalars) + 3 * round(vectors) + round(panel) + 2 * round(accesses) + round(keys) + round(size.act);
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
    s_.ahead = reinterpret_cast<uint32_t*>(take(vectors));
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

thread_local ThreadScratch memory;

}  // namespace

Scratch& thread_scratch(const ScratchSize& size) { return memory.prepare(size); }

}  // namespace mpk
