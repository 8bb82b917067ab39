// acc[m][n] = sum over k of act[m][k] * w[n][k] in 32-bit integers: exact modulo 2**32, so in any order.
//
// w is packed into panels of 32-bit words, [k][PAIR]. Where everything fits into 16 bits, a word holds two values of k,
// which one instruction multiplies and adds; otherwise it holds one.
#pragma once

// The sum of the products of the signed halves of each word.
FN vu pairs_product(vu a, vu b) {
#if MPK_W == 16 && defined(__AVX512BW__)
  return reinterpret_cast<vu>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif MPK_W == 8 && defined(__AVX2__)
  return reinterpret_cast<vu>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif MPK_W == 4 && defined(__SSE2__)
  return reinterpret_cast<vu>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  typedef i32 vi __attribute__((vector_size(MPK_W * 4)));
  const vi x = reinterpret_cast<vi>(a), y = reinterpret_cast<vi>(b);
  const vu low = reinterpret_cast<vu>(reinterpret_cast<vi>(a << 16) >> 16) *
                 reinterpret_cast<vu>(reinterpret_cast<vi>(b << 16) >> 16);
  return low + reinterpret_cast<vu>(x >> 16) * reinterpret_cast<vu>(y >> 16);
#endif
}

FN u32 two(u32 low, u32 high) { return (low & 0xffffu) | high << 16; }

typedef u32 vul __attribute__((vector_size(MPK_W * 4), aligned(4), may_alias));
FN vu load_words(const u32* p) { return *reinterpret_cast<const vul*>(p); }
FN void store_words(u32* p, vu v) { *reinterpret_cast<vul*>(p) = v; }

// MR rows by one pair of columns of a panel of `kc` words a column: acc goes on from what it has unless `first`.
template <int MR, bool TWO>
static void word_block(i64 kc, const u32* act, i64 lda, const u32* w, u32* acc, i64 ldc, bool first) {
  vu s[MR][2];
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < 2; ++j) s[m][j] = first ? vu{} : load_words(acc + m * ldc + j * W);
  for (i64 k = 0; k < kc; ++k, w += PAIR) {
    const vu a = load_words(w), b = load_words(w + W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const vu x = vu{} + act[m * lda + k];
      s[m][0] += TWO ? pairs_product(a, x) : a * x;
      s[m][1] += TWO ? pairs_product(b, x) : b * x;
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < 2; ++j) store_words(acc + m * ldc + j * W, s[m][j]);
}

template <bool TWO>
static void word_rows(int rows, i64 kc, const u32* act, i64 lda, const u32* w, u32* acc, i64 ldc, bool first) {
  switch (rows) {
    case 1: word_block<1, TWO>(kc, act, lda, w, acc, ldc, first); break;
    case 2: word_block<2, TWO>(kc, act, lda, w, acc, ldc, first); break;
    case 3: word_block<3, TWO>(kc, act, lda, w, acc, ldc, first); break;
    case 4: word_block<4, TWO>(kc, act, lda, w, acc, ldc, first); break;
    case 5: word_block<5, TWO>(kc, act, lda, w, acc, ldc, first); break;
    default: word_block<6, TWO>(kc, act, lda, w, acc, ldc, first);
  }
}

// `n` columns of `k` elements from w on, as words [k / (TWO ? 2 : 1)][PAIR] a pair of vectors; zeros beyond both.
template <bool TWO>
static void pack_words(const Matrix& x, const char* w, i64 k, int n, u32* panel) {
  constexpr int EACH = TWO ? 2 : 1;
  const i64 kc = (k + EACH - 1) / EACH, size = size_of(x.dtype);
  for (int p = 0; p * PAIR < n; ++p, panel += kc * PAIR, w += PAIR * x.stride_n * size) {
    const int m = n - p * PAIR < PAIR ? n - p * PAIR : PAIR;
    if (m < PAIR) __builtin_memset(panel, 0, sizeof(u32) * PAIR * static_cast<size_t>(kc));
    if (x.stride_k == 1 && x.stride_n != 1) {  // a column at a time, as it lies
      u32 column[EACH * PANEL_K + 1];
      for (int c = 0; c < m; ++c) {
        load_any(x.dtype, column, w + c * x.stride_n * size, Lanes{1, nullptr}, static_cast<int>(k));
        column[k] = 0;
        for (i64 i = 0; i < kc; ++i) panel[i * PAIR + c] = TWO ? two(column[2 * i], column[2 * i + 1]) : column[i];
      }
      continue;
    }
    u32 row[EACH][PAIR];
    for (i64 i = 0; i < kc; ++i) {
      for (int e = 0; e < EACH; ++e) {
        if (EACH * i + e < k)
          load_any(x.dtype, row[e], w + (EACH * i + e) * x.stride_k * size, Lanes{x.stride_n, nullptr}, m);
        else __builtin_memset(row[e], 0, sizeof row[e]);
      }
      LOOP (int c = 0; c < m; ++c) panel[i * PAIR + c] = TWO ? two(row[0][c], row[EACH - 1][c]) : row[0][c];
    }
  }
}

