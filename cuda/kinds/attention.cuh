// ATTENTION of one batch point: rows of queries against keys [0, limit) of the cache. The keys may be split into parts
// over several blocks; the block that arrives last merges them in order. Softmax is online in f32 over chunks of KC
// keys; the scores, the weights e = exp(x - max) and the sums stay in f32 and are never rounded in between.
//
// V, generated: R (rows), RC (rows at a time), HEAD, DV, KEYS, KC, PARTS, EXACT (PROB is more than a rounding: a first
// pass finds max and sum, the second applies PROB to the normalised weights), FAST_K and FAST_V (16-byte bf16 rows);
// append(), limit(), query(), score(), prob(), epilogue(), key(), value() and their strides.
#pragma once

namespace mpk {

// Eight bf16 as floats.
__device__ __forceinline__ void unpack8(float (&x)[8], const uint4& u) {
  const u32 w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(w[i] << 16);
    x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}

// Rows of keys or values that a lane has in flight: what a block reads at once decides how fast a long cache is read.
constexpr int AHEAD = 4;

// Shared memory of a running attention task.
template <class V> struct AttentionScratch {
  float* q;      // [RC][HEAD]
  float* score;  // [RC][KC]
  float* out;    // [RC][DV]
  float* top;    // [RC] max, [RC] sum, [RC] scale
  float* red;    // [8][RC][DV]
  static constexpr int words = V::RC * (V::HEAD + V::KC + V::DV + 4 + 8 * V::DV);
  __device__ AttentionScratch(u8* p) {
    q = (float*)p;
    score = q + V::RC * V::HEAD;
    out = score + V::RC * V::KC;
    top = out + V::RC * V::DV;
    red = top + V::RC * 4;
  }
};

// score[r][key - key0] = q[r] . k[key]
template <class V> __device__ __forceinline__ void scores(const AttentionScratch<V>& s, const void* keys, i64 base,
                                                          int key0, int key1) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if constexpr (V::FAST_K) {
    constexpr int LANES = V::HEAD / 8, EACH = 32 / LANES;
    const int sub = lane / LANES, part = lane % LANES;
    float q[V::RC][8];
#pragma unroll
    for (int r = 0; r < V::RC; ++r)
#pragma unroll
      for (int i = 0; i < 8; ++i) q[r][i] = s.q[r * V::HEAD + part * 8 + i];
#pragma unroll 1
    for (int k0 = key0 + warp * EACH; k0 < key1; k0 += AHEAD * WARPS * EACH) {
      uint4 raw[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u)
        raw[u] = *(const uint4*)((const u16*)keys + base +
                                 (i64)min(k0 + u * WARPS * EACH + sub, key1 - 1) * V::KEY_STRIDE + part * 8);
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        const int key = k0 + u * WARPS * EACH + sub;
        if (key - sub >= key1) break;
        float x[8];
        unpack8(x, raw[u]);
#pragma unroll
        for (int r = 0; r < V::RC; ++r) {
          float dot = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) dot = fmaf(q[r][i], x[i], dot);
#pragma unroll
          for (int o = LANES / 2; o; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
          if (part == 0 && key < key1) s.score[r * V::KC + key - key0] = dot;
        }
      }
    }
  } else if constexpr (V::HEAD <= 512 &&
                       (V::KEY_HEAD == 1 || V::KEY_STRIDE != 1)) {  // a warp a key: lanes along the head
    constexpr int EACH = (V::HEAD + 31) / 32, FLIGHT = EACH <= 4 ? 2 * AHEAD : EACH <= 8 ? AHEAD : 1;
#pragma unroll 1
    for (int k0 = key0 + warp; k0 < key1; k0 += FLIGHT * WARPS) {
      float x[FLIGHT][EACH];
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u)
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const int h = lane + 32 * e;
          const i64 at = base + (i64)min(k0 + u * WARPS, key1 - 1) * V::KEY_STRIDE + h * V::KEY_HEAD;
          x[u][e] = h < V::HEAD ? f(V::load_key(keys, at)) : 0.0f;
        }
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) {
        const int key = k0 + u * WARPS;
        if (key >= key1) break;
#pragma unroll
        for (int r = 0; r < V::RC; ++r) {
          float dot = 0;
#pragma unroll
          for (int e = 0; e < EACH; ++e)
            if (lane + 32 * e < V::HEAD) dot = fmaf(s.q[r * V::HEAD + lane + 32 * e], x[u][e], dot);
          dot = f(reduce_warp<SUM_F>(b(dot)));
          if (lane == 0) s.score[r * V::KC + key - key0] = dot;
        }
      }
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < V::RC * (key1 - key0); i += THREADS) {
      const int r = i / (key1 - key0), key = key0 + i % (key1 - key0);
      float dot = 0;
      for (int h = 0; h < V::HEAD; ++h)
        dot = fmaf(s.q[r * V::HEAD + h], f(V::load_key(keys, base + (i64)key * V::KEY_STRIDE + h * V::KEY_HEAD)), dot);
      s.score[r * V::KC + key - key0] = dot;
    }
  }
}

