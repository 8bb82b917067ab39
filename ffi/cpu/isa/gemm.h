// acc[m][n] = sum over k of act[m][k] * w[n][k] in f32: the inner loops of contractions and of attention.
//
// Three layouts of w, three fixed orders of summation, none of which depends on the tile, on the number of rows or on
// the vector width (the compiler contracts each product and sum to one FMA where the processor has it):
//   columns contiguous   every element is one chain over k in the `Order` that the caller names
//   k contiguous         LANES chains over k % LANES, combined pairwise
//   anything else        as columns contiguous, through a packed panel
// A few rows read w in place, so that a decode step streams it from memory; many rows share panels of w that were
// widened to f32 once.
#pragma once

typedef f32 vf __attribute__((vector_size(MPK_W * 4)));
typedef f32 vfu __attribute__((vector_size(MPK_W * 4), aligned(4), may_alias));
typedef u32 vu __attribute__((vector_size(MPK_W * 4)));
typedef u32 vuu __attribute__((vector_size(MPK_W * 4), aligned(2), may_alias));
typedef uint16_t vhu __attribute__((vector_size(MPK_W * 2), aligned(2), may_alias));

constexpr int W = MPK_W, PAIR = 2 * W;  // columns come in pairs of vectors
constexpr int ROWS = 6;                 // rows of a block

