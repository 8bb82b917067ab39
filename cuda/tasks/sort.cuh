// SORT: one row by (key, position), which makes any sorting network stable. A bitonic network over a power of two.
//
// V, generated: N (row length), P (the next power of two), COUNT, DESCENDING, POSITIONS, FLOAT; range(), batches(), at_batch(), key(), put().
#pragma once

namespace mpk {

// Sorts ascending as an unsigned number; a NaN comes last in either direction.
template <class V> __device__ __forceinline__ u32 sort_key(u32 x) {
  if (V::FLOAT && f(x) != f(x)) return ~0u;
  const u32 k = V::FLOAT ? ordered_f32(x) : x ^ 0x80000000u;
  return V::DESCENDING ? ~k : k;
}

template <class V> __device__ __forceinline__ void sort(Worker& w, const Desc& d) {
  const auto all = V::range(d.index);
  u32* row = (u32*)V::scratch(w);  // N values, P keys, P positions
  u32 *key = row + (V::N + 31) / 32 * 32, *at = key + V::P;
#pragma unroll 1
  for (int point = 0; point < V::batches(all); ++point) {
    const auto r = V::at_batch(all, point);
    V::key(w, d, r, row);
    sync_consumers();
    for (int i = threadIdx.x; i < V::P; i += THREADS) {
      key[i] = i < V::N ? sort_key<V>(row[i]) : ~0u;
      at[i] = i;  // padding has the largest positions
    }
    sync_consumers();
#pragma unroll 1
    for (int size = 2; size <= V::P; size *= 2)
#pragma unroll 1
      for (int gap = size / 2; gap; gap /= 2) {
        for (int p = threadIdx.x; p < V::P / 2; p += THREADS) {
          const int i = (p / gap) * 2 * gap + p % gap, j = i + gap;
          const u32 ki = key[i], kj = key[j], ai = at[i], aj = at[j];
          const bool larger = ki > kj || (ki == kj && ai > aj);
          if (larger == ((i & size) == 0)) {
            key[i] = kj;
            key[j] = ki;
            at[i] = aj;
            at[j] = ai;
          }
        }
        sync_consumers();
      }
    for (int i = threadIdx.x; i < V::COUNT; i += THREADS) V::put(d, r, i, V::POSITIONS ? at[i] : row[at[i]]);
    sync_consumers();
  }
  w.act_key = 0;
  w.keep<false>();
  finish(w, d, true);
}

}  // namespace mpk
