// The kernel shell: how a block walks its task list, events, bounded waits, the way out.
//
// Warp roles. 16 consumer warps run task bodies. The controller warp fetches descriptors ahead, is the only poller of
// the block, and hands tasks to the consumers. The storer warp triggers the events of a task once all its writes have
// been issued, so that the consumers do not wait for them to arrive. The loader warp walks the block's stream
// (stream.cuh) and never waits for an event.
//
// Abort. Any wait that outlasts the limit claims `abort`, describes itself in the host's status record, and from then
// on every wait of every block falls through: tasks already running finish on garbage, no new task
// starts, and the last block to leave clears the counters. So the kernel ends and the next launch starts clean.
#pragma once

namespace mpk {

// ---- bounded waits --------------------------------------------------------------------------------------------------

struct Deadline {
  u64 end = 0;
  u32 spins = 0;
  // True when it is time to give up. Looks at the clock and at the other blocks now and then only.
  __device__ bool expired(State* s) {
    if (++spins & 255) return false;
    if (ld_relaxed(&s->abort)) return true;
    u64 now = now_ns();
    if (!end) end = now + s->limit_ns;
    return now > end;
  }
};

__device__ __forceinline__ void give_up(State* s, GaveUp why, u32 task, u32 op, u32 event, u32 have, u32 want) {
  if (!claim(&s->abort)) return;
  Status* r = s->status;
  volatile Status* v = r;
  v->worker = blockIdx.x;
  v->task = task;
  v->op = op;
  v->event = event;
  v->have = have;
  v->want = want;
  st_release_sys(&r->code, (u32)why);
}

// ---- controller -----------------------------------------------------------------------------------------------------

// The roles are functions of their own: inlined into the kernel, they would take registers from each other.

// Fetches task `t` and resolves its operands into `d`. All lanes.
__device__ __forceinline__ void fetch(const Launch& launch, State* s, u32 t, Desc& d, u32& word) {
  const u32 lane = threadIdx.x & 31;
  word = lane < 16 ? ((const u32*)(s->tasks + t))[lane] : 0;
  const u32 op = __shfl_sync(~0u, word, 0);
  const Unit& u = s->units[op];
  const u32 slot = u.slot, slots = u.slots;
  for (u32 j = lane; j < slots; j += 32) {
    const Slot& x = s->slots[slot + j];
    d.ptr[j] = launch.base[x.buffer] + x.offset;
  }
  const u32 w2 = __shfl_sync(~0u, word, 2), index = __shfl_sync(~0u, word, 1), part = __shfl_sync(~0u, word, 3);
  if (lane == 0) {
    d.variant = u.variant;
    d.op = op;
    d.index = index;
    d.part = part;
    d.prologue = u.prologue;
    d.ticket = u.ticket;
    d.partial = u.partial;
    d.n_triggers = w2 >> 24;
    d.task = t;
  }
  if (lane >= 12 && lane < 16) d.trigger[lane - 12] = word;
}

// One look at the events of the task in `word`, a lane an event (the protocol is ffi/event.h): whether this lane's has come.
// `seen`: the event that this lane saw last, and its threshold. It stays reached, so tasks of one level look once.
__device__ __forceinline__ bool look(State* s, u32 epoch, u32 word, u64& seen, u32& have) {
  const u32 lane = threadIdx.x & 31, n = (__shfl_sync(~0u, word, 2) >> 16) & 255;
  const u32 event = __shfl_sync(~0u, word, 4 + (lane & 3)), threshold = __shfl_sync(~0u, word, 8 + (lane & 3));
  const u64 key = (u64)event << 32 | threshold;
  if (lane >= n || seen == key) return true;
  have = ld_acquire(s->counters + (u64)event * EVENT_WORDS);
  if (!event_reached(have, event_target(epoch, threshold))) return false;
  seen = key;
  return true;
}

// Looks until all have come; false: gave up.
__device__ __forceinline__ bool wait_events(State* s, u32 epoch, u32 t, u32 word, u64& seen) {
  Deadline deadline;
  for (;;) {
    u32 have = 0;
    const bool ready = look(s, epoch, word, seen, have);
    if (__all_sync(~0u, ready)) return true;
    if (__any_sync(~0u, deadline.expired(s))) {
      const u32 stuck = __ffs(__ballot_sync(~0u, !ready)) - 1;
      const u32 event = __shfl_sync(~0u, word, 4 + stuck), threshold = __shfl_sync(~0u, word, 8 + stuck);
      if ((threadIdx.x & 31) == stuck)
        give_up(s, GaveUp::EVENT, t, s->tasks[t].op, event, event_have(have, epoch, threshold), threshold);
      return false;
    }
  }
}

// Gives the descriptor at `at` to the consumers. All lanes.
__device__ __forceinline__ void hand(u32 at) {
  __syncwarp();
  barrier_arrive(READY + at, THREADS + 32);
}

__device__ __forceinline__ void quit(Shared* sh, u32 at) {
  if ((threadIdx.x & 31) == 0) sh->desc[at].variant = QUIT;
  hand(at);
}

__device__ __noinline__ void controller(const Launch& launch, Shared* sh) {
  State* s = launch.state;
  const u32 epoch = sh->epoch, begin = s->first[blockIdx.x], end = s->first[blockIdx.x + 1];
  u32 word = 0, next = 0, have = 0;
  u64 seen = ~0ull;
  if (begin < end) fetch(launch, s, begin, sh->desc[0], word);
  for (u32 t = begin; t < end; ++t) {
    const u32 at = (t - begin) % DEPTH, after = (t + 1 - begin) % DEPTH;
    const auto fetch_next = [&] {
      if (t + 1 == end) return;
      if (t + 1 - begin >= DEPTH) barrier_sync(FREE + after, 64);
      fetch(launch, s, t + 1, sh->desc[after], next);
    };
    // The next descriptor is fetched while this task waits; where it need not, the consumers come first.
    const bool ready = __all_sync(~0u, look(s, epoch, word, seen, have));
    if (!ready) {
      fetch_next();
      if (!wait_events(s, epoch, t, word, seen)) return quit(sh, at);
    }
    hand(at);
    if (ready) fetch_next();
    word = next;
  }
  const u32 at = (end - begin) % DEPTH;
  if (end - begin >= DEPTH) barrier_sync(FREE + at, 64);
  quit(sh, at);
}

// ---- storer ----------------------------------------------------------------------------------------------------------

// Every consumer's writes come before DONE, that barrier before the release, and a release publishes all that happened
// before it. After an abort the triggers do no harm: no new task starts, and to look for one would put a read of memory
// into every hop.
__device__ __noinline__ void storer(State* s, Shared* sh) {
  for (u32 at = 0;; at = at + 1 < DEPTH ? at + 1 : 0) {
    barrier_sync(DONE + at, THREADS + 32);
    const Desc& d = sh->desc[at];
    if (d.variant == QUIT) break;
    const u32 lane = threadIdx.x & 31;
    if (lane == 0)
      for (u32 j = 0; j < d.n_triggers; ++j) red_release(s->counters + (u64)d.trigger[j] * EVENT_WORDS, 1);
    __syncwarp();
    barrier_arrive(FREE + at, 64);
  }
  barrier_arrive(LEFT, THREADS + 32);
}

// ---- consumers ------------------------------------------------------------------------------------------------------

// The end of a task: the storer triggers its events, unless another part of it does (`publish`). No barrier: the next
// task starts with one.
__device__ __forceinline__ void finish(Worker& w, const Desc& d, bool publish) {
  if (threadIdx.x == 0 && !publish) const_cast<Desc&>(d).n_triggers = 0;
  stamp(w, d, 3);
}

// A task that is one part of `parts`: true in the block that arrives last; it sees what the others wrote before.
__device__ __forceinline__ bool last_part(Worker& w, const Desc& d, u32 parts) {
  sync_consumers();
  if (threadIdx.x == 0)
    w.sh->flag = atom_add_acq_rel(w.state->tickets + d.ticket + d.index, 1) + 1 == w.sh->epoch * parts;
  sync_consumers();
  return w.sh->flag;
}

// A result: `last` counts from the end of Launch::base; elements, their bytes, and what each becomes.
struct Result {
  u64 count;
  u32 last, width, poison;
};

// By all consumers of a block. A table, not text: a model has a result for every cache.
__device__ __noinline__ void poison(const Launch& launch, const Result* results, u32 n) {
  for (const Result* r = results; r < results + n; ++r) {
    u8* p = launch.base[MPK_BASES - r->last];
    for (u64 i = threadIdx.x; i < r->count; i += THREADS) {
      if (r->width == 4) ((u32*)p)[i] = r->poison;
      else if (r->width == 2) ((u16*)p)[i] = (u16)r->poison;
      else p[i] = (u8)r->poison;
    }
  }
}

// The last block to leave prepares the next launch: a new epoch, or, after an abort, counters at zero and epoch 1. Nobody
// stores any more then, so that results poisoned here stay so: one that is not comes from a launch that ended well.
__device__ __noinline__ void leave(const Launch& launch, Shared* sh, const Result* results, u32 n) {
  State* s = launch.state;
  barrier_sync(LEFT, THREADS + 32);
  if (threadIdx.x == 0) sh->flag = atom_add_acq_rel(&s->exits, 1) == gridDim.x - 1;
  sync_consumers();
  if (!sh->flag) return;
  const bool aborted = ld_relaxed(&s->abort);
  if (aborted) {
    for (u32 i = threadIdx.x; i < s->counter_words; i += THREADS) s->counters[i] = 0;
    for (u32 i = threadIdx.x; i < s->ticket_words; i += THREADS) s->tickets[i] = 0;
    poison(launch, results, n);
  }
  sync_consumers();
  if (threadIdx.x == 0) {
    s->exits = 0;
    s->epoch = aborted ? 1 : s->epoch + 1;
    s->abort = 0;
  }
}

}  // namespace mpk
