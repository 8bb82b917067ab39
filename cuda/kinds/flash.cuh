// ATTENTION with 16-byte rows of bf16 keys and values of one length, and a plain softmax: what decoding does. The other
// forms are in attention.cuh, with the meaning of everything that V has.
//
// Each warp takes some of the keys, 16 at a time, and keeps a softmax of its own (max, sum, weighted values), so nothing
// in the loop waits for another warp. The warps' sums meet once in shared memory, those of the parts of a task once in
// the workspace. Each order is fixed by the numbers of lanes, warps and parts, so results repeat bit for bit.
//
// Both products run on tensor cores (mma.m16n8k16; in a lane, g = lane / 4 and t = lane % 4) for up to 8 query rows:
//   scores[8 rows][keys] = Q * K^T: Q is the A operand, f32 as two bf16: rows g are the higher parts, rows g + 8 the lower.
//   out^T[DV][8 rows] += V^T * P^T: V is the A operand, P the B operand, given as higher and lower parts too.
// A row is a row of A or a column of B, so it does not depend on the others. K and V go from memory to their operands in
// 16-byte chunks without shared memory: the order of the elements of a row is chosen so that a lane needs whole chunks.
//
// V has here also: SPLIT (warps that share the values of a key, at most 64 elements each; all of them compute the scores),
// PLACES (of [RC][DV] sums in shared memory), limit_of() (every thread for itself), score_at() (SCORE of one point), start()
// (APPEND and Q, spread over the warps so that their loads overlap).
#pragma once

namespace mpk {

template <class V> struct Flash {
  static constexpr int STEPS = V::HEAD / 16;     // of Q * K^T
  static constexpr int SETS = WARPS / V::SPLIT;  // of warps with keys of their own
  float *q, *out;                                // [RC][HEAD], [RC][DV]
  float *top, *sum;                              // [SETS][8]
  float* largest;                                // [8] max of a row over the warps
  float* red;                                    // [PLACES][RC][DV]
  uint4* queries;                                // [STEPS][32 lanes]: Q as the A operand, until red is needed
  static_assert(V::HEAD % 32 == 0 && V::DV % 32 == 0 && V::DV <= 64 * V::SPLIT && V::RC <= 8 && SETS % 4 == 0 &&
                SETS % V::PLACES == 0);
  __device__ Flash(u8* p) {
    q = (float*)p;
    out = q + V::RC * V::HEAD;
    top = out + V::RC * V::DV;
    sum = top + SETS * 8;
    largest = sum + SETS * 8;
    red = largest + 8;
    queries = (uint4*)red;
  }
};

// (x, y) = high + low, each of them two bf16: 16 bits of precision, or more.
__device__ __forceinline__ void split(float x, float y, u32& high, u32& low) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - f(high << 16), y - f(high & 0xffff0000u));
}

__device__ __forceinline__ u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// Q as the A operand of every step: half a chunk, 4 * (step / 2) + t, of row g. Rows that do not exist are 0.
template <class V> __device__ __forceinline__ void flash_queries(const Flash<V>& s, int rows) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Flash<V>::STEPS * 32; i += THREADS) {
    const int step = i >> 5, g = i >> 2 & 7, t = i & 3;
    float4 x = make_float4(0, 0, 0, 0);
    if (g < rows) x = *(const float4*)(s.q + g * V::HEAD + (step / 2 * 4 + t) * 8 + step % 2 * 4);
    uint4 a;
    split(x.x, x.y, a.x, a.y);
    split(x.z, x.w, a.z, a.w);
    s.queries[i] = a;
  }
}