FN vf load_v(const f32* p) { return *reinterpret_cast<const vfu*>(p); }
FN void store_v(f32* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
#if MPK_W == 4
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#elif MPK_W == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#endif

#if MPK_W == 4
#define TURNED(v, h) __builtin_shufflevector(v, v, h % 4, (1 + h) % 4, (2 + h) % 4, (3 + h) % 4)
#elif MPK_W == 8
#define TURNED(v, h)                                                                                                 \
  __builtin_shufflevector(v, v, h % 8, (1 + h) % 8, (2 + h) % 8, (3 + h) % 8, (4 + h) % 8, (5 + h) % 8, (6 + h) % 8, \
                          (7 + h) % 8)
#else
#define TURNED(v, h)                                                                                            \
  __builtin_shufflevector(v, v, h % 16, (1 + h) % 16, (2 + h) % 16, (3 + h) % 16, (4 + h) % 16, (5 + h) % 16,   \
                          (6 + h) % 16, (7 + h) % 16, (8 + h) % 16, (9 + h) % 16, (10 + h) % 16, (11 + h) % 16, \
                          (12 + h) % 16, (13 + h) % 16, (14 + h) % 16, (15 + h) % 16)
#endif

// The elements of v, combined pairwise: i with i + W/2, and so on.
FN f32 fold(vf v) {
#if MPK_W == 16
  v += TURNED(v, 8);
#endif
#if MPK_W >= 8
  v += TURNED(v, 4);
#endif
  v += TURNED(v, 2);
  v += TURNED(v, 1);
  return v[0];
}

// Columns in memory. A pair of vectors may hold its columns in any order that `begin` and `end` translate.
struct ColF32 {
  typedef f32 mem;
  FN void pair(const mem* p, vf& a, vf& b) { a = load_v(p), b = load_v(p + W); }
  FN void begin(const f32* p, vf& a, vf& b) { a = load_v(p), b = load_v(p + W); }
  FN void end(f32* p, vf a, vf b) { store_v(p, a), store_v(p + W, b); }
};
struct ColBF16 {  // even and odd columns: a shift and a mask widen two at a time
  typedef uint16_t mem;
  FN void pair(const mem* p, vf& a, vf& b) {
    const vu x = *reinterpret_cast<const vuu*>(p);
    a = reinterpret_cast<vf>(x << 16), b = reinterpret_cast<vf>(x & 0xffff0000u);
  }
  FN void begin(const f32* p, vf& a, vf& b) {
    const vf x = load_v(p), y = load_v(p + W);
    a = EVEN(x, y), b = ODD(x, y);
  }
  FN void end(f32* p, vf a, vf b) { store_v(p, LOW(a, b)), store_v(p + W, HIGH(a, b)); }
};

// The order of k in a sum: STREAMS values of k a block, `gap` apart, each block `next` further; then what is left over.
//
// `spread` takes k from STREAMS places far apart, so that w is read as that many long sequential streams: a memory
// system fetches those up to twice as fast as one, or as eight rows that lie side by side in the same pages
// (docs/decisions.md, 23). It depends on the number of k and nothing else.
constexpr int STREAMS = 8;
struct Order {
  i64 gap, next, blocks;
  FN Order natural(i64 k) { return {1, STREAMS, k / STREAMS}; }
  FN Order spread(i64 k) { return {k / STREAMS, 1, k / STREAMS}; }
  FN i64 at(const Order& o, i64 i) { return i < STREAMS * o.blocks ? i / STREAMS * o.next + i % STREAMS * o.gap : i; }
};

struct Matrix {  // w: element (n, k) at w + n * stride_n + k * stride_k
  const char* w;
  uint8_t dtype;
  i64 stride_n, stride_k;
};

// MR rows by one pair of columns of a packed panel [kc][PAIR], whose row i is k = where[i]: acc goes on from what it has
// unless `first`.
template <int MR>
static void panel_block(i64 kc, const i64* where, const f32* act, i64 lda, const f32* w, f32* acc, i64 ldc,
                        bool first) {
  vf s[MR][2];
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < 2; ++j) s[m][j] = first ? vf{} : load_v(acc + m * ldc + j * W);
  for (i64 k = 0; k < kc; ++k, w += PAIR) {
    const vf a = load_v(w), b = load_v(w + W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const f32 x = act[m * lda + where[k]];
      s[m][0] += a * x;
      s[m][1] += b * x;
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < 2; ++j) store_v(acc + m * ldc + j * W, s[m][j]);
}

static void panel_rows(int rows, i64 kc, const i64* where, const f32* act, i64 lda, const f32* w, f32* acc, i64 ldc,
                       bool first) {
  switch (rows) {
    case 1: panel_block<1>(kc, where, act, lda, w, acc, ldc, first); break;
    case 2: panel_block<2>(kc, where, act, lda, w, acc, ldc, first); break;
    case 3: panel_block<3>(kc, where, act, lda, w, acc, ldc, first); break;
    case 4: panel_block<4>(kc, where, act, lda, w, acc, ldc, first); break;
    case 5: panel_block<5>(kc, where, act, lda, w, acc, ldc, first); break;
    default: panel_block<6>(kc, where, act, lda, w, acc, ldc, first);
  }
}

// Rows where[0..kc) of `n` columns, widened into sub-panels of one pair of vectors each, [pair][kc][PAIR]; zeros beyond n.
template <class T>
static void pack_contiguous(const typename T::mem* w, i64 step, i64 kc, const i64* where, int pairs, f32* panel) {
  for (i64 k = 0; k < kc; ++k) {
    const auto* row = w + where[k] * step;
    __builtin_prefetch(row + 2 * STREAMS * step);
    for (int p = 0; p < pairs; ++p) {
      vf a, b;
      T::pair(row + p * PAIR, a, b);
      T::end(panel + (p * kc + k) * PAIR, a, b);
    }
  }
}

static void pack(const Matrix& x, const char* w, i64 kc, const i64* where, int n, f32* panel) {
  const int size = size_of(x.dtype), pairs = (n + PAIR - 1) / PAIR;
  const auto dt = static_cast<abi::Dtype>(x.dtype);
  if (x.stride_n == 1 && n % PAIR == 0 && dt == abi::Dtype::F32)
    return pack_contiguous<ColF32>(reinterpret_cast<const f32*>(w), x.stride_k, kc, where, pairs, panel);
  if (x.stride_n == 1 && n % PAIR == 0 && dt == abi::Dtype::BF16)
    return pack_contiguous<ColBF16>(reinterpret_cast<const uint16_t*>(w), x.stride_k, kc, where, pairs, panel);
  for (int p = 0; p < pairs; ++p) {
    const int m = n - p * PAIR < PAIR ? n - p * PAIR : PAIR;
    u32* at = reinterpret_cast<u32*>(panel + p * kc * PAIR);
    if (m < PAIR) __builtin_memset(at, 0, sizeof(f32) * PAIR * static_cast<size_t>(kc));
    for (i64 k = 0; k < kc; ++k)
      load_any(x.dtype, at + k * PAIR, w + (where[k] * x.stride_k + p * PAIR * x.stride_n) * size,
               Lanes{x.stride_n, nullptr}, m);
  }
}

// Columns [c0, c1) through packed panels, k in blocks of PANEL_K. Any layout, any number of rows.
static void panels(i64 rows, i64 c0, i64 c1, i64 k_all, const f32* act, i64 lda, const Matrix& x, Order order, f32* acc,
                   i64 ldc, f32* panel) {
  f32 edge[ROWS * PAIR];
  i64 where[PANEL_K];
  for (i64 k0 = 0; k0 < k_all; k0 += PANEL_K) {
    const i64 kc = k_all - k0 < PANEL_K ? k_all - k0 : PANEL_K;
    for (i64 i = 0; i < kc; ++i) where[i] = Order::at(order, k0 + i);
    for (i64 c = c0; c < c1; c += 2 * PAIR) {
      const int wide = c1 - c < 2 * PAIR ? static_cast<int>(c1 - c) : 2 * PAIR;
      pack(x, x.w + c * x.stride_n * size_of(x.dtype), kc, where, wide, panel);
      for (int p = 0; p * PAIR < wide; ++p) {
        const int n = wide - p * PAIR < PAIR ? wide - p * PAIR : PAIR;
        const f32* w = panel + p * kc * PAIR;
        for (i64 m = 0; m < rows; m += ROWS) {
          const int r = rows - m < ROWS ? static_cast<int>(rows - m) : ROWS;
          const f32* a = act + m * lda;
          f32* out = acc + m * ldc + c + p * PAIR;
          if (n == PAIR) {
            panel_rows(r, kc, where, a, lda, w, out, ldc, k0 == 0);
            continue;
          }
          for (int i = 0; i < r; ++i)
            for (int j = 0; j < PAIR; ++j) edge[i * PAIR + j] = k0 && j < n ? out[i * ldc + j] : 0.f;
          panel_rows(r, kc, where, a, lda, w, edge, PAIR, k0 == 0);
          for (int i = 0; i < r; ++i)
            for (int j = 0; j < n; ++j) out[i * ldc + j] = edge[i * PAIR + j];
        }
      }
    }
  }
}

// Where a stream will be AHEAD lines from now, at most two turns on: along the tile's row, then in the next block's.
// Software prefetches there, because hardware prefetchers do not see the turn, and do not get going in a narrow tile.
template <class T>
struct Ahead {
  static constexpr i64 line = 64 / static_cast<i64>(sizeof(typename T::mem)), AHEAD = 6;
  const typename T::mem* at;
  i64 left, n, turn;
  Ahead(const typename T::mem* w, i64 columns, i64 next) : n(columns), turn(next - columns) {
    const i64 far = AHEAD * line < 2 * n ? AHEAD * line : 2 * n;
    at = w + far, left = n - far;
    while (left <= 0) left += n, at += turn;
  }
  FN void touch(const Ahead& x, int rows, i64 step) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) __builtin_prefetch(x.at + r * step);
  }
  void advance() {
    at += line, left -= line;
    if (left <= 0) left += n, at += turn;
  }
};

