// ATTENTION with 16-byte rows of bf16 keys and values of one length, and a plain softmax: what decoding does. The other
// forms are in attention.cuh, with the meaning of everything that V has.
//
// Each warp takes some of the keys and keeps a softmax of its own (max, sum, weighted values), so nothing in the loop
// waits for another warp. The warps' sums meet once in shared memory, those of the parts of a task once in the
// workspace. Each order is fixed by the numbers of lanes, warps and parts, so results repeat bit for bit.
//
// V has here also: limit_of() (every thread for itself), score_at() (SCORE of one point), start() (APPEND and Q, spread
// over the warps so that their loads overlap).
#pragma once

namespace mpk {

// How a warp is laid over keys: LANES lanes a row of DV elements, EACH rows at once.
template <class V> struct Flash {
  static constexpr int LANES = V::DV / 8, EACH = 32 / LANES;
  static constexpr int RP = V::RC > 2 ? 4 : V::RC;                        // rows, to a power of two
  static constexpr int PLACES = WARPS * V::RC * V::DV * 4 > 16384 ? 8 : 16;
  // Halving sums leave row `own` to a lane; `lane_of` is the first lane that has a row.
  static __device__ __forceinline__ int own(int lane) { return RP == 4 ? (lane & 1) * 2 + (lane >> 1 & 1) : RP == 2 ? lane & 1 : 0; }
  static __device__ __forceinline__ constexpr int lane_of(int row) { return RP == 4 ? row >> 1 | (row & 1) << 1 : row; }
  float *q, *out;     // [RC][HEAD], [RC][DV]
  float *top, *sum;   // [WARPS][RC]
  float* red;         // [PLACES][RC][DV]
  __device__ Flash(u8* p) {
    q = (float*)p;
    out = q + V::RC * V::HEAD;
    red = out + V::RC * V::DV;
    top = red + PLACES * V::RC * V::DV;
    sum = top + WARPS * V::RC;
  }
};

// Sums x[0..N) over the lanes that differ in the bits FROM..TO/2, while the lanes share the values out: each gives half
// of them away for every bit, as long as there are two. Returns the number of the first value that this lane has.
template <int N, int FROM, int TO> __device__ __forceinline__ int halve(float (&x)[N]) {
  const int lane = threadIdx.x & 31;
  int n = N, first = 0;
#pragma unroll
  for (int o = FROM; o < TO; o <<= 1) {
    if (n > 1) {
      n /= 2;
      const bool upper = lane & o;
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        if (i < n) {
          const float keep = upper ? x[n + i] : x[i], give = upper ? x[i] : x[n + i];
          x[i] = keep + __shfl_xor_sync(~0u, give, o);
        }
      first += upper ? n : 0;
    } else {
      x[0] += __shfl_xor_sync(~0u, x[0], o);
    }
  }
  return first;
}

// Rows [row0, row1) of the task against the keys [begin, end): this block's max, sum and weighted values. Thread i < RC * DV
// returns element i in `value`, and max and sum of its row.
template <class V, class R>
__device__ __forceinline__ void flash_rows(Worker& w, const Desc& d, const R& r, const Flash<V>& s, const u16* keys, const u16* values,
                                           int row0, int row1, int begin, int end, float& value, float& row_top, float& row_sum) {
  using F = Flash<V>;
  constexpr int EACH = F::EACH, LANES = F::LANES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, sub = lane / LANES, part = lane % LANES, own = F::own(lane);
  float top = LOWEST, sum = 0, acc[V::RC * 8] = {};
  const auto row = [&](const u16* p, int key, int stride) { return *(const uint4*)(p + (i64)min(key, end - 1) * stride + part * 8); };
  int key = begin + warp * EACH + sub;
  uint4 k = {}, v = {};
  if (key - sub < end) {
    k = row(keys, key, V::KEY_STRIDE);
    v = row(values, key, V::VALUE_STRIDE);
  }
#pragma unroll 1
  while (key - sub < end) {
    uint4 next_k = {}, next_v = {};  // on the way while this warp works on the ones before
    const int next = key + WARPS * EACH;
    if (next - sub < end) {
      next_k = row(keys, next, V::KEY_STRIDE);
      next_v = row(values, next, V::VALUE_STRIDE);
    }
    forget();  // the queries of all rows would take 8 * RC registers
    float x[8], dot[F::RP] = {};
    unpack8(x, k);
#pragma unroll
    for (int i = 0; i < V::RC; ++i) {
      const float4 a = *(const float4*)(s.q + i * V::HEAD + part * 8), b = *(const float4*)(s.q + i * V::HEAD + part * 8 + 4);
      dot[i] = fmaf(a.w, x[3], fmaf(a.z, x[2], fmaf(a.y, x[1], a.x * x[0])));
      dot[i] = fmaf(b.w, x[7], fmaf(b.z, x[6], fmaf(b.y, x[5], fmaf(b.x, x[4], dot[i]))));
    }
    halve<F::RP, 1, LANES>(dot);
    float score = dot[0];
    if (row0 + own < row1 && key < end) V::score_at(d, r, row0 + own, key, score);
    if (key >= end) score = LOWEST;
    float most = score;
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) most = f(F_MAX(b(most), b(__shfl_xor_sync(~0u, most, o))));
    most = f(F_MAX(b(top), b(most)));
    const float ground = most == LOWEST ? 0.0f : most;  // a part may be masked as a whole
    if (__any_sync(~0u, b(most) != b(top))) {
      const float scale = top == LOWEST ? 0.0f : expf(top - ground);
      top = most;
      sum *= scale;
#pragma unroll
      for (int i = 0; i < V::RC; ++i) {
        const float y = __shfl_sync(~0u, scale, F::lane_of(i));
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[i * 8 + c] *= y;
      }
    }
    score = score == LOWEST ? 0.0f : expf(score - ground);
    sum += score;
    unpack8(x, v);
#pragma unroll
    for (int i = 0; i < V::RC; ++i) {
      const float e = __shfl_sync(~0u, score, sub * LANES + F::lane_of(i));
#pragma unroll
      for (int c = 0; c < 8; ++c) acc[i * 8 + c] = fmaf(e, x[c], acc[i * 8 + c]);
    }
    key = next;
    k = next_k;
    v = next_v;
  }
  // The warp: over its keys; the values are shared out.
#pragma unroll
  for (int o = LANES; o < 32; o <<= 1) sum += __shfl_xor_sync(~0u, sum, o);
  const int first = halve<V::RC * 8, LANES, 32>(acc);
  constexpr int MINE = V::RC * 8 / EACH;
  const bool speaker = lane < F::RP && own < V::RC;
  if (speaker) s.top[warp * V::RC + own] = top;
  sync_consumers();
  // The block: everything relative to the largest of the maxima.
  float largest = LOWEST;
#pragma unroll
  for (int q = 0; q < WARPS; ++q) largest = f(F_MAX(b(largest), b(s.top[q * V::RC + min(own, V::RC - 1)])));
  const float scale = top == LOWEST ? 0.0f : expf(top - largest);
  if (speaker) s.sum[warp * V::RC + own] = sum * scale;
#pragma unroll
  for (int round = F::PLACES == 16 ? 1 : 0; round < 2; ++round) {  // 16 warps through 8 places: w + 8, then w on top
    if (F::PLACES == 16 || (round ? warp < 8 : warp >= 8)) {
      float* p = s.red + (warp % F::PLACES) * V::RC * V::DV + part * 8;
#pragma unroll
      for (int i = 0; i < MINE; ++i) {
        const int e = first + i;
        const float x = acc[i] * __shfl_sync(~0u, scale, F::lane_of(e >> 3));
        float* at = p + (e >> 3) * V::DV + (e & 7);
        *at = F::PLACES == 16 || !round ? x : *at + x;
      }
    }
    sync_consumers();
  }
  const int i = threadIdx.x;
  if (i < V::RC * V::DV) {
    const int row = i / V::DV;
    value = s.red[i];
#pragma unroll
    for (int q = 1; q < F::PLACES; ++q) value += s.red[q * V::RC * V::DV + i];
    row_sum = 0;
    row_top = LOWEST;
#pragma unroll
    for (int q = 0; q < WARPS; ++q) {
      row_sum += s.sum[q * V::RC + row];
      row_top = f(F_MAX(b(row_top), b(s.top[q * V::RC + row])));
    }
  }
}

