// The floating-point mode of a thread while it runs tasks: round to nearest, denormals kept, nothing trapped.
//
// XLA's threads flush denormals, and a thread inherits the mode of the one that created it. Results must not depend on
// who calls the executor or who called it first, so every participant sets the mode and restores what it found.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace mpk {

class FloatMode {
 public:
  FloatMode() : found_(get()) { set(kDefault); }
  ~FloatMode() { set(found_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__) || defined(__i386__)
  using Word = uint32_t;
  static constexpr Word kDefault = 0x1f80;  // MXCSR: all exceptions masked
  static Word get() { return _mm_getcsr(); }
  static void set(Word w) { _mm_setcsr(w); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kDefault = 0;  // FPCR
  static Word get() {
    Word w;
    asm volatile("mrs %0, fpcr" : "=r"(w));
    return w;
  }
  static void set(Word w) { asm volatile("msr fpcr, %0" ::"r"(w)); }
#else
  using Word = int;
  static constexpr Word kDefault = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  const Word found_;
};

}  // namespace mpk