// NP pairs of columns from R rows of w, `step` apart, onto MR rows of acc, which keeps the order of T::pair; row r is
// k = r * gap of act.
template <class T, int MR, int NP, int R>
FN void stream_pairs(const f32* act, i64 lda, i64 gap, const typename T::mem* w, i64 step, f32* acc, i64 ldc,
                     bool first) {
  vf s[MR][2 * NP];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * NP; ++j) s[m][j] = first ? vf{} : load_v(acc + m * ldc + j * W);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < NP; ++p) {
      vf a, b;
      T::pair(w + r * step + p * PAIR, a, b);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const f32 x = act[m * lda + r * gap];
        s[m][2 * p] += a * x;
        s[m][2 * p + 1] += b * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * NP; ++j) store_v(acc + m * ldc + j * W, s[m][j]);
}

// R rows of w, the first of the next R is `next` elements on: R parallel streams. One row of acc takes two pairs at a time, so that the additions do not wait.
template <class T, int MR, int R>
static void stream_rows(i64 n, const f32* act, i64 lda, i64 gap, const typename T::mem* w, i64 step, i64 next, f32* acc,
                        i64 ldc, bool first) {
  constexpr int NP = MR == 1 ? 2 : 1;
  Ahead<T> ahead(w, n, next);
  i64 c = 0;
  for (; c + NP * PAIR <= n; c += NP * PAIR) {
    for (i64 l = -c & (Ahead<T>::line - 1); R > 1 && l < NP * PAIR; l += Ahead<T>::line)
      Ahead<T>::touch(ahead, R, step), ahead.advance();
    stream_pairs<T, MR, NP, R>(act, lda, gap, w + c, step, acc + c, ldc, first);
  }
  if (c < n) stream_pairs<T, MR, 1, R>(act, lda, gap, w + c, step, acc + c, ldc, first);
}

