// Arithmetic instructions: one vectorised loop per opcode over n lanes (a multiple of LANES, 64-byte aligned).
#pragma once

static void select(u32* d, const u32* a, const u32* b, const u32* c, int n) {
  n &= -16;
  LOOP (int i = 0; i < n; ++i) d[i] = a[i] ? b[i] : c[i];
}

constexpr f32 TRIG_LIMIT = 1e6f;

static bool beyond(const u32* a, int n) {
  u32 any = 0;
  LOOP (int j = 0; j < n; ++j) any |= (a[j] & 0x7fffffffu) > 0x49742400u && (a[j] & 0x7fffffffu) < 0x7f800000u;  // 1e6
  return any;
}

static void arithmetic(abi::Opcode op, u32* d, const u32* a, const u32* b, int n) {
  n &= -16;  // tells the compiler that there is no remainder
#define EACH(name, value)                      \
  case abi::Opcode::name:                      \
    LOOP (int j = 0; j < n; ++j) d[j] = value; \
    break;
// Arguments beyond TRIG_LIMIT need more digits of pi than the vector code has: lane by lane, from the C library.
#define TRIG(name, value, library)                                                                        \
  case abi::Opcode::name:                                                                                 \
    if (beyond(a, n)) {                                                                                   \
      for (int j = 0; j < n; ++j) d[j] = as_u(fabs_(X) > TRIG_LIMIT && fabs_(X) < INF ? library : value); \
    } else {                                                                                              \
      LOOP (int j = 0; j < n; ++j) d[j] = as_u(value);                                                    \
    }                                                                                                     \
    break;
#define X as_f(a[j])
#define Y as_f(b[j])
#define SX static_cast<i32>(a[j])
#define SY static_cast<i32>(b[j])
#define F_OP(name, value) EACH(name, as_u(value))
#define I_OP(name, value) EACH(name, static_cast<u32>(value))
  switch (op) {
    EACH(MOVE, a[j])
    EACH(F_NEG, a[j] ^ 0x80000000u)
    EACH(F_ABS, a[j] & 0x7fffffffu)
    F_OP(F_EXP, exp_(X))
    F_OP(F_EXP2, exp2_(X))
    F_OP(F_EXPM1, expm1_(X))
    F_OP(F_LOG, log_(X))
    F_OP(F_LOG1P, log1p_(X))
    F_OP(F_SQRT, __builtin_sqrtf(X))
    F_OP(F_RSQRT, 1.f / __builtin_sqrtf(X))
    F_OP(F_CBRT, __builtin_cbrtf(X))
    F_OP(F_TANH, tanh_(X))
    TRIG(F_SIN, sin_(X), __builtin_sinf(X))
    TRIG(F_COS, cos_(X), __builtin_cosf(X))
    TRIG(F_TAN, tan_(X), __builtin_tanf(X))
    F_OP(F_LOGISTIC, logistic_(X))
    F_OP(F_ERF, erf_(X))
    F_OP(F_SIGN, X > 0.f ? 1.f : X < 0.f ? -1.f : X)
    F_OP(F_FLOOR, __builtin_floorf(X))
    F_OP(F_CEIL, __builtin_ceilf(X))
    F_OP(F_ROUND_EVEN, round_even_(X))
    F_OP(F_ROUND_AWAY, round_away_(X))
    I_OP(F_IS_FINITE, (a[j] & 0x7f800000u) != 0x7f800000u)
    F_OP(F_ROUND_BF16, round_bf16_(X))
    F_OP(F_ROUND_F16, round_f16_(X))
    I_OP(F_TO_I, f2i_(X))
    I_OP(F_TO_U, f2u_(X))
    I_OP(F_TO_B, X != 0.f)
    F_OP(F_ADD, X + Y)
    F_OP(F_SUB, X - Y)
    F_OP(F_MUL, X * Y)
    F_OP(F_DIV, X / Y)
    F_OP(F_REM, __builtin_fmodf(X, Y))
    F_OP(F_MAX, fmax_(X, Y))
    F_OP(F_MIN, fmin_(X, Y))
    F_OP(F_POW, pow_(X, Y))
    F_OP(F_POW_I, pow_i_(X, SY))
    F_OP(F_ATAN2, __builtin_atan2f(X, Y))
    I_OP(F_LT, X < Y)
    I_OP(F_LE, X <= Y)
    I_OP(F_EQ, X == Y)
    I_OP(F_NE, X != Y)
    EACH(I_NEG, 0u - a[j])
    EACH(I_ABS, SX < 0 ? 0u - a[j] : a[j])
    I_OP(I_SIGN, (SX > 0) - (SX < 0))
    EACH(I_NOT, ~a[j])
    EACH(B_NOT, a[j] ^ 1u)
    I_OP(I_POPCOUNT, __builtin_popcount(a[j]))
    I_OP(I_CLZ, a[j] ? __builtin_clz(a[j]) : 32)
    F_OP(I_TO_F, static_cast<f32>(SX))
    F_OP(U_TO_F, u2f_(a[j]))
    I_OP(I_TO_B, a[j] != 0)
    I_OP(I_WRAP_I8, static_cast<i32>(static_cast<int8_t>(a[j])))
    EACH(I_WRAP_U8, a[j] & 0xffu)
    I_OP(I_WRAP_I16, static_cast<i32>(static_cast<int16_t>(a[j])))
    EACH(I_WRAP_U16, a[j] & 0xffffu)
    EACH(I_ADD, a[j] + b[j])
    EACH(I_SUB, a[j] - b[j])
    EACH(I_MUL, a[j] * b[j])
    I_OP(I_DIV, idiv_(SX, SY))
    EACH(U_DIV, b[j] ? a[j] / b[j] : ~0u)
    I_OP(I_REM, irem_(SX, SY))
    EACH(U_REM, b[j] ? a[j] % b[j] : a[j])
    EACH(I_MAX, SX > SY ? a[j] : b[j])
    EACH(U_MAX, a[j] > b[j] ? a[j] : b[j])
    EACH(I_MIN, SX < SY ? a[j] : b[j])
    EACH(U_MIN, a[j] < b[j] ? a[j] : b[j])
    I_OP(I_POW, ipow_(SX, SY))
    EACH(I_AND, a[j] & b[j])
    EACH(I_OR, a[j] | b[j])
    EACH(I_XOR, a[j] ^ b[j])
    EACH(I_SHL, b[j] < 32 ? a[j] << (b[j] & 31) : 0)
    EACH(I_SHR, b[j] < 32 ? a[j] >> (b[j] & 31) : 0)
    I_OP(I_SAR, SX >> (b[j] < 32 ? b[j] : 31))
    I_OP(I_LT, SX < SY)
    I_OP(U_LT, a[j] < b[j])
    I_OP(I_LE, SX <= SY)
    I_OP(U_LE, a[j] <= b[j])
    I_OP(I_EQ, a[j] == b[j])
    I_OP(I_NE, a[j] != b[j])
    default: break;  // memory and control: the interpreter
  }
#undef EACH
#undef TRIG
#undef X
#undef Y
#undef SX
#undef SY
#undef F_OP
#undef I_OP
}