// Rows [row0, row1) of the task against the keys [begin, end): put(i, value, max, sum) for every element i of [RC][DV] of
// this block's weighted values, with max and sum of its row.
template <class V, class R, class Put>
__device__ __forceinline__ void flash_rows(const Desc& d, const R& r, const Flash<V>& s, const u16* keys,
                                           const u16* values, int row0, int row1, int begin, int end, const Put& put) {
  constexpr int CHUNKS = V::HEAD / 32, EARLY = CHUNKS <= 2 ? CHUNKS : 2, SETS = Flash<V>::SETS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, set = warp / V::SPLIT;
  const int chunk = warp % V::SPLIT * 8 + g, row = min(row0 + g, row1 - 1);
  const u8 *key_at = (const u8*)(keys + t * 8), *value_at = (const u8*)(values + min(chunk, V::DV / 8 - 1) * 8);
  float top = LOWEST, sum = 0;  // of row g
  float acc[4][4] = {};         // of rows 2t, 2t+1: elements 2i, 2i+1 of the chunk
#pragma unroll 1
  for (int key0 = begin + set * 16; key0 < end; key0 += SETS * 16) {
    // Loads are on their way before any of them is needed, as far as there are registers: the kernel has 96 a thread.
    uint4 k[EARLY][2], v[4];
    const auto load_k = [&](uint4(&k)[2], int n) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        k[i] = load16(key_at + (i64)min(key0 + 8 * i + g, end - 1) * (2 * V::KEY_STRIDE) + n * 64);
    };
#pragma unroll
    for (int n = 0; n < EARLY; ++n) load_k(k[n], n);
    const auto load_v = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = load16(value_at + (i64)min(key0 + (i >> 1) * 8 + 2 * t + (i & 1), end - 1) * (2 * V::VALUE_STRIDE));
    };
    if (CHUNKS == EARLY) load_v();  // more keys take the registers first
    float score[2][4] = {};         // of 8 keys: [0], [1] of keys 2t, 2t+1; [2], [3] what the lower parts of Q add
#pragma unroll(EARLY)
    for (int n = 0; n < CHUNKS; ++n) {
      uint4(&x)[2] = k[n % EARLY];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 q = load16_shared(s.queries + (n * 2 + h) * 32 + lane);
        const u32 a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_bf16(score[i], a, word(x[i], 2 * h), word(x[i], 2 * h + 1));
      }
      if (n + EARLY < CHUNKS) load_k(x, n + EARLY);
    }
    if (CHUNKS > EARLY) load_v();
    float most = LOWEST;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = key0 + (i >> 1) * 8 + 2 * t + (i & 1);
      float& x = score[i >> 1][i & 1];
      x += score[i >> 1][(i & 1) + 2];
      V::score_at(d, r, row, min(key, end - 1), x);
      if (row0 + g >= row1 || key >= end) x = LOWEST;
      most = fmaxf(most, x);
    }
    if (__any_sync(~0u, most > top)) {
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
      most = fmaxf(most, top);
      const float scale = top == LOWEST ? 0.0f : expf(top - most);
      top = most;
      sum *= scale;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float y = __shfl_sync(~0u, scale, 8 * t + 4 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[i][j] *= y;
          acc[i][j + 2] *= y;
        }
      }
    }
    const float ground = top == LOWEST ? 0.0f : top;  // a row may be masked as a whole
    u32 high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = expf(score[i][0] - ground), y = expf(score[i][1] - ground);
      sum += x + y;
      split(x, y, high[i], low[i]);
    }
    u32 a[4][4];  // word i of a chunk: its lower halves are row g of the operand, its upper halves row g + 8
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[i][j] = __byte_perm(word(v[j & 2], i), word(v[(j & 2) + 1], i), j & 1 ? 0x7632 : 0x5410);
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_bf16(acc[i], a[i], high[0], high[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_bf16(acc[i], a[i], low[0], low[1]);
  }
  // The warp: over its keys.
#pragma unroll
  for (int o = 1; o < 4; o <<= 1) sum += __shfl_xor_sync(~0u, sum, o);
  const bool writes = t == 0 && warp % V::SPLIT == 0;  // the warps of a set have the same max and sum
  if (writes) s.top[set * 8 + g] = top;
  sync_consumers();
  // The block: everything relative to the largest of the maxima.
  float largest = LOWEST;
#pragma unroll
  for (int q = 0; q < SETS; q += 4) largest = fmaxf(largest, s.top[(q + t) * 8 + g]);
#pragma unroll
  for (int o = 1; o < 4; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  const float scale = top == LOWEST ? 0.0f : expf(top - largest);
  if (writes) s.sum[set * 8 + g] = sum * scale;
  if (t == 0 && warp == 0) s.largest[g] = largest;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float y = __shfl_sync(~0u, scale, 8 * t + 4 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[i][j] *= y;
      acc[i][j + 2] *= y;
    }
  }
#pragma unroll
  for (int round = 0; round < SETS / V::PLACES; ++round) {  // the sets through the places, in order
    if (set / V::PLACES == round && chunk < V::DV / 8)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (2 * t + j >= V::RC) continue;
        float4* p = (float4*)(s.red + (set % V::PLACES * V::RC + 2 * t + j) * V::DV + chunk * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto &x = acc[2 * h], &y = acc[2 * h + 1];
          const float4 old = round ? p[h] : make_float4(0, 0, 0, 0);
          p[h] = make_float4(old.x + x[j], old.y + x[j + 2], old.z + y[j], old.w + y[j + 2]);
        }
      }
    sync_consumers();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < V::RC * V::DV; i += THREADS) {
    float value = s.red[i], total = 0;
#pragma unroll
    for (int q = 1; q < V::PLACES; ++q) value += s.red[q * V::RC * V::DV + i];
#pragma unroll
    for (int q = 0; q < SETS; ++q) total += s.sum[q * 8 + i / V::DV];
    put(i, value, s.largest[i / V::DV], total);
  }
}