template <bool TWO>
static void word_panels(i64 rows, i64 n, i64 k_all, const u32* act, i64 lda, const Matrix& x, u32* acc, i64 ldc,
                        u32* panel) {
  constexpr int EACH = TWO ? 2 : 1;
  u32 edge[ROWS * PAIR];
  for (i64 k0 = 0; k0 < k_all; k0 += EACH * PANEL_K) {
    const i64 k = k_all - k0 < EACH * PANEL_K ? k_all - k0 : EACH * PANEL_K, kc = (k + EACH - 1) / EACH;
    for (i64 c = 0; c < n; c += 2 * PAIR) {
      const int wide = n - c < 2 * PAIR ? static_cast<int>(n - c) : 2 * PAIR;
      pack_words<TWO>(x, x.w + (c * x.stride_n + k0 * x.stride_k) * size_of(x.dtype), k, wide, panel);
      for (int p = 0; p * PAIR < wide; ++p) {
        const int columns = wide - p * PAIR < PAIR ? wide - p * PAIR : PAIR;
        const u32* w = panel + p * kc * PAIR;
        for (i64 m = 0; m < rows; m += ROWS) {
          const int r = rows - m < ROWS ? static_cast<int>(rows - m) : ROWS;
          const u32* a = act + m * lda + k0 / EACH;
          u32* out = acc + m * ldc + c + p * PAIR;
          if (columns == PAIR) {
            word_rows<TWO>(r, kc, a, lda, w, out, ldc, k0 == 0);
            continue;
          }
          for (int i = 0; i < r; ++i)
            for (int j = 0; j < PAIR; ++j) edge[i * PAIR + j] = k0 && j < columns ? out[i * ldc + j] : 0;
          word_rows<TWO>(r, kc, a, lda, w, edge, PAIR, k0 == 0);
          for (int i = 0; i < r; ++i)
            for (int j = 0; j < columns; ++j) out[i * ldc + j] = edge[i * PAIR + j];
        }
      }
    }
  }
}

// A few rows of ACT: w is read once a row, as it lies, along k or along its columns (one of its strides is 1).
template <class T>
static void word_stream(i64 rows, i64 n, i64 k_all, const u32* act, i64 lda, const Matrix& x, u32* acc, i64 ldc) {
  const auto* w = reinterpret_cast<const typename T::mem*>(x.w);
  for (i64 m = 0; m < rows; ++m, act += lda, acc += ldc) {
    if (x.stride_k == 1) {
      for (i64 c = 0; c < n; ++c) {
        const auto* column = w + c * x.stride_n;
        u32 sum = 0;
        LOOP (i64 k = 0; k < k_all; ++k) sum += act[k] * T::get(column[k]);
        acc[c] = sum;
      }
      continue;
    }
    constexpr int R = 4;
    for (i64 c = 0; c < n; ++c) acc[c] = 0;
    i64 k = 0;
    for (; k + R <= k_all; k += R) {
      const auto *a = w + k * x.stride_k, *b = a + x.stride_k, *p = b + x.stride_k, *q = p + x.stride_k;
      LOOP (i64 c = 0; c < n; ++c)
        acc[c] +=
            act[k] * T::get(a[c]) + act[k + 1] * T::get(b[c]) + act[k + 2] * T::get(p[c]) + act[k + 3] * T::get(q[c]);
    }
    for (; k < k_all; ++k) {
      const auto* a = w + k * x.stride_k;
      LOOP (i64 c = 0; c < n; ++c) acc[c] += act[k] * T::get(a[c]);
    }
  }
}

// Whether every element is a signed number of 16 bits.
static bool narrow(const i32* x, i64 n) {
  u32 wide = 0;
  LOOP (i64 i = 0; i < n; ++i) wide |= (static_cast<u32>(x[i]) + 0x8000u) & 0xffff0000u;
  return !wide;
}

// `panel` has room for PANEL_K * PANEL_N words, and behind them for rows * (k + 1) / 2.
static void gemm_int(i64 rows, i64 n, i64 k, const i32* act, i64 lda, const Matrix& x, i32* acc, i64 ldc, f32* panel) {
  const auto dt = static_cast<abi::Dtype>(x.dtype);
  u32 *words = reinterpret_cast<u32*>(panel), *out = reinterpret_cast<u32*>(acc);
  if (rows <= 2 && (x.stride_k == 1 || x.stride_n == 1)) {
#define CALL(T) return word_stream<T>(rows, n, k, reinterpret_cast<const u32*>(act), lda, x, out, ldc)
    BY_DTYPE(x.dtype, CALL)
#undef CALL
  }
  const bool small = dt != abi::Dtype::I32 && dt != abi::Dtype::U32 && dt != abi::Dtype::U16;
  if (!small || !narrow(act, rows * lda))
    return word_panels<false>(rows, n, k, reinterpret_cast<const u32*>(act), lda, x, out, ldc, words);
  u32* twos = words + PANEL_K * PANEL_N;
  const i64 half = (k + 1) / 2;
  for (i64 m = 0; m < rows; ++m) {
    const u32* from = reinterpret_cast<const u32*>(act) + m * lda;
    for (i64 i = 0; i < k / 2; ++i) twos[m * half + i] = two(from[2 * i], from[2 * i + 1]);
    if (k % 2) twos[m * half + half - 1] = two(from[k - 1], 0);
  }
  word_panels<true>(rows, n, k, twos, half, x, out, ldc, words);
}
