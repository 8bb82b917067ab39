// The instructions of the bytecode, one function each, on register bits. Names and meaning: Opcode in jax_mpk/abi.
#pragma once

namespace mpk {

// clang-format off
#define MPK_F1(NAME, EXPR) __device__ __forceinline__ u32 NAME(u32 xa) { float a = f(xa); return b(EXPR); }
#define MPK_F2(NAME, EXPR) __device__ __forceinline__ u32 NAME(u32 xa, u32 xb) { float a = f(xa), c = f(xb); return b(EXPR); }
#define MPK_FC(NAME, EXPR) __device__ __forceinline__ u32 NAME(u32 xa, u32 xb) { float a = f(xa), c = f(xb); return (EXPR); }
#define MPK_I1(NAME, EXPR) __device__ __forceinline__ u32 NAME(u32 x) { int a = (int)x; (void)a; return (u32)(EXPR); }
#define MPK_I2(NAME, EXPR) \
  __device__ __forceinline__ u32 NAME(u32 x, u32 y) { int a = (int)x, c = (int)y; (void)a; (void)c; return (u32)(EXPR); }
// clang-format on

__device__ __forceinline__ u32 MOVE(u32 x) { return x; }
__device__ __forceinline__ u32 SELECT(u32 p, u32 x, u32 y) { return p ? x : y; }

MPK_F1(F_NEG, -a)
MPK_F1(F_ABS, fabsf(a))
MPK_F1(F_EXP, expf(a))
MPK_F1(F_EXP2, exp2f(a))
MPK_F1(F_EXPM1, expm1f(a))
MPK_F1(F_LOG, logf(a))
MPK_F1(F_LOG1P, log1pf(a))
MPK_F1(F_SQRT, sqrtf(a))
MPK_F1(F_RSQRT, rsqrtf(a))
MPK_F1(F_CBRT, cbrtf(a))
MPK_F1(F_TANH, tanhf(a))
MPK_F1(F_TAN, sinf(a) / cosf(a))
MPK_F1(F_LOGISTIC, 1.0f / (1.0f + expf(-a)))
MPK_F1(F_ERF, erff(a))
MPK_F1(F_SIGN, a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a)
MPK_F1(F_FLOOR, floorf(a))
MPK_F1(F_CEIL, ceilf(a))
MPK_F1(F_ROUND_EVEN, rintf(a))
MPK_F1(F_ROUND_AWAY, roundf(a))
MPK_F1(F_ROUND_BF16, bf16_to_f32(f32_to_bf16(a)))
MPK_F1(F_ROUND_F16, f16_to_f32(f32_to_f16(a)))

// sinf and cosf keep a table in local memory, and with it every kernel a stack. x = q * pi / 2 + r, q modulo 4: in three
// steps where that is exact enough; else (Payne and Hanek) the mantissa times those 96 bits of 2 / pi that matter.
__device__ const u32 TWO_OVER_PI[] = {0,          0xa2f9836e, 0x4e441529, 0xfc2757d1,
                                      0xf534ddc0, 0xdb629599, 0x3c439041, 0xfe5163ab};

__device__ __forceinline__ float reduce_large(float x, int& q) {
  const u32 m = (b(x) & 0x7fffff) | 0x800000, at = (b(x) >> 23 & 255) - 120;  // the first bit worth 2 after the product
  const u32* w = TWO_OVER_PI + at / 32;
  const int up = at % 32;
  const auto bits = [&](int n) { return (u32)((((u64)w[n] << 32 | w[n + 1]) << up) >> 32); };
  const u64 low = (u64)bits(2) * m, middle = (u64)bits(1) * m + (low >> 32);
  const u64 product = (u64)(bits(0) * m + (u32)(middle >> 32)) << 32 | (u32)middle;  // modulo 4, in units of 2**-62
  q = (int)((product + (1ull << 61)) >> 62);
  const float r = (float)(i64)(product << 2) * 8.5153039e-20f;  // pi / 2 * 2**-64
  if (x < 0.0f) q = -q;
  return x < 0.0f ? -r : r;
}
__device__ __forceinline__ float reduce_pi(float x, int& q) {
  if (!(fabsf(x) < 1048576.0f)) {
    q = 0;
    return fabsf(x) < __uint_as_float(0x7f800000) ? reduce_large(x, q) : __uint_as_float(0x7fc00000);
  }
  float n = rintf(x * 0.636619772f);
  q = (int)n;
  x = fmaf(n, -1.57079601f, x);
  x = fmaf(n, -3.13916473e-7f, x);
  return fmaf(n, -5.39030253e-15f, x);
}
__device__ __forceinline__ float sine_of_quadrant(float r, int q) {
  float s = r * r;
  float sn = fmaf(fmaf(fmaf(2.86567956e-6f, s, -1.98559923e-4f), s, 8.33338592e-3f), s, -1.66666672e-1f);
  sn = fmaf(sn * s, r, r);
  float cs = fmaf(fmaf(fmaf(2.44677067e-5f, s, -1.38877297e-3f), s, 4.16666567e-2f), s, -0.5f);
  cs = fmaf(cs, s, 1.0f);
  float v = (q & 1) ? cs : sn;
  return (q & 2) ? -v : v;
}
__device__ __forceinline__ u32 F_SIN(u32 x) {
  int q;
  float r = reduce_pi(f(x), q);
  return b(sine_of_quadrant(r, q));
}
__device__ __forceinline__ u32 F_COS(u32 x) {
  int q;
  float r = reduce_pi(f(x), q);
  return b(sine_of_quadrant(r, q + 1));
}

__device__ __forceinline__ u32 F_IS_FINITE(u32 x) { return (x & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ u32 F_TO_I(u32 x) { return (u32)__float2int_rz(f(x)); }  // saturates; NaN gives 0
__device__ __forceinline__ u32 F_TO_U(u32 x) { return __float2uint_rz(f(x)); }
__device__ __forceinline__ u32 F_TO_B(u32 x) { return f(x) != 0.0f; }

// clang-format off: a product is taken for a declaration
MPK_F2(F_ADD, a + c)
MPK_F2(F_SUB, a - c)
MPK_F2(F_MUL, a * c)
MPK_F2(F_DIV, a / c)
MPK_F2(F_REM, fmodf(a, c))
MPK_F2(F_MAX, a != a ? a : c != c ? c : fmaxf(a, c))
MPK_F2(F_MIN, a != a ? a : c != c ? c : fminf(a, c))
MPK_F2(F_POW, powf(a, c))
MPK_F2(F_ATAN2, atan2f(a, c))
MPK_FC(F_LT, a < c)
MPK_FC(F_LE, a <= c)
MPK_FC(F_EQ, a == c)
MPK_FC(F_NE, a != c)
// clang-format on

// f32 to an i32 power, by squaring, as XLA does for integer_pow.
__device__ __forceinline__ u32 F_POW_I(u32 x, u32 y) {
  float a = f(x), r = 1.0f;
  int n = (int)y;
  for (u32 m = n < 0 ? 0u - (u32)n : (u32)n; m; m >>= 1, a *= a)
    if (m & 1) r *= a;
  return b(n < 0 ? 1.0f / r : r);
}

// clang-format off: as above
MPK_I1(I_NEG, 0u - x)
MPK_I1(I_ABS, a < 0 ? 0u - x : x)
MPK_I1(I_SIGN, (a > 0) - (a < 0))
MPK_I1(I_NOT, ~x)
MPK_I1(B_NOT, x == 0)
MPK_I1(I_POPCOUNT, __popc(x))
MPK_I1(I_CLZ, __clz(x))
MPK_I1(I_TO_F, b((float)a))
MPK_I1(U_TO_F, b((float)x))
MPK_I1(I_TO_B, x != 0)
MPK_I1(I_WRAP_I8, (int)(signed char)x)
MPK_I1(I_WRAP_U8, x & 0xff)
MPK_I1(I_WRAP_I16, (int)(short)x)
MPK_I1(I_WRAP_U16, x & 0xffff)
MPK_I2(I_ADD, x + y)
MPK_I2(I_SUB, x - y)
MPK_I2(I_MUL, x * y)
MPK_I2(I_DIV, c == 0 ? -1 : c == -1 ? (int)(0u - x) : a / c)
MPK_I2(U_DIV, y == 0 ? ~0u : x / y)
MPK_I2(I_REM, c == 0 ? a : c == -1 ? 0 : a % c)
MPK_I2(U_REM, y == 0 ? x : x % y)
MPK_I2(I_MAX, max(a, c))
MPK_I2(U_MAX, max(x, y))
MPK_I2(I_MIN, min(a, c))
MPK_I2(U_MIN, min(x, y))
MPK_I2(I_AND, x & y)
MPK_I2(I_OR, x | y)
MPK_I2(I_XOR, x ^ y)
MPK_I2(I_SHL, y < 32 ? x << y : 0u)
MPK_I2(I_SHR, y < 32 ? x >> y : 0u)
MPK_I2(I_SAR, a >> (y < 32 ? y : 31u))
MPK_I2(I_LT, a < c)
MPK_I2(U_LT, x < y)
MPK_I2(I_LE, a <= c)
MPK_I2(U_LE, x <= y)
MPK_I2(I_EQ, x == y)
MPK_I2(I_NE, x != y)
// clang-format on
__device__ __forceinline__ u32 I_POW(u32 a, u32 n) {
  u32 r = 1;
  if ((int)n < 0) return a == 1 ? 1u : a == ~0u ? ((n & 1) ? a : 1u) : 0u;
  for (; n; n >>= 1, a *= a)
    if (n & 1) r *= a;
  return r;
}

#undef MPK_F1
#undef MPK_F2
#undef MPK_FC
#undef MPK_I1
#undef MPK_I2

}  // namespace mpk
