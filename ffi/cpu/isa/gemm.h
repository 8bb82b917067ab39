// acc[m][n] = sum over k of act[m][k] * w[n][k] in f32: the inner loops of contractions and of attention.
//
// Three layouts of w, three fixed orders of summation, none of which depends on the tile, on the number of rows or on
// the vector width (the compiler contracts each product and sum to one FMA where the processor has it):
//   columns contiguous   every element is one chain over k = 0, 1, 2, ...
//   k contiguous         LANES chains over k % LANES, combined pairwise
//   anything else        as columns contiguous, through a packed panel
// A few rows read w in place, so that a decode step streams it from memory with prefetches; many rows share panels of
// w that were widened to f32 once.
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

// Columns in memory. A pair of vectors may hold its columns in any order that `begin` and `end` translate.
struct ColF32 {
  typedef f32 mem;
  FN void pair(const mem* p, vf& a, vf& b) { a = load_v(p), b = load_v(p + W); }
  FN void begin(const f32* p, vf& a, vf& b) { a = load_v(p), b = load_v(p + W); }
  FN void end(f32* p, vf a, vf b) { store_v(p, a), store_v(p + W, b); }
  FN vf one(const mem* p) { return load_v(p); }
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
  FN vf one(const mem* p) { return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vhu*>(p), vu) << 16); }
};

struct Matrix {  // w: element (n, k) at w + n * stride_n + k * stride_k
  const char* w;
  uint8_t dtype;
  i64 stride_n, stride_k;
};

// MR rows by NP pairs of columns, k in [0, kc): acc goes on from what it has unless `first`.
template <class T, int MR, int NP>
static void columns_block(i64 kc, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc, bool first, i64 ahead) {
  vf c[MR][2 * NP];
  for (int m = 0; m < MR; ++m)
    for (int p = 0; p < NP; ++p) {
      if (first) c[m][2 * p] = c[m][2 * p + 1] = vf{};
      else T::begin(acc + m * ldc + p * PAIR, c[m][2 * p], c[m][2 * p + 1]);
    }
  constexpr int bytes = NP * PAIR * static_cast<int>(sizeof(typename T::mem));
  for (i64 k = 0; k < kc; ++k, w += step) {
    if (ahead) {
      const char* next = reinterpret_cast<const char*>(w + ahead);
#pragma GCC unroll 8
      for (int b = 0; b < bytes; b += 64) __builtin_prefetch(next + b);
    }
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
      vf a, b;
      T::pair(w + p * PAIR, a, b);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const f32 x = act[m * lda + k];
        c[m][2 * p] += a * x;
        c[m][2 * p + 1] += b * x;
      }
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int p = 0; p < NP; ++p) T::end(acc + m * ldc + p * PAIR, c[m][2 * p], c[m][2 * p + 1]);
}

template <class T, int NP>
static void columns_rows(int rows, i64 kc, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc, bool first, i64 ahead) {
  switch (rows) {
    case 1: columns_block<T, 1, NP>(kc, act, lda, w, step, acc, ldc, first, ahead); break;
    case 2: columns_block<T, 2, NP>(kc, act, lda, w, step, acc, ldc, first, ahead); break;
    case 3: columns_block<T, 3, NP>(kc, act, lda, w, step, acc, ldc, first, ahead); break;
    case 4: columns_block<T, 4, NP>(kc, act, lda, w, step, acc, ldc, first, ahead); break;
    case 5: columns_block<T, 5, NP>(kc, act, lda, w, step, acc, ldc, first, ahead); break;
    default: columns_block<T, 6, NP>(kc, act, lda, w, step, acc, ldc, first, ahead);
  }
}

