// Every line of inline PTX of this package, each wrapper with what it guarantees. Instructions of sm_90 exist only if
// MPK_STREAM is 1 (the generated source decides); everything else assembles from sm_80 on.
#pragma once

namespace mpk {

// ---- copies of a thread into shared memory -----------------------------------------------------------------------------

// Starts to copy 16 bytes, both sides aligned to 16. Goes past L1; takes no register.
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from)
               : "memory");
}

// Every copy16 of this thread has landed; other threads see it after a barrier.
__device__ __forceinline__ void copy16_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- conversions ------------------------------------------------------------------------------------------------------

// Exact, subnormal numbers included.
__device__ __forceinline__ float cvt_f32_f16(u16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

// To nearest even, to subnormal numbers and to infinity as well.
__device__ __forceinline__ u16 cvt_f16_f32(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

// ---- time -----------------------------------------------------------------------------------------------------------

// Nanoseconds since some moment, the same on all SMs up to its coarse ticks. For deadlines only.
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// ---- events ---------------------------------------------------------------------------------------------------------

// Everything that happened before a `red_release` whose effect this load observes happens before what follows it, for
// this thread and for every thread that it synchronises with afterwards (a barrier of the block).
__device__ __forceinline__ u32 ld_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Publishes every write of this thread, and every write that a barrier ordered before this call. No fence is needed.
__device__ __forceinline__ void red_release(u32* p, u32 n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}

// Adds and returns the old value; acquires what earlier arrivals published and publishes this thread's writes.
__device__ __forceinline__ u32 atom_add_acq_rel(u32* p, u32 n) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(n) : "memory");
  return v;
}

// Sets *p to 1 and says whether it was 0: exactly one caller on the device sees true.
__device__ __forceinline__ bool claim(u32* p) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(v) : "l"(p) : "memory");
  return v == 0;
}

// Reads a word that other SMs write (never from L1), without ordering anything.
__device__ __forceinline__ u32 ld_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Writes a word of host memory; visible to the host after everything that this thread wrote to it before.
__device__ __forceinline__ void st_release_sys(u32* p, u32 v) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Starts to bring the cache line of p to L2. Says nothing about what is there, and orders nothing.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What memory holds is loaded again after this, not kept in registers from before. No instruction.
__device__ __forceinline__ void forget() { asm volatile("" ::: "memory"); }

// ---- named barriers -------------------------------------------------------------------------------------------------

// `threads` threads meet at barrier `id`; their memory accesses before it are ordered before those after it.
__device__ __forceinline__ void barrier_sync(u32 id, u32 threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of the `threads` of barrier `id` without waiting: orders this thread's past before the waiters' future.
__device__ __forceinline__ void barrier_arrive(u32 id, u32 threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- loads of 16 bytes ----------------------------------------------------------------------------------------------

// From global memory, aligned to 16. A load that the compiler neither repeats nor moves across a barrier or another wrapper.
__device__ __forceinline__ uint4 load16(const void* p) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(p)));
  return x;
}

// The same from shared memory, and where it stands: a loop loads again, it keeps nothing in registers.
__device__ __forceinline__ uint4 load16_shared(const void* p) {
  uint4 x;
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"((u32)__cvta_generic_to_shared(p)));
  return x;
}

// ---- matrix fragments -----------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8x8 b16 matrices; lane l gives the address of row l%8 of matrix l/8; lane l receives elements (l/4, 2*(l%4)+{0,1}).
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed: lane l receives elements (2*(l%4)+{0,1}, l/4) of the stored matrix.
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c[16 rows][8 columns] += a[16][16] * b[16][8] in f32. Column j of c depends on column j of b only.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats to bf16, each to the nearest, ties to even: `low` in bits 0 to 15.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

#if MPK_STREAM
// ---- the stream: tensor copies into shared memory, completion on mbarriers --------------------------------------------

// An mbarrier whose phase ends after `count` arrivals (and after all bytes that were announced to it have landed).
__device__ __forceinline__ void mbarrier_init(u64* b, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(count) : "memory");
}

// Makes initialised mbarriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
}

// Arrives when `x` and `y` hold what was loaded: the address depends on them, through a zero that the compiler cannot know.
// An arrival waits for no load otherwise, and a copy that it permits may overtake one.
__device__ __forceinline__ void mbarrier_arrive_after(u64* b, u32 x, u32 y) {
  mbarrier_arrive(b + ((x | y) & blockIdx.y));
}

// Arrives and announces `bytes` that a copy will deliver to this phase.
__device__ __forceinline__ void mbarrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(bytes) : "memory");
}

// True once the phase of this parity has ended; then what its arrivals published, copies included, is visible here.
// May suspend the thread for a time that the hardware bounds.
__device__ __forceinline__ bool mbarrier_try_wait(u64* b, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(smem_address(b)), "r"(parity)
               : "memory");
  return done;
}

// Copies the box at (x, y, z, u) of the tensor to shared memory, zeros where it sticks out; completes on `b`. The tensor
// must not be written while the kernel runs: nothing orders this copy after writes of this kernel.
__device__ __forceinline__ void copy_box(void* to, const void* map, int x, int y, int z, int u, u64* b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];"
      :
      : "r"(smem_address(to)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(u), "r"(smem_address(b))
      : "memory");
}
#endif

}  // namespace mpk
