// SORT: one row by (key, position), which makes any sorting network stable. A bitonic network over a power of two: what is
// at most 16 places apart is exchanged by the lanes of a warp, so that few steps wait for all threads.
//
// V, generated: N (row length), P (a power of two that is no less, and at least 32), COUNT, DESCENDING, POSITIONS, FLOAT; range(), batches(), at_batch(), key(), put().
#pragma once

namespace mpk {

// Sorts ascending as an unsigned number; a NaN comes last in either direction.
template <class V> __device__ __forceinline__ u32 sort_key(u32 x) {
  if (V::FLOAT && f(x) != f(x)) return ~0u;
  const u32 k = V::FLOAT ? ordered_f32(x) : x ^ 0x80000000u;
  return V::DESCENDING ? ~k : k;
}

// The steps of a network from `gap` on down, for an element of a run of 32 in a warp.
__device__ __forceinline__ u64 sort_lanes(u64 x, int gap, bool ascending) {
#pragma unroll 1
  for (; gap; gap /= 2) {
    const u64 y = __shfl_xor_sync(~0u, x, gap);
    const bool smaller = ((threadIdx.x & gap) == 0) == ascending;  // of the two, this lane keeps the smaller one
    x = (x < y) == smaller ? x : y;
  }
  return x;
}

template <class V> __device__ __forceinline__ void sort(Worker& w, const Desc& d) {
  const auto all = V::range(d.index);
  u32* row = (u32*)V::scratch(w);                   // N values
  u64* item = (u64*)(row + (V::N + 31) / 32 * 32);  // P keys, each above its position
#pragma unroll 1
  for (int point = 0; point < V::batches(all); ++point) {
    const auto r = V::at_batch(all, point);
    V::key(w, d, r, row);
    sync_consumers();
#pragma unroll 1
    for (int i = threadIdx.x; i < V::P; i += THREADS) {
      u64 x = (u64)(i < V::N ? sort_key<V>(row[i]) : ~0u) << 32 | i;  // padding has the largest positions
#pragma unroll 1
      for (int size = 2; size <= 32; size *= 2) x = sort_lanes(x, size / 2, (i & size) == 0);
      item[i] = x;
    }
    sync_consumers();
#pragma unroll 1
    for (int size = 64; size <= V::P; size *= 2) {
#pragma unroll 1
      for (int gap = size / 2; gap >= 32; gap /= 2) {
#pragma unroll 2
        for (int p = threadIdx.x; p < V::P / 2; p += THREADS) {
          const int i = 2 * p - (p & (gap - 1)), j = i + gap;
          const u64 x = item[i], y = item[j];
          if ((x > y) == ((i & size) == 0)) item[i] = y, item[j] = x;
        }
        sync_consumers();
      }
#pragma unroll 1
      for (int i = threadIdx.x; i < V::P; i += THREADS) item[i] = sort_lanes(item[i], 16, (i & size) == 0);
      sync_consumers();
    }
    for (int i = threadIdx.x; i < V::COUNT; i += THREADS) {
      const u32 at = (u32)item[i];
      V::put(d, r, i, V::POSITIONS ? at : row[at]);
    }
    sync_consumers();
  }
  w.act_key = 0;
  w.keep<false>();
  finish(w, d, true);
}

}  // namespace mpk
