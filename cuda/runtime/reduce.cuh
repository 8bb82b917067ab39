// Reductions over the threads of a group: a warp or all consumers of the block. The order is fixed (thread t takes
// elements t, t+G, ...; then a butterfly over the lanes; then the warps in order), so results repeat bit for bit.
#pragma once

namespace mpk {

// clang-format off
struct SUM_F { static constexpr u32 first = 0x00000000u; static __device__ u32 op(u32 x, u32 y) { return F_ADD(x, y); } };
struct PROD_F { static constexpr u32 first = 0x3f800000u; static __device__ u32 op(u32 x, u32 y) { return F_MUL(x, y); } };
struct MAX_F { static constexpr u32 first = 0xff800000u; static __device__ u32 op(u32 x, u32 y) { return F_MAX(x, y); } };
struct MIN_F { static constexpr u32 first = 0x7f800000u; static __device__ u32 op(u32 x, u32 y) { return F_MIN(x, y); } };
struct SUM_I { static constexpr u32 first = 0u; static __device__ u32 op(u32 x, u32 y) { return x + y; } };
struct PROD_I { static constexpr u32 first = 1u; static __device__ u32 op(u32 x, u32 y) { return x * y; } };
struct MAX_I { static constexpr u32 first = 0x80000000u; static __device__ u32 op(u32 x, u32 y) { return I_MAX(x, y); } };
struct MIN_I { static constexpr u32 first = 0x7fffffffu; static __device__ u32 op(u32 x, u32 y) { return I_MIN(x, y); } };
struct MAX_U { static constexpr u32 first = 0u; static __device__ u32 op(u32 x, u32 y) { return U_MAX(x, y); } };
struct MIN_U { static constexpr u32 first = ~0u; static __device__ u32 op(u32 x, u32 y) { return U_MIN(x, y); } };
struct AND_I { static constexpr u32 first = ~0u; static __device__ u32 op(u32 x, u32 y) { return x & y; } };
struct OR_I { static constexpr u32 first = 0u; static __device__ u32 op(u32 x, u32 y) { return x | y; } };
// clang-format on

__device__ __forceinline__ void sync_consumers() { barrier_sync(1, THREADS); }

// Number of a consumer, counted from another one.
__device__ __forceinline__ int thread(u32 from = 0) { return from ? (threadIdx.x + from) % THREADS : threadIdx.x; }

// All consumers work on one row. `scratch` holds 2 * WARPS words and nothing else between two syncs.
struct BlockGroup {
  static constexpr int size = THREADS;
  // The compiler sees the bound: a row of a multiple of THREADS elements needs no conditions, and so its loads overlap.
  static __device__ int rank() { return threadIdx.x % THREADS; }
  static __device__ int index() { return 0; }
  static constexpr int count = 1;
};

// Every warp works on its own row.
struct WarpGroup {
  static constexpr int size = 32;
  static __device__ int rank() { return threadIdx.x & 31; }
  static __device__ int index() { return threadIdx.x >> 5; }
  static constexpr int count = WARPS;
};

template <class Op> __device__ __forceinline__ u32 reduce_warp(u32 x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = Op::op(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

template <class Group, class Op> __device__ __forceinline__ u32 reduce(u32 x, u32* scratch) {
  x = reduce_warp<Op>(x);
  if constexpr (Group::size == 32) return x;
  sync_consumers();  // the last use of scratch is over
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  sync_consumers();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) x = Op::op(x, scratch[w]);
  return x;
}

// Orders f32, i32 or u32 bits so that the extreme is the largest: a NaN first. Equal keys: the smaller index wins.
template <class T, bool LARGEST> __device__ __forceinline__ u32 extreme_key(u32 x) { return LARGEST ? x : ~x; }
template <> __device__ __forceinline__ u32 extreme_key<I32, true>(u32 x) { return x ^ 0x80000000u; }
template <> __device__ __forceinline__ u32 extreme_key<I32, false>(u32 x) { return ~(x ^ 0x80000000u); }
__device__ __forceinline__ u32 ordered_f32(u32 x) {  // monotonic; both zeros compare equal
  if ((x << 1) == 0) x = 0;
  return (int)x < 0 ? ~x : x | 0x80000000u;
}
template <> __device__ __forceinline__ u32 extreme_key<F32, true>(u32 x) { return f(x) != f(x) ? ~0u : ordered_f32(x); }
template <> __device__ __forceinline__ u32 extreme_key<F32, false>(u32 x) {
  return f(x) != f(x) ? ~0u : ~ordered_f32(x);
}

__device__ __forceinline__ void better(u32& key, u32& at, u32 k, u32 a) {
  if (k > key || (k == key && a < at)) {
    key = k;
    at = a;
  }
}

// The index of the best key; `key`, `at` hold this thread's candidate.
template <class Group> __device__ __forceinline__ u32 reduce_extreme(u32 key, u32 at, u32* scratch) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    u32 k = __shfl_xor_sync(~0u, key, o), a = __shfl_xor_sync(~0u, at, o);
    better(key, at, k, a);
  }
  if constexpr (Group::size == 32) return at;
  sync_consumers();
  if ((threadIdx.x & 31) == 0) {
    scratch[threadIdx.x >> 5] = key;
    scratch[WARPS + (threadIdx.x >> 5)] = at;
  }
  sync_consumers();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) better(key, at, scratch[w], scratch[WARPS + w]);
  return at;
}

}  // namespace mpk