// Columns [c0, c1) through panels of one pair, k in blocks of PANEL_K. Any layout, any number of rows.
static void panels(i64 rows, i64 c0, i64 c1, i64 k_all, const f32* act, i64 lda, const Matrix& x, f32* acc, i64 ldc, f32* panel) {
  f32 edge[ROWS * PAIR];
  u32* lanes = reinterpret_cast<u32*>(panel);
  const int size = size_of(x.dtype);
  for (i64 k0 = 0; k0 < k_all; k0 += PANEL_K) {
    const i64 kc = k_all - k0 < PANEL_K ? k_all - k0 : PANEL_K;
    for (i64 c = c0; c < c1; c += PAIR) {
      const int n = c1 - c < PAIR ? static_cast<int>(c1 - c) : PAIR;
      const char* w = x.w + (c * x.stride_n + k0 * x.stride_k) * size;
      if (n < PAIR) __builtin_memset(panel, 0, sizeof(f32) * PAIR * static_cast<size_t>(kc));
      for (i64 k = 0; k < kc; ++k) load_any(x.dtype, lanes + k * PAIR, w + k * x.stride_k * size, Lanes{x.stride_n, nullptr}, n);
      for (i64 m = 0; m < rows; m += ROWS) {
        const int r = rows - m < ROWS ? static_cast<int>(rows - m) : ROWS;
        const f32* a = act + m * lda + k0;
        f32* out = acc + m * ldc + c;
        if (n == PAIR) {
          columns_rows<ColF32, 1>(r, kc, a, lda, panel, PAIR, out, ldc, k0 == 0, 0);
          continue;
        }
        for (int i = 0; i < r; ++i)
          for (int j = 0; j < n; ++j) edge[i * PAIR + j] = k0 ? out[i * ldc + j] : 0.f;
        columns_rows<ColF32, 1>(r, kc, a, lda, panel, PAIR, edge, PAIR, k0 == 0, 0);
        for (int i = 0; i < r; ++i)
          for (int j = 0; j < n; ++j) out[i * ldc + j] = edge[i * PAIR + j];
      }
    }
  }
}

// A few rows, columns contiguous: streams w in place. Rows of w come in blocks, so that every page is visited once.
template <class T>
static void stream_columns(int rows, i64 n, i64 k_all, const f32* act, i64 lda, const Matrix& x, f32* acc, i64 ldc, f32* panel) {
  const auto* w = reinterpret_cast<const typename T::mem*>(x.w);
  const int wide = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  const i64 whole = n / PAIR * PAIR, block = whole <= wide * PAIR ? k_all : MPK_BLOCK_K;
  for (i64 k = 0; k < k_all; k += block) {
    const i64 kc = k_all - k < block ? k_all - k : block;
    const i64 ahead = (block < k_all ? block : MPK_AHEAD_K) * x.stride_k;
    for (i64 c = 0; c < whole;) {
      const auto* at = w + k * x.stride_k + c;
      const f32* a = act + k;
      if (wide == 4 && whole - c >= 4 * PAIR) columns_block<T, 1, 4>(kc, a, lda, at, x.stride_k, acc + c, ldc, k == 0, ahead), c += 4 * PAIR;
      else if (wide >= 2 && whole - c >= 2 * PAIR) columns_rows<T, 2>(rows, kc, a, lda, at, x.stride_k, acc + c, ldc, k == 0, ahead), c += 2 * PAIR;
      else columns_rows<T, 1>(rows, kc, a, lda, at, x.stride_k, acc + c, ldc, k == 0, ahead), c += PAIR;
    }
  }
  if (whole < n) panels(rows, whole, n, k_all, act, lda, x, acc, ldc, panel);
}

constexpr int PARTS = static_cast<int>(abi::LANES) / W;  // vectors of one dot product

// MR rows by NR columns, k contiguous.
template <class T, int MR, int NR>
static void dot_block(i64 k_all, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc) {
  constexpr int L = static_cast<int>(abi::LANES);
  vf c[MR][NR][PARTS] = {};
  i64 k = 0;
  for (; k + L <= k_all; k += L) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      vf a[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) a[m] = load_v(act + m * lda + k + part * W);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        const vf b = T::one(w + j * step + k + part * W);
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) c[m][j][part] += a[m] * b;
      }
    }
  }
  if (k < k_all) {  // the rest, padded with zeros
    typename T::mem tail_w[L];
    f32 tail_a[L];
    for (int j = 0; j < NR; ++j)
      for (int m = 0; m < MR; ++m) {
        for (int i = 0; i < L; ++i) tail_w[i] = k + i < k_all ? w[j * step + k + i] : 0, tail_a[i] = k + i < k_all ? act[m * lda + k + i] : 0.f;
        for (int part = 0; part < PARTS; ++part) c[m][j][part] += load_v(tail_a + part * W) * T::one(tail_w + part * W);
      }
  }
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < NR; ++j) {
      f32 p[L];
      for (int part = 0; part < PARTS; ++part) store_v(p + part * W, c[m][j][part]);
      for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) p[i] += p[i + half];
      acc[m * ldc + j] = p[0];
    }
}