// out[r] = out[r] * scale[r] + the sums in so many places, in order.
template <class V, int PLACES> __device__ __forceinline__ void gather(const AttentionScratch<V>& s) {
  const float* scale = s.top + 2 * V::RC;
#pragma unroll 1
  for (int i = threadIdx.x; i < V::RC * V::DV; i += THREADS) {
    float sum = s.red[i];
#pragma unroll
    for (int q = 1; q < PLACES; ++q) sum += s.red[q * V::RC * V::DV + i];
    s.out[i] = s.out[i] * scale[i / V::DV] + sum;
  }
}

// out[r] = out[r] * scale[r] + sum over keys of score[r][key] * v[key]
template <class V> __device__ __forceinline__ void weighted(const AttentionScratch<V>& s, const void* values, i64 base,
                                                            int key0, int key1) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if constexpr (V::FAST_V) {
    constexpr int LANES = V::DV / 8, EACH = 32 / LANES;
    const int sub = lane / LANES, part = lane % LANES;
    float acc[V::RC][8] = {};
#pragma unroll 1
    for (int k0 = key0 + warp * EACH + sub; k0 < key1; k0 += AHEAD * WARPS * EACH) {
      uint4 raw[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u)
        raw[u] = *(const uint4*)((const u16*)values + base +
                                 (i64)min(k0 + u * WARPS * EACH, key1 - 1) * V::VALUE_STRIDE + part * 8);
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        const int key = k0 + u * WARPS * EACH;
        if (key >= key1) break;
        float x[8];
        unpack8(x, raw[u]);
#pragma unroll
        for (int r = 0; r < V::RC; ++r) {
          const float e = s.score[r * V::KC + key - key0];
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[r][i] = fmaf(e, x[i], acc[r][i]);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < V::RC; ++r)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int o = LANES; o < 32; o <<= 1) acc[r][i] += __shfl_xor_sync(~0u, acc[r][i], o);
    // 16 warps through 8 places, in order: w + 8 joins w, then all eight.
#pragma unroll
    for (int half = 1; half >= 0; --half) {
      if (half ? warp >= 8 : warp < 8)
        if (sub == 0)
#pragma unroll
          for (int r = 0; r < V::RC; ++r)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              float* p = s.red + ((warp & 7) * V::RC + r) * V::DV + part * 8 + i;
              *p = half ? acc[r][i] : *p + acc[r][i];
            }
      sync_consumers();
    }
    gather<V, 8>(s);
  } else if constexpr (V::DV <= THREADS) {  // groups of threads take turns at the keys, a thread a column
    constexpr int GROUPS = THREADS / V::DV < 8 ? THREADS / V::DV : 8, FLIGHT = 2 * AHEAD;
    const int group = threadIdx.x / V::DV, c = threadIdx.x % V::DV;
    if (group < GROUPS) {
      float acc[V::RC] = {};
#pragma unroll 1
      for (int k0 = key0 + group; k0 < key1; k0 += FLIGHT * GROUPS) {
        float x[FLIGHT];
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u)
          x[u] = f(V::load_value(values,
                                 base + (i64)min(k0 + u * GROUPS, key1 - 1) * V::VALUE_STRIDE + c * V::VALUE_COLUMN));
#pragma unroll
        for (int u = 0; u < FLIGHT; ++u) {
          const int key = k0 + u * GROUPS;
          if (key >= key1) break;
#pragma unroll
          for (int r = 0; r < V::RC; ++r) acc[r] = fmaf(s.score[r * V::KC + key - key0], x[u], acc[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < V::RC; ++r) s.red[(group * V::RC + r) * V::DV + c] = acc[r];
    }
    sync_consumers();
    gather<V, GROUPS>(s);
  } else {
    const float* scale = s.top + 2 * V::RC;
#pragma unroll 1
    for (int i = threadIdx.x; i < V::RC * V::DV; i += THREADS) {
      const int r = i / V::DV, c = i % V::DV;
      float sum = 0;
      for (int key = key0; key < key1; ++key)
        sum = fmaf(s.score[r * V::KC + key - key0],
                   f(V::load_value(values, base + (i64)key * V::VALUE_STRIDE + c * V::VALUE_COLUMN)), sum);
      s.out[i] = s.out[i] * scale[r] + sum;
    }
  }
}

// Rows of this chunk of keys: new max and sum, score becomes exp(score - max), scale what the old output is worth.
template <class V> __device__ __forceinline__ void soften(const AttentionScratch<V>& s, int n) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int r = warp; r < V::RC; r += WARPS) {
    float* x = s.score + r * V::KC;
    const float old = s.top[r];
    float top = old;
#pragma unroll 1
    for (int i = lane; i < n; i += 32) top = f(F_MAX(b(top), b(x[i])));
    top = f(reduce_warp<MAX_F>(b(top)));
    const float ground = top == LOWEST ? 0.0f : top;  // a part may be masked as a whole
    float sum = 0;
#pragma unroll 1
    for (int i = lane; i < n; i += 32) sum += x[i] = expf(x[i] - ground);
    sum = f(reduce_warp<SUM_F>(b(sum)));
    const float scale = old == LOWEST ? 0.0f : expf(old - ground);
    __syncwarp();  // every lane has read `old`
    if (lane == 0) {
      s.top[r] = top;
      s.top[V::RC + r] = s.top[V::RC + r] * scale + sum;
      s.top[2 * V::RC + r] = scale;
    }
  }
}