template <class T, int MR>
static void stream_block(i64 n, i64 k_all, const f32* act, i64 lda, const typename T::mem* w, i64 step, Order o,
                         f32* acc, i64 ldc) {
  for (i64 b = 0; b < o.blocks; ++b)
    stream_rows<T, MR, STREAMS>(n, act + b * o.next, lda, o.gap, w + b * o.next * step, o.gap * step, o.next * step,
                                acc, ldc, b == 0);
  for (i64 k = STREAMS * o.blocks; k < k_all; ++k)
    stream_rows<T, MR, 1>(n, act + k, lda, 1, w + k * step, step, step, acc, ldc, k == 0);
  for (int m = 0; m < MR; ++m)
    for (i64 c = 0; c < n; c += PAIR) {
      f32* p = acc + m * ldc + c;
      T::end(p, load_v(p), load_v(p + W));
    }
}

// A few rows, columns contiguous: w is read once, in place.
template <class T>
static void stream_columns(int rows, i64 n, i64 k_all, const f32* act, i64 lda, const Matrix& x, Order o, f32* acc,
                           i64 ldc, f32* panel) {
  const auto* w = reinterpret_cast<const typename T::mem*>(x.w);
  const i64 whole = n / PAIR * PAIR;
  switch (whole ? rows : 0) {
    case 0: break;
    case 1: stream_block<T, 1>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc); break;
    case 2: stream_block<T, 2>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc); break;
    case 3: stream_block<T, 3>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc); break;
    case 4: stream_block<T, 4>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc); break;
    case 5: stream_block<T, 5>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc); break;
    default: stream_block<T, 6>(whole, k_all, act, lda, w, x.stride_k, o, acc, ldc);
  }
  if (whole < n) panels(rows, whole, n, k_all, act, lda, x, o, acc, ldc, panel);
}

constexpr int LANES = static_cast<int>(abi::LANES), PARTS = LANES / W;  // vectors of one dot product

// k contiguous: LANES elements of a row of w, in the order in which `act` was prepared for this type.
struct DotF32 {
  typedef f32 mem;
  FN void load(const mem* p, vf* v) {
    for (int i = 0; i < PARTS; ++i) v[i] = load_v(p + i * W);
  }
  FN f32 sum(vf* v) {
    for (int half = PARTS / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return fold(v[0]);
  }
};
#if MPK_W == 16
struct DotBF16 {
  typedef uint16_t mem;
  FN void load(const mem* p, vf* v) {
    v[0] = reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vhu*>(p), vu) << 16);
  }
  FN f32 sum(vf* v) { return fold(v[0]); }
};
#else
struct DotBF16 {  // even, odd elements of each pair of vectors: act is de-interleaved once, w is widened in place
  typedef uint16_t mem;
  FN void load(const mem* p, vf* v) {
    for (int i = 0; i < PARTS; i += 2) ColBF16::pair(p + i * W, v[i], v[i + 1]);
  }
  FN f32 sum(vf* v) {
    for (int half = PARTS / 2; half > 1; half /= 2)
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return fold(v[0]) + fold(v[1]);
  }
};
#endif

// MR rows by NR columns of dot products over k in whole groups of LANES (act is padded with zeros; so is the last
// group of w, which is copied out).
template <class T, int MR, int NR>
static void dot_block(i64 k_all, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc) {
  vf c[MR][NR][PARTS] = {};
  const auto group = [&](i64 k, const typename T::mem* at, i64 stride) __attribute__((always_inline)) {
    vf a[MR][PARTS];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) a[m][i] = load_v(act + m * lda + k + i * W);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      vf b[PARTS];
      T::load(at + j * stride, b);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) c[m][j][i] += a[m][i] * b[i];
    }
  };
  // Coming rows of w, one line at a time: a prefetcher starts anew at every row, and rows are short. With several rows
  // of act they are the shortest: keys of an attention head.
  constexpr i64 LINE = 64 / sizeof(typename T::mem), AHEAD = MR == 1 ? NR : 16;
  i64 k = 0;
  for (; k + LANES <= k_all; k += LANES) {
    if (k % LINE == 0)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) __builtin_prefetch(w + (AHEAD + j) * step + k);
    group(k, w + k, step);
  }
  if (k < k_all) {
    typename T::mem tail[NR * LANES] = {};
    for (int j = 0; j < NR; ++j)
      for (i64 i = 0; k + i < k_all; ++i) tail[j * LANES + i] = w[j * step + k + i];
    group(k, tail, LANES);
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[m * ldc + j] = T::sum(c[m][j]);
}

