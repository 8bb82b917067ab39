// SCAN: one row in scratch, in place. Every warp scans a part of the row, a tree over its lanes at a time; then what the
// parts before a warp's end with is combined with every element of its own. The order depends on the row's length only.
//
// V, generated: N (row length), REVERSE, Op (of reduce.cuh), range(), batches(), at_batch(), row(), element(), epilogue().
#pragma once

namespace mpk {

struct LOGSUMEXP_F {
  static constexpr u32 first = 0xff800000u;
  static __device__ u32 op(u32 x, u32 y) {
    const float apart = f(x) == f(y) ? 1.f : expf(-fabsf(f(x) - f(y)));
    return F_ADD(F_MAX(x, y), b(log1pf(apart)));
  }
};

// Inclusive, over the lanes of a warp.
template <class Op> __device__ __forceinline__ u32 scan_warp(u32 x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const u32 before = __shfl_sync(~0u, x, lane < o ? lane : lane - o);
    x = lane < o ? x : Op::op(before, x);
  }
  return x;
}

// `totals`: WARPS words that nobody uses.
template <class V> __device__ __forceinline__ void scan_row(u32* row, u32* totals) {
  using Op = typename V::Op;
  constexpr int EACH = 4, STEP = 32 * EACH;  // neighbours of a lane, elements of a step
  constexpr int PART = (V::N + WARPS * STEP - 1) / (WARPS * STEP) * STEP;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int from = warp * PART, to = min(from + PART, V::N);
  const auto at = [](int i) { return V::REVERSE ? V::N - 1 - i : i; };
  u32 total = Op::first;
#pragma unroll 1
  for (int step = from; step < to; step += STEP) {
    const int i = step + lane * EACH;
    u32 x[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) x[k] = i + k < to ? row[at(i + k)] : Op::first;
#pragma unroll
    for (int k = 1; k < EACH; ++k) x[k] = Op::op(x[k - 1], x[k]);
    const u32 all = scan_warp<Op>(x[EACH - 1]);
    const u32 left = __shfl_sync(~0u, all, lane ? lane - 1 : 0);
    const u32 before = lane ? Op::op(total, left) : total;
#pragma unroll
    for (int k = 0; k < EACH; ++k)
      if (i + k < to) row[at(i + k)] = Op::op(before, x[k]);
    total = Op::op(total, __shfl_sync(~0u, all, 31));
  }
  if (lane == 0) totals[warp] = total;
  sync_consumers();
  if (from == 0 || from >= to) return;
  u32 before = totals[0];
  for (int w = 1; w < warp; ++w) before = Op::op(before, totals[w]);
  for (int i = from + lane; i < to; i += 32) row[at(i)] = Op::op(before, row[at(i)]);
}

template <class V> __device__ __forceinline__ void scan(Worker& w, const Desc& d) {
  const auto all = V::range(d.index);
  u32* row = V::row(w);
#pragma unroll 1
  for (int point = 0; point < V::batches(all); ++point) {
    const auto r = V::at_batch(all, point);
    V::element(w, d, r, row);
    sync_consumers();
    scan_row<V>(row, w.sh->scratch);
    sync_consumers();
    V::epilogue(w, d, r, row);
    sync_consumers();
  }
  finish(w, d, true);
}

}  // namespace mpk
