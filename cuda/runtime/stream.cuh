// The weight stream: a ring of frames that the loader warp fills in the order of the block's stream table. The ring is
// as deep as shared memory allows; the copies in flight are limited to MPK_WINDOW, because flags and activations queue
// behind them.
#pragma once

namespace mpk {

#if MPK_STREAM
// Waits for a phase of an mbarrier; false: gave up (only ever seen with wrong tables).
__device__ __forceinline__ bool wait_phase(State* s, u64* bar, u32 parity, u32 task) {
  Deadline deadline;
  while (!mbarrier_try_wait(bar, parity))
    if (deadline.expired(s)) {
      give_up(s, GaveUp::FRAME, task, 0, 0, 0, parity);
      return false;
    }
  return true;
}

// A frame's place is free, or the consumers have left.
__device__ __forceinline__ bool wait_free(Shared* sh, u64* bar, u32 parity) {
  while (!mbarrier_try_wait(bar, parity))
    if (*(volatile u32*)&sh->done) return false;
  return true;
}

// Runs on one warp; lane 0 issues. No deadline of its own: it ends with its list or with the consumers.
__device__ __noinline__ void loader(State* s, Shared* sh, u8* ring) {
  const u32 lane = threadIdx.x & 31;
  const u32 begin = s->stream_first[blockIdx.x], end = s->stream_first[blockIdx.x + 1];
  u32 next = begin < end && lane < 12 ? ((const u32*)(s->stream + begin))[lane] : 0;
  u32 at = 0, parity = 1, issued = 0, oldest = 0, oldest_parity = 0;
  bool run = true;
  for (u32 e = begin; e < end && run; ++e) {
    const u32 word = next;
    if (e + 1 < end && lane < 12) next = ((const u32*)(s->stream + e + 1))[lane];  // while this entry's frames move
    const u8* map = s->maps + (u64)MAP_BYTES * __shfl_sync(~0u, word, 1);
    int x = __shfl_sync(~0u, word, 2), y = __shfl_sync(~0u, word, 3), z = __shfl_sync(~0u, word, 4),
        u = __shfl_sync(~0u, word, 5);
    const int dx = __shfl_sync(~0u, word, 6), dy = __shfl_sync(~0u, word, 7), dz = __shfl_sync(~0u, word, 8),
              du = __shfl_sync(~0u, word, 9);
    const u32 frames = __shfl_sync(~0u, word, 10);
    if (lane == 0) {
      for (u32 n = 0; n < frames; ++n, x += dx, y += dy, z += dz, u += du) {
        if (!wait_free(sh, &sh->empty[at], parity)) {
          run = false;
          break;
        }
        if (issued >= MPK_WINDOW) {
          while (!mbarrier_try_wait(&sh->full[oldest], oldest_parity)) {}  // a copy in flight always lands
          if (++oldest == MPK_RING) {
            oldest = 0;
            oldest_parity ^= 1;
          }
        }
        ++issued;
        mbarrier_expect(&sh->full[at], FRAME);
        copy_box(ring + at * FRAME, map, x, y, z, u, &sh->full[at]);
        if (++at == MPK_RING) {
          at = 0;
          parity ^= 1;
        }
      }
    }
    run = __shfl_sync(~0u, (u32)run, 0);
  }
  // A block must not end while copies into its shared memory are in flight.
  if (lane == 0)
    for (u32 n = issued < MPK_WINDOW ? 0 : issued - MPK_WINDOW; n < issued; ++n) {
      while (!mbarrier_try_wait(&sh->full[oldest], oldest_parity)) {}
      if (++oldest == MPK_RING) {
        oldest = 0;
        oldest_parity ^= 1;
      }
    }
}
#endif

}  // namespace mpk