// A block that has seen the last part of a task merges all: lane q knows max and sum of part q.
template <class V> __device__ __forceinline__ void flash_merge(Worker& w, const Desc& d, const Flash<V>& s, int row0,
                                                               int row1) {
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
    if (column < V::DV) s.out[i / BLOCKS * V::DV + column] = __fdividef(out, sum);
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
  bool publish = true;
  const int last = V::R > V::RC ? rows : 1;  // where one pass does, the compiler should know
#pragma unroll 1
  for (int row0 = 0; row0 < last; row0 += V::RC) {
    const int row1 = min(rows, row0 + V::RC);
    // Every part appends: the values are equal, and so no part waits for another.
    V::start(w, d, r, row0, row1, s.q);
    sync_consumers();
    flash_queries<V>(s, row1 - row0);
    sync_consumers();
    stamp(w, d, 1);
    flash_rows<V>(d, V::range(d.index), s, keys, values, row0, row1, begin, end,
                  [&](int i, float value, float top, float sum) {
                    if constexpr (V::PARTS == 1) {
                      s.out[i] = __fdividef(value, sum);
                    } else if (i < (row1 - row0) * V::DV) {
                      float* p = (float*)(w.workspace + d.partial) +
                                 (((u64)d.index * V::PARTS + d.part) * V::R + row0 + i / V::DV) * (V::DV + 2);
                      p[2 + i % V::DV] = value;
                      if (i % V::DV == 0) {
                        p[0] = top;
                        p[1] = sum;
                      }
                    }
                  });
    if constexpr (V::PARTS == 1) {
      sync_consumers();
      stamp(w, d, 2);
      V::epilogue(w, d, V::range(d.index), row0, row1, s.out);
    }
    if (row0 + V::RC < last) sync_consumers();  // scratch is free again
  }
  if constexpr (V::PARTS > 1) {
    stamp(w, d, 2);
    publish = last_part(w, d, V::PARTS);
    if (publish)
#pragma unroll 1
      for (int row0 = 0; row0 < last; row0 += V::RC) {
        const int row1 = min(rows, row0 + V::RC);
        flash_merge<V>(w, d, s, row0, row1);
        sync_consumers();
        V::epilogue(w, d, V::range(d.index), row0, row1, s.out);
        if (row0 + V::RC < last) sync_consumers();
      }
  }
  w.act_key = 0;
  w.keep<false>();
  finish(w, d, publish);
}

}  // namespace mpk