// A block that has seen the last part of a task merges all: lane q knows max and sum of part q.
template <class V> __device__ __forceinline__ void flash_merge(Worker& w, const Desc& d, const Flash<V>& s, int row0, int row1) {
  static_assert(V::PARTS <= 32);
  constexpr u64 NEXT = (u64)V::R * (V::DV + 2);
  const float* all = (const float*)(w.workspace + d.partial) + (u64)d.index * V::PARTS * NEXT + (u64)row0 * (V::DV + 2);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int BLOCKS = (V::DV + 31) / 32;
#pragma unroll 1
  for (int i = warp; i < (row1 - row0) * BLOCKS; i += WARPS) {
    const float* p = all + (i / BLOCKS) * (V::DV + 2);
    const int column = i % BLOCKS * 32 + lane;
    float x[V::PARTS];
#pragma unroll
    for (int q = 0; q < V::PARTS; ++q) x[q] = p[q * NEXT + 2 + min(column, V::DV - 1)];
    const float top = lane < V::PARTS ? p[lane * NEXT] : LOWEST, part = lane < V::PARTS ? p[lane * NEXT + 1] : 0.0f;
    const float largest = f(reduce_warp<MAX_F>(b(top)));
    const float scale = top == LOWEST ? 0.0f : expf(top - largest);
    const float sum = f(reduce_warp<SUM_F>(b(part * scale)));
    float out = 0;
#pragma unroll
    for (int q = 0; q < V::PARTS; ++q) out = fmaf(x[q], __shfl_sync(~0u, scale, q), out);
    if (column < V::DV) s.out[i / BLOCKS * V::DV + column] = out / sum;
  }
}