template <class V> __device__ __forceinline__ void attention(Worker& w, const Desc& d) {
  const auto r = V::range(d.index);
  const AttentionScratch<V> s(V::scratch(w));
  const int rows = V::rows(r);
  V::limit(w, d, r);
  sync_consumers();
  const int limit = V::HAS_LIMIT ? min(max(w.sh->limit, 1), V::KEYS) : V::KEYS;
  const int each = ((limit + V::PARTS - 1) / V::PARTS + 31) / 32 * 32;
  const int begin = min(limit, (int)d.part * each), end = min(limit, begin + each);
  const void *keys = V::keys(d), *values = V::values(d);
  const i64 key_at = V::key_offset(r), value_at = V::value_offset(r);
  if constexpr (V::FAST_K && V::FAST_V) {  // the cache is on its way while the queries are computed
    constexpr int LINE = 64, K_LINES = (V::HEAD + LINE - 1) / LINE, V_LINES = (V::DV + LINE - 1) / LINE;
    for (int i = begin * K_LINES + threadIdx.x; i < end * K_LINES; i += THREADS)
      prefetch_l2((const u16*)keys + key_at + (i64)(i / K_LINES) * V::KEY_STRIDE + i % K_LINES * LINE);
    for (int i = begin * V_LINES + threadIdx.x; i < end * V_LINES; i += THREADS)
      prefetch_l2((const u16*)values + value_at + (i64)(i / V_LINES) * V::VALUE_STRIDE + i % V_LINES * LINE);
  }
  // Every part appends: the values are equal, and so no part waits for another.
  V::append(w, d, r);
  sync_consumers();

#pragma unroll 1
  for (int row0 = 0; row0 < rows; row0 += V::RC) {
    const int row1 = min(rows, row0 + V::RC);
#pragma unroll 1
    for (int i = threadIdx.x; i < V::RC * V::DV; i += THREADS) s.out[i] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < V::RC; i += THREADS) {
      s.top[i] = LOWEST;
      s.top[V::RC + i] = 0;
    }
    V::query(w, d, r, row0, row1, s.q);
    if (row1 - row0 < V::RC)  // rows that do not exist
#pragma unroll 1
      for (int i = threadIdx.x + (row1 - row0) * V::HEAD; i < V::RC * V::HEAD; i += THREADS) s.q[i] = 0;
    sync_consumers();
    stamp(w, d, 1);
#pragma unroll 1
    for (int pass = 0; pass <= V::EXACT; ++pass)
#pragma unroll 1
      for (int key0 = begin; key0 < end; key0 += V::KC) {
        const int key1 = min(end, key0 + V::KC);
        scores<V>(s, keys, key_at, key0, key1);
        sync_consumers();
        V::score(w, d, r, row0, row1, key0, key1, s.score);
        sync_consumers();
        if (pass == 0) {
          soften<V>(s, key1 - key0);
        } else {
#pragma unroll 1
          for (int i = threadIdx.x; i < V::RC * V::KC; i += THREADS)
            s.score[i] = expf(s.score[i] - s.top[i / V::KC]) / s.top[V::RC + i / V::KC];
          sync_consumers();
          V::prob(w, d, r, row0, row1, key0, key1, s.score);
#pragma unroll 1
          for (int i = threadIdx.x; i < V::RC; i += THREADS) s.top[2 * V::RC + i] = 1.0f;
        }
        sync_consumers();
        if (pass == V::EXACT) {
          weighted<V>(s, values, value_at, key0, key1);
          sync_consumers();
        }
      }
    if constexpr (V::PARTS == 1) {
      if constexpr (!V::EXACT)
#pragma unroll 1
        for (int i = threadIdx.x; i < V::RC * V::DV; i += THREADS) s.out[i] /= s.top[V::RC + i / V::DV];
      sync_consumers();
      V::epilogue(w, d, r, row0, row1, s.out);
      sync_consumers();
    } else {
      float* partial = (float*)(w.workspace + d.partial) + ((u64)d.index * V::PARTS + d.part) * V::R * (V::DV + 2);
#pragma unroll 1
      for (int i = threadIdx.x; i < (row1 - row0) * V::DV; i += THREADS)
        partial[(u64)(row0 + i / V::DV) * (V::DV + 2) + 2 + i % V::DV] = s.out[i];
#pragma unroll 1
      for (int i = threadIdx.x; i < row1 - row0; i += THREADS) {
        partial[(u64)(row0 + i) * (V::DV + 2)] = s.top[i];
        partial[(u64)(row0 + i) * (V::DV + 2) + 1] = s.top[V::RC + i];
      }
      sync_consumers();
    }
  }

  bool publish = true;
  stamp(w, d, 2);
  if constexpr (V::PARTS > 1) {
    publish = last_part(w, d, V::PARTS);
    if (publish) {
      constexpr u64 STEP = (u64)V::R * (V::DV + 2);
      const float* all = (const float*)(w.workspace + d.partial) + (u64)d.index * V::PARTS * STEP;
#pragma unroll 1
      for (int row0 = 0; row0 < rows; row0 += V::RC) {
        const int row1 = min(rows, row0 + V::RC);
#pragma unroll 1
        for (int i = threadIdx.x; i < (row1 - row0) * V::DV; i += THREADS) {
          const float* p = all + (u64)(row0 + i / V::DV) * (V::DV + 2);
          const int c = 2 + i % V::DV;
          float top = LOWEST, sum = 0, out = 0;
#pragma unroll 16
          for (int q = 0; q < V::PARTS; ++q) top = f(F_MAX(b(top), b(p[q * STEP])));
#pragma unroll 16
          for (int q = 0; q < V::PARTS; ++q) {
            const float scale = p[q * STEP] == LOWEST ? 0.0f : expf(p[q * STEP] - top);
            sum = fmaf(p[q * STEP + 1], scale, sum);
            out = fmaf(p[q * STEP + c], scale, out);
          }
          s.out[i] = out / sum;
        }
        sync_consumers();
        V::epilogue(w, d, r, row0, row1, s.out);
        sync_consumers();
      }
    }
  }
  w.act_key = 0;
  w.keep<false>();
  finish(w, d, publish);
}

}  // namespace mpk
