// Elementary functions of one lane, branch-free so that loops over them vectorise: about 2 ulp, exact at 0, inf and NaN.
//
// Included once per instruction set, inside its namespace. Polynomials are Chebyshev fits of this project; arguments
// are reduced in the usual ways (powers of two for exp and log, quadrants in double precision for sin and cos).
#pragma once

#define FN static inline __attribute__((always_inline))

typedef float f32;
typedef double f64;
typedef int32_t i32;
typedef uint32_t u32;

FN f32 as_f(u32 x) {
  f32 y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
FN u32 as_u(f32 x) {
  u32 y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
FN f64 as_d(uint64_t x) {
  f64 y;
  __builtin_memcpy(&y, &x, 8);
  return y;
}
FN uint64_t as_q(f64 x) {
  uint64_t y;
  __builtin_memcpy(&y, &x, 8);
  return y;
}

constexpr f32 INF = __builtin_inff();

FN f32 fabs_(f32 x) { return as_f(as_u(x) & 0x7fffffffu); }
FN f32 copysign_(f32 x, f32 sign) { return as_f((as_u(x) & 0x7fffffffu) | (as_u(sign) & 0x80000000u)); }
// Nearest integer for |x| < 2**22: the sum has unit spacing.
FN f32 near_(f32 x) { return (x + 12582912.f) - 12582912.f; }
FN f32 pow2_(i32 n) { return as_f(static_cast<u32>(n + 127) << 23); }

FN f32 expm1_poly(f32 r) {  // |r| <= ln(2)/2
  const f32 p =
      ((((1.989965444e-4f * r + 1.393393537e-3f) * r + 8.333298025e-3f) * r + 4.166646234e-2f) * r + 1.666666672e-1f) *
          r +
      5.000000014e-1f;
  return r + r * r * p;
}
// y * 2**n for n in [-254, 254], through denormals and infinity.
FN f32 scale_(f32 y, i32 n) {
  const i32 h = n >> 1;
  return y * pow2_(h) * pow2_(n - h);
}

FN f32 exp_(f32 x) {
  x = x > 89.f ? 89.f : x;
  x = x < -104.5f ? -104.5f : x;
  const f32 n = near_(x * 1.44269504f);
  const f32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return scale_(1.f + expm1_poly(r), static_cast<i32>(n));
}
FN f32 exp2_(f32 x) {
  x = x > 129.f ? 129.f : x;
  x = x < -151.f ? -151.f : x;
  const f32 n = near_(x), t = x - n;
  return scale_(1.f + expm1_poly(t * 0.693147182f), static_cast<i32>(n));
}
FN f32 expm1_(f32 x) {
  f32 y = x > 20.f ? 20.f : x;
  y = y < -30.f ? -30.f : y;
  const f32 n = near_(y * 1.44269504f);
  const f32 r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  const f32 s = pow2_(static_cast<i32>(n));
  const f32 small = s * expm1_poly(r) + (s - 1.f);
  const f32 out = x > 20.f ? exp_(x) : small;
  return x == 0.f ? x : out;
}
FN f32 log_(f32 x) {
  const bool tiny = x < 1.17549435e-38f;
  const u32 bits = as_u(tiny ? x * 8388608.f : x);
  const i32 e0 = static_cast<i32>((bits - 0x3f3504f3u) >> 23);  // of the mantissa in [sqrt(1/2), sqrt(2)), modulo 512
  const i32 e = (static_cast<i32>(static_cast<u32>(e0) << 23) >> 23) - (tiny ? 23 : 0);
  const f32 f = as_f(bits - (static_cast<u32>(e0) << 23)) - 1.f;
  const f32 n = static_cast<f32>(e), z = f * f;
  f32 p =
      ((((7.149753884e-2f * f - 1.157120072e-1f) * f + 1.166151107e-1f) * f - 1.241105068e-1f) * f + 1.424993653e-1f);
  p = (((p * f - 1.666848024e-1f) * f + 2.000070748e-1f) * f - 2.499998905e-1f) * f + 3.333333119e-1f;
  f32 y = f * z * p - n * 2.12194440e-4f;
  y = f + (y - 0.5f * z) + n * 0.693359375f;
  y = x == INF ? INF : y;
  y = x == 0.f ? -INF : y;
  y = x < 0.f ? as_f(0x7fc00000u) : y;
  return x != x ? x : y;
}
FN f32 log1p_(f32 x) {
  const f32 u = 1.f + x;
  const f32 fix = u == INF || u <= 0.f ? 0.f : ((u - 1.f) - x) / (u <= 0.f ? 1.f : u);
  const f32 y = log_(u) - fix;
  return u == 1.f ? x : y;
}
FN f32 tanh_(f32 x) {
  const f32 a = fabs_(x), z = x * x;
  const f32 p =
      (((-6.104948007e-3f * z + 2.100364122e-2f) * z - 5.385249747e-2f) * z + 1.333278226e-1f) * z - 3.333332910e-1f;
  const f32 small = x + x * z * p;
  const f32 large = 1.f - 2.f / (exp_(2.f * (a > 20.f ? 20.f : a)) + 1.f);
  return copysign_(a < 0.625f ? small : x != x ? x : large, x);
}
FN f32 logistic_(f32 x) { return 1.f / (1.f + exp_(-x)); }
FN f32 erf_(f32 x) {
  const f32 a = fabs_(x), z = x * x;
  f32 p = ((8.048519777e-5f * z - 8.063365474e-4f) * z + 5.193750885e-3f) * z - 2.685634920e-2f;
  p = ((p * z + 1.128363853e-1f) * z - 3.761262991e-1f) * z + 1.283791662e-1f;
  const f32 t = a > 4.f ? 4.f : a;
  f32 q = ((1.596154118e-6f * t - 4.524880464e-5f) * t + 5.899945932e-4f) * t - 4.727735864e-3f;
  q = ((((q * t + 2.633073033e-2f) * t - 1.099210619e-1f) * t - 6.319950656e-1f) * t - 1.130134342f) * t +
      2.956225193e-4f;
  const f32 large = copysign_(1.f - exp_(q), x);
  const f32 out = a < 0.92f ? x + x * p : large;
  return x != x ? x : out;
}

// The quadrant and the remainder of x modulo pi/2, for |x| up to TRIG_LIMIT.
struct Quadrant {
  f32 r;
  u32 q;
};
FN Quadrant quadrant_(f32 x) {
  const f64 d = x, big = 6755399441055744.0;  // 1.5 * 2**52
  const f64 t = d * 0.63661977236758134308 + big, n = t - big;
  const f64 r = (d - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
  return {static_cast<f32>(r), static_cast<u32>(as_q(t))};
}
FN f32 sin_poly(f32 r, f32 z) {
  return r + r * z * (((2.724840300e-6f * z - 1.984007502e-4f) * z + 8.333331853e-3f) * z - 1.666666666e-1f);
}
FN f32 cos_poly(f32 z) {
  return (1.f - 0.5f * z) +
         z * z * (((-2.729968364e-7f * z + 2.480059056e-5f) * z - 1.388888765e-3f) * z + 4.166666666e-2f);
}
FN f32 sincos_(f32 x, u32 shift) {
  const Quadrant k = quadrant_(x);
  const u32 q = k.q + shift;
  const f32 z = k.r * k.r, s = sin_poly(k.r, z), c = cos_poly(z);
  const f32 y = q & 1 ? c : s;
  const f32 out = as_f(as_u(y) ^ ((q & 2) << 30));
  return fabs_(x) < INF ? out : x - x;
}
FN f32 sin_(f32 x) { return x == 0.f ? x : sincos_(x, 0); }
FN f32 cos_(f32 x) { return sincos_(x, 1); }
FN f32 tan_(f32 x) {
  const Quadrant k = quadrant_(x);
  const f32 z = k.r * k.r, s = sin_poly(k.r, z), c = cos_poly(z);
  const f32 out = k.q & 1 ? -c / s : s / c;
  return x == 0.f ? x : fabs_(x) < INF ? out : x - x;
}

// |x| ** y in double precision: log2 by the atanh series, exp2 by its Taylor series.
FN f64 pow_core(f32 x, f64 y) {
  const uint64_t bits = as_q(static_cast<f64>(fabs_(x)));
  const uint64_t e0 = (bits - 0x3fe6a09e667f3bcdu) >> 52;  // modulo 4096
  const f64 e = as_d(0x4330000000000000u + ((e0 + 2048) & 4095)) - 4503599627372544.0;
  const f64 m = as_d(bits - (e0 << 52));
  const f64 s = (m - 1.0) / (m + 1.0), z = s * s;
  f64 p =
      ((((((z / 15 + 1.0 / 13) * z + 1.0 / 11) * z + 1.0 / 9) * z + 1.0 / 7) * z + 1.0 / 5) * z + 1.0 / 3) * z + 1.0;
  f64 t = y * (e + 2.8853900817779268147 * s * p);
  t = t > 1000.0 ? 1000.0 : t;
  t = t < -1000.0 ? -1000.0 : t;
  const f64 big = t + 6755399441055744.0, n = big - 6755399441055744.0, r = (t - n) * 0.69314718055994530942;
  f64 q = 1.0 / 39916800;
  q = ((((q * r + 1.0 / 3628800) * r + 1.0 / 362880) * r + 1.0 / 40320) * r + 1.0 / 5040) * r + 1.0 / 720;
  q = (((((q * r + 1.0 / 120) * r + 1.0 / 24) * r + 1.0 / 6) * r + 0.5) * r + 1.0) * r + 1.0;
  return q * as_d((as_q(big) + 1023) << 52);
}
// C99's special cases; `integer`, `odd` describe y.
FN f32 pow_cases(f32 x, f64 y, bool integer, bool odd) {
  const f32 a = fabs_(x);
  f32 v = static_cast<f32>(pow_core(x, y));
  v = a == 0.f ? (y < 0 ? INF : 0.f) : v;
  v = a == INF ? (y < 0 ? 0.f : INF) : v;
  const bool endless = y - y != 0.0;
  const f32 grown = (a > 1.f) == (y > 0) ? INF : 0.f;
  v = endless ? (a == 1.f ? 1.f : grown) : v;
  v = x < 0.f && !integer && a != INF ? as_f(0x7fc00000u) : v;
  v = as_f(as_u(v) ^ (odd ? as_u(x) & 0x80000000u : 0u));
  v = x != x || y != y ? as_f(0x7fc00000u) : v;
  return y == 0 || x == 1.f ? 1.f : v;
}
FN f32 pow_(f32 x, f32 y) {
  const f32 a = fabs_(y);
  const bool whole = a >= 8388608.f;  // every such float is an integer (infinities count as even ones)
  const f32 small = whole ? 0.f : a, n = near_(small);
  const bool integer = whole || n == small;
  const bool odd = whole ? a < 16777216.f && (as_u(a) & 1) : n == small && (static_cast<i32>(n) & 1);
  return pow_cases(x, y, integer, odd);
}
FN f32 pow_i_(f32 x, i32 y) { return pow_cases(x, y, true, y & 1); }

FN f32 round_bf16_(f32 x) {
  const u32 b = as_u(x), r = (b + 0x7fffu + (b >> 16 & 1)) & 0xffff0000u;
  return x != x ? as_f((b & 0xffff0000u) | 0x400000u) : as_f(r);
}
FN f32 round_f16_(f32 x) {
  const u32 b = as_u(x);
  const f32 a = fabs_(x);
  f32 y = as_f((as_u(a) + 0xfffu + (b >> 13 & 1)) & 0xffffe000u);
  y = a < 6.103515625e-5f ? (a + 0.75f) - 0.75f : y;  // denormals: spacing 2**-24
  y = y >= 65520.f ? INF : y;
  y = x != x ? as_f(0x7fc00000u) : y;
  return copysign_(y, x);
}
FN f32 from_bf16(uint16_t h) { return as_f(static_cast<u32>(h) << 16); }
FN uint16_t to_bf16(f32 x) { return static_cast<uint16_t>(as_u(round_bf16_(x)) >> 16); }
FN f32 from_f16(uint16_t h) {
  const u32 m = static_cast<u32>(h & 0x7fff) << 13;
  const f32 y = as_f(m) * 5.192296858534828e33f;  // 2**112
  return as_f((m >= 0x0f800000u ? m | 0x7f800000u : as_u(y)) | static_cast<u32>(h & 0x8000) << 16);
}
FN uint16_t to_f16(f32 x) {
  const f32 y = round_f16_(x);
  const u32 b = as_u(y), s = b >> 16 & 0x8000u, m = b & 0x7fffffffu;
  const u32 normal = (m - 0x38000000u) >> 13, small = as_u(fabs_(y) + 0.5f) & 0x7ffu;
  const u32 h = m >= 0x7f800000u ? (m > 0x7f800000u ? 0x7e00u : 0x7c00u) : m < 0x38800000u ? small : normal;
  return static_cast<uint16_t>(s | h);
}
FN f32 round_away_(f32 x) {
  const f32 t = __builtin_truncf(x);
  return copysign_(fabs_(x - t) >= 0.5f ? t + copysign_(1.f, x) : t, x);
}
FN f32 round_even_(f32 x) {
  const f32 a = fabs_(x);
  return a < 8388608.f ? copysign_((a + 8388608.f) - 8388608.f, x) : x;
}
FN i32 f2i_(f32 x) {
  const i32 y = static_cast<i32>(x < 2147483648.f && x >= -2147483648.f ? x : 0.f);
  return x >= 2147483648.f ? 0x7fffffff : x < -2147483648.f ? static_cast<i32>(0x80000000u) : y;
}
FN u32 f2u_(f32 x) {
  const f32 lo = x >= 2147483648.f ? x - 2147483648.f : x;
  const u32 y = static_cast<u32>(static_cast<i32>(lo > 0.f && lo < 2147483648.f ? lo : 0.f)) +
                (x >= 2147483648.f ? 0x80000000u : 0u);
  return x >= 4294967296.f ? 0xffffffffu : x > 0.f ? y : 0u;
}
FN f32 u2f_(u32 x) { return static_cast<f32>(static_cast<f64>(x)); }
// maximum and minimum of IEEE 754-2019: a NaN wins, and -0 is less than +0 (equal numbers have equal bits otherwise).
FN f32 fmax_(f32 a, f32 b) { return a > b || a != a ? a : a == b ? as_f(as_u(a) & as_u(b)) : b; }
FN f32 fmin_(f32 a, f32 b) { return a < b || a != a ? a : a == b ? as_f(as_u(a) | as_u(b)) : b; }

FN i32 idiv_(i32 a, i32 b) { return b == 0 ? -1 : b == -1 ? static_cast<i32>(0u - static_cast<u32>(a)) : a / b; }
FN i32 irem_(i32 a, i32 b) { return b == 0 ? a : b == -1 ? 0 : a % b; }
FN i32 ipow_(i32 a, i32 b) {
  if (b < 0) return a == 1 ? 1 : a == -1 ? (b & 1 ? -1 : 1) : 0;
  u32 base = static_cast<u32>(a), out = 1;
  for (u32 n = static_cast<u32>(b); n; n >>= 1, base *= base) out *= n & 1 ? base : 1;
  return static_cast<i32>(out);
}