template <class T, int NR>
static void dot_rows(i64 rows, i64 k, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc) {
  for (; rows >= 3; rows -= 3, act += 3 * lda, acc += 3 * ldc) dot_block<T, 3, NR>(k, act, lda, w, step, acc, ldc);
  if (rows == 2) dot_block<T, 2, NR>(k, act, lda, w, step, acc, ldc);
  if (rows == 1) dot_block<T, 1, NR>(k, act, lda, w, step, acc, ldc);
}

constexpr i64 DOT_ROWS = PANEL_ROWS;  // rows of act that stay in the cache while w passes by

template <class T>
static void dots(i64 rows, i64 n, i64 k, const f32* act, i64 lda, const Matrix& x, f32* acc, i64 ldc, f32* panel) {
  const auto* w = reinterpret_cast<const typename T::mem*>(x.w);
  const i64 padded = (k + LANES - 1) / LANES * LANES;
  constexpr bool swap = sizeof(typename T::mem) == 2 && W < 16;
  for (i64 m0 = 0; m0 < rows; m0 += DOT_ROWS, act += DOT_ROWS * lda, acc += DOT_ROWS * ldc) {
    const i64 r = rows - m0 < DOT_ROWS ? rows - m0 : DOT_ROWS;
    const f32* a = act;
    i64 la = lda;
    if (swap || padded != k) {  // prepare act: zeros up to a whole group, and the order of DotBF16
      for (i64 m = 0; m < r; ++m) {
        f32* d = panel + m * padded;
        for (i64 i = 0; i < k; ++i) d[i] = act[m * lda + i];
        for (i64 i = k; i < padded; ++i) d[i] = 0.f;
        for (i64 i = 0; swap && i < padded; i += PAIR) {
          vf even, odd;
          ColBF16::begin(d + i, even, odd);
          store_v(d + i, even), store_v(d + i + W, odd);
        }
      }
      a = panel, la = padded;
    }
    i64 c = 0;
    if (r == 1)
      for (; c + 4 <= n; c += 4) dot_block<T, 1, 4>(k, a, la, w + c * x.stride_n, x.stride_n, acc + c, ldc);
    for (; c + 2 <= n; c += 2) dot_rows<T, 2>(r, k, a, la, w + c * x.stride_n, x.stride_n, acc + c, ldc);
    if (c < n) dot_rows<T, 1>(r, k, a, la, w + c * x.stride_n, x.stride_n, acc + c, ldc);
  }
}

// `o`: the order of k where the layout does not fix it.
static void gemm(i64 rows, i64 n, i64 k, const f32* act, i64 lda, const Matrix& x, Order o, f32* acc, i64 ldc,
                 f32* panel) {
  const auto dt = static_cast<abi::Dtype>(x.dtype);
  if (x.stride_k == 1 && x.stride_n != 1) {
    if (dt == abi::Dtype::F32) return dots<DotF32>(rows, n, k, act, lda, x, acc, ldc, panel);
    if (dt == abi::Dtype::BF16) return dots<DotBF16>(rows, n, k, act, lda, x, acc, ldc, panel);
  }
  if (x.stride_n == 1 && rows <= ROWS) {
    if (dt == abi::Dtype::F32)
      return stream_columns<ColF32>(static_cast<int>(rows), n, k, act, lda, x, o, acc, ldc, panel);
    if (dt == abi::Dtype::BF16)
      return stream_columns<ColBF16>(static_cast<int>(rows), n, k, act, lda, x, o, acc, ldc, panel);
  }
  panels(rows, 0, n, k, act, lda, x, o, acc, ldc, panel);
}
