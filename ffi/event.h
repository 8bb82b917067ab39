// The event protocol, shared by the CPU executor and the GPU kernel.
//
// An event is a 32-bit counter that is never reset. Launch number `epoch` (from 1) of a program may start a task when
// every event that the task waits for has reached epoch * threshold; a finished task adds one to each of its triggers.
// Comparisons are modulo 2**32, so counters may wrap around.
//
// Invariant: what a task wrote before `trigger` is seen by every task whose `wait` returned true on that event. The
// memory operations come from a trait, because C++ threads and GPU blocks spell them differently:
//
//   uint32_t M::load_acquire(const uint32_t* counter)      a load that the writes before a trigger happen before
//   void     M::add_release(uint32_t* counter)             adds one, after everything that this worker has done
//   bool     M::keep_waiting()                             pauses; false when the launch has failed or is overdue
#pragma once
#ifndef __CUDACC_RTC__
#include <cstdint>
#endif

#ifdef __CUDACC__
#define MPK_EVENT_FN __host__ __device__ inline
#else
#define MPK_EVENT_FN inline
#endif

namespace mpk {

// What the counter of an event reads once its `threshold` producers of launch `epoch` are done.
MPK_EVENT_FN uint32_t event_target(uint32_t epoch, uint32_t threshold) { return epoch * threshold; }

MPK_EVENT_FN bool event_reached(uint32_t have, uint32_t target) { return static_cast<int32_t>(have - target) >= 0; }

// The triggers of this launch so far: what error messages call "have".
MPK_EVENT_FN int32_t event_have(uint32_t counter, uint32_t epoch, uint32_t threshold) {
  return static_cast<int32_t>(counter - event_target(epoch - 1, threshold));
}

// Waits; false when `keep_waiting` gave up. The common case, an event that is already there, is one load.
template <class M>
MPK_EVENT_FN bool event_wait(M& m, const uint32_t* counter, uint32_t target) {
  while (!event_reached(m.load_acquire(counter), target))
    if (!m.keep_waiting()) return false;
  return true;
}

template <class M>
MPK_EVENT_FN void event_trigger(M& m, uint32_t* counter) {
  m.add_release(counter);
}

}  // namespace mpk