template <class T, int NR>
static void dot_rows(i64 rows, i64 k, const f32* act, i64 lda, const typename T::mem* w, i64 step, f32* acc, i64 ldc) {
  for (; rows >= 3; rows -= 3, act += 3 * lda, acc += 3 * ldc) dot_block<T, 3, NR>(k, act, lda, w, step, acc, ldc);
  if (rows == 2) dot_block<T, 2, NR>(k, act, lda, w, step, acc, ldc);
  if (rows == 1) dot_block<T, 1, NR>(k, act, lda, w, step, acc, ldc);
}

template <class T>
static void dots(i64 rows, i64 n, i64 k, const f32* act, i64 lda, const Matrix& x, f32* acc, i64 ldc, f32* panel) {
  const auto* w = reinterpret_cast<const typename T::mem*>(x.w);
  if (rows == 1) {
    i64 c = 0;
    for (; c + 4 <= n; c += 4) dot_block<T, 1, 4>(k, act, lda, w + c * x.stride_n, x.stride_n, acc + c, ldc);
    for (; c < n; ++c) dot_block<T, 1, 1>(k, act, lda, w + c * x.stride_n, x.stride_n, acc + c, ldc);
    return;
  }
  constexpr i64 kBlock = 24;  // rows of act that stay in the cache while w passes by
  for (i64 m = 0; m < rows; m += kBlock) {
    const i64 r = rows - m < kBlock ? rows - m : kBlock;
    const f32* a = act + m * lda;
    f32* out = acc + m * ldc;
    for (i64 c = 0; c < n; c += 2) {
      const int pair = n - c < 2 ? 1 : 2;
      const auto* at = w + c * x.stride_n;
      if (r > 3 && sizeof(typename T::mem) < 4) {
        for (int j = 0; j < pair; ++j) load_any(x.dtype, reinterpret_cast<u32*>(panel + j * k), reinterpret_cast<const char*>(at + j * x.stride_n), Lanes{1, nullptr}, static_cast<int>(k));
        if (pair == 2) dot_rows<ColF32, 2>(r, k, a, lda, panel, k, out + c, ldc);
        else dot_rows<ColF32, 1>(r, k, a, lda, panel, k, out + c, ldc);
      } else if (pair == 2) {
        dot_rows<T, 2>(r, k, a, lda, at, x.stride_n, out + c, ldc);
      } else {
        dot_rows<T, 1>(r, k, a, lda, at, x.stride_n, out + c, ldc);
      }
    }
  }
}

static void gemm(i64 rows, i64 n, i64 k, const f32* act, i64 lda, const Matrix& x, f32* acc, i64 ldc, f32* panel) {
  const auto dt = static_cast<abi::Dtype>(x.dtype);
  if (x.stride_k == 1 && x.stride_n != 1) {
    if (dt == abi::Dtype::F32) return dots<ColF32>(rows, n, k, act, lda, x, acc, ldc, panel);
    if (dt == abi::Dtype::BF16) return dots<ColBF16>(rows, n, k, act, lda, x, acc, ldc, panel);
  }
  if (x.stride_n == 1 && rows <= ROWS) {
    if (dt == abi::Dtype::F32) return stream_columns<ColF32>(static_cast<int>(rows), n, k, act, lda, x, acc, ldc, panel);
    if (dt == abi::Dtype::BF16) return stream_columns<ColBF16>(static_cast<int>(rows), n, k, act, lda, x, acc, ldc, panel);
  }
  panels(rows, 0, n, k, act, lda, x, acc, ldc, panel);
}

// Integers: exact modulo 2**32, so in any order.
static void gemm_int(i64 rows, i64 n, i64 k, const i32* act, i64 lda, const Matrix& x, i32* acc, i64 ldc, f32* panel) {
  u32* w = reinterpret_cast<u32*>(panel);
  for (i64 c = 0; c < n; ++c) {
    load_any(x.dtype, w, x.w + c * x.stride_n * size_of(x.dtype), Lanes{x.stride_k, nullptr}, static_cast<int>(k));
    for (i64 m = 0; m < rows; ++m) {
      u32 sum = 0;
      for (i64 i = 0; i < k; ++i) sum += static_cast<u32>(act[m * lda + i]) * w[i];
      acc[m * ldc + c] = static_cast<i32>(sum);
    }
  }
}
