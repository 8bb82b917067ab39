// The weight stream: a ring of frames that the loader warp fills in the order of the block's stream table. The ring is
// as deep as shared memory allows; the copies in flight are limited to MPK_WINDOW, because flags and activations queue
// behind them. While consumers wait for an event and the ring is full, the next MPK_AHEAD frames come to the L2 cache.
#pragma once

namespace mpk {

#if MPK_STREAM
// Waits for a phase of an mbarrier; false: gave up (only ever seen with wrong tables).
__device__ __forceinline__ bool wait_phase(State* s, u64* bar, u32 parity, u32 code, u32 detail) {
  Deadline deadline;
  while (!mbarrier_try_wait(bar, parity))
    if (deadline.expired(s)) {
      give_up(s, code, detail, 0, 0, 0, parity);
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

// A place in the block's list of frames. The entry after the current one is loaded while the frames of this one move.
struct Cursor {
  const abi::Stream *next, *end;
  abi::Stream now, after;  // now.start: the current frame; now.frames: it and those of this entry that follow

  __device__ explicit Cursor(const State* s) : next(s->stream + s->stream_first[blockIdx.x]), end(s->stream + s->stream_first[blockIdx.x + 1]) {
    now.frames = 0;
    if (next != end) after = *next;
  }
  // To the next frame; false: the list ends.
  __device__ __forceinline__ bool advance() {
    if (now.frames > 1) {
      --now.frames;
#pragma unroll
      for (int i = 0; i < 4; ++i) now.start[i] += now.step[i];
      return true;
    }
    if (next == end) return false;
    now = after;
    if (++next != end) after = *next;
    return true;
  }
};

// One thread. No deadline of its own: it ends with its list or with the consumers.
__device__ __noinline__ void loader(State* s, Shared* sh, u8* ring) {
  if (threadIdx.x & 31) return;
  Cursor copies(s), ahead = copies;
  u32 at = 0, parity = 1, issued = 0, oldest = 0, oldest_parity = 0, lead = 0;
  while (copies.advance() && wait_free(sh, &sh->empty[at], parity)) {
    if (issued >= MPK_WINDOW) {
      while (!mbarrier_try_wait(&sh->full[oldest], oldest_parity)) {}  // a copy in flight always lands
      if (++oldest == MPK_RING) { oldest = 0; oldest_parity ^= 1; }
    }
    ++issued;
    mbarrier_expect(&sh->full[at], FRAME);
    copy_box(ring + at * FRAME, s->maps + 128ull * copies.now.map, copies.now.start, &sh->full[at]);
    if (++at == MPK_RING) { at = 0; parity ^= 1; }
    // The ring is full for the first time: from here on the cache takes what the ring has no room for.
    if (issued == MPK_RING) ahead = copies;
    if (issued >= MPK_RING)
      for (lead -= lead > 0; lead < MPK_AHEAD && ahead.advance(); ++lead) prefetch_box(s->maps + 128ull * ahead.now.map, ahead.now.start);
  }
  // A block must not end while copies into its shared memory are in flight.
  for (u32 n = issued < MPK_WINDOW ? 0 : issued - MPK_WINDOW; n < issued; ++n) {
    while (!mbarrier_try_wait(&sh->full[oldest], oldest_parity)) {}
    if (++oldest == MPK_RING) { oldest = 0; oldest_parity ^= 1; }
  }
}
#endif

}  // namespace mpk