template <class V> __device__ __forceinline__ void flash(Worker& w, const Desc& d) {
  const auto r = V::range(d.index);
  const Flash<V> s(V::scratch(w));
  const int rows = V::rows(r);
  const int limit = min(max(V::limit_of(w, d, r), 1), V::KEYS);
  const int each = ((limit + V::PARTS - 1) / V::PARTS + 31) / 32 * 32;
  const int begin = min(limit, (int)d.part * each), end = min(limit, begin + each);
  const u16 *keys = (const u16*)V::keys(d) + V::key_offset(r), *values = (const u16*)V::values(d) + V::value_offset(r);
  // The cache is on its way to L2 while the queries are computed. It is read only after APPEND: nobody knows which row
  // an expression appends.
  constexpr int LINE = 64, LINES = (V::DV + LINE - 1) / LINE;
#pragma unroll 1
  for (int i = begin * LINES + threadIdx.x; i < end * LINES; i += THREADS) {
    prefetch_l2(keys + (i64)(i / LINES) * V::KEY_STRIDE + i % LINES * LINE);
    prefetch_l2(values + (i64)(i / LINES) * V::VALUE_STRIDE + i % LINES * LINE);
  }
  bool publish = true;
#pragma unroll 1
  for (int row0 = 0; row0 < rows; row0 += V::RC) {
    const int row1 = min(rows, row0 + V::RC);
    // Every part appends: the values are equal, and so no part waits for another.
    V::start(w, d, r, row0, row1, s.q);
    if (row1 - row0 < V::RC)  // rows that do not exist
#pragma unroll 1
      for (int i = threadIdx.x + (row1 - row0) * V::HEAD; i < V::RC * V::HEAD; i += THREADS) s.q[i] = 0;
    sync_consumers();
    stamp(w, d, 1);
    float value = 0, top = 0, sum = 1;
    flash_rows<V>(w, d, r, s, keys, values, row0, row1, begin, end, value, top, sum);
    const int i = threadIdx.x, row = i / V::DV;
    if constexpr (V::PARTS == 1) {
      if (i < V::RC * V::DV) s.out[i] = value / sum;
      sync_consumers();
      stamp(w, d, 2);
      V::epilogue(w, d, r, row0, row1, s.out);
    } else if (i < (row1 - row0) * V::DV) {
      float* p = (float*)(w.workspace + d.partial) + (((u64)d.index * V::PARTS + d.part) * V::R + row0 + row) * (V::DV + 2);
      p[2 + i % V::DV] = value;
      if (i % V::DV == 0) {
        p[0] = top;
        p[1] = sum;
      }
    }
    if (row0 + V::RC < rows) sync_consumers();  // scratch is free again
  }
  if constexpr (V::PARTS > 1) {
    stamp(w, d, 2);
    publish = last_part(w, d, V::PARTS);
    if (publish)
#pragma unroll 1
      for (int row0 = 0; row0 < rows; row0 += V::RC) {
        const int row1 = min(rows, row0 + V::RC);
        flash_merge<V>(w, d, s, row0, row1);
        sync_consumers();
        V::epilogue(w, d, r, row0, row1, s.out);
        if (row0 + V::RC < rows) sync_consumers();
      }
  }
  w.act_key = 0;
  finish(w, d, publish);
}

}  // namespace mpk
