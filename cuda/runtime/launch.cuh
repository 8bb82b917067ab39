// What one launch is given and what a block is made of: descriptors of tasks, named barriers, the layout of shared memory, and
// what a consumer knows while it runs a task. State, which outlives a launch, is in jax_mpk/abi/launch.py.
#pragma once

namespace mpk {

struct Launch {
  State* state;
  u8* base[MPK_BASES];  // operands, results (the workspace is the last), constants
};

// A task as the consumers see it.
struct Desc {
  u32 variant, op, index, part, prologue, ticket, n_triggers, task;
  u64 partial;
  u32 trigger[4];
  u8* ptr[MPK_SLOTS];
};
constexpr u32 QUIT = ~0u;
constexpr int DEPTH = 3;  // descriptors in flight

// Named barriers. 0: the block, 1: the consumers; for each descriptor in flight, READY: the controller gives it to the
// consumers, DONE: the consumers give it to the storer, FREE: the storer gives it back. LEFT: no trigger is to come.
enum : u32 { READY = 2, DONE = READY + DEPTH, FREE = DONE + DEPTH, LEFT = FREE + DEPTH };
static_assert(LEFT < 16);

struct Shared {
  Desc desc[DEPTH];
  u32 scratch[2 * WARPS];  // reductions
  u32 flag;                // a broadcast from thread 0
  int limit;               // SLOT_LIMIT
  u32 done;                // the consumers have left
  u32 epoch;               // of this launch
  u32 frame, phase;        // ring position between two tasks
  u64 act_key;             // what the activation holds, 0: nothing
#if MPK_STREAM
  u64 full[MPK_RING], empty[MPK_RING];
#endif
};

// Dynamic shared memory: ring | activation | accumulators | Shared.
constexpr u32 RING_BYTES = MPK_STREAM ? MPK_RING * FRAME : 0;
constexpr u32 ACT_AT = RING_BYTES;
constexpr u32 ACC_AT = ACT_AT + MPK_ACT_BYTES;
constexpr u32 SHARED_AT = ACC_AT + MPK_ACC_BYTES;
constexpr u32 SMEM_BYTES = SHARED_AT + sizeof(Shared);
static_assert(MPK_ACT_BYTES % 128 == 0 && MPK_ACC_BYTES % 128 == 0);
static_assert(SMEM_BYTES <= MPK_SMEM_LIMIT, "ring, activation and accumulators exceed shared memory");

// What a consumer thread knows while it runs a task. What outlives a task is kept in Shared, so that the registers of one
// variant do not weigh on another: the variants are parts of the kernel, because a call would save registers in memory.
struct Worker {
  State* state;
  Shared* sh;
  u8 *ring, *act, *acc;
  u8* spill;  // this block's part of the workspace, for scratch that does not fit
  u8* workspace;
#if MPK_PROFILE
  u64* stamps;  // four times for every task, after the scratch of the blocks
#endif
  u64 act_key;
  u32 frame, phase;

  __device__ Worker(const Launch& launch, u8* smem, u64 spill_bytes) {
    state = launch.state;
    sh = (Shared*)(smem + SHARED_AT);
    ring = smem;
    act = smem + ACT_AT;
    acc = smem + ACC_AT;
    workspace = launch.base[MPK_BASES - 2];
    spill = workspace + state->spill + blockIdx.x * spill_bytes;
#if MPK_PROFILE
    stamps = (u64*)(workspace + state->spill + gridDim.x * spill_bytes);
#endif
    act_key = sh->act_key;
    frame = sh->frame;
    phase = sh->phase;
  }
  // For tasks that touch the activation or the ring, after a barrier of the task: before it, others may not have read yet
  // what they start from. The next task starts with a barrier. What did not change needs no register.
  template <bool STREAMS> __device__ __forceinline__ void keep() const {
    if (threadIdx.x) return;
    sh->act_key = act_key;
    if (!STREAMS) return;
    sh->frame = frame;
    sh->phase = phase;
  }
};

// Profiling: when a task got to a stage. 0: it began, 1: its activation is in place, 2: its sums are, 3: it has ended.
__device__ __forceinline__ void stamp(Worker& w, const Desc& d, u32 stage) {
#if MPK_PROFILE
  if (threadIdx.x == 0) w.stamps[4ull * d.task + stage] = now_ns();
#endif
}

}  // namespace mpk
