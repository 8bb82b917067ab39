// Loads and stores of strips: every element type, contiguous, broadcast, strided and gathered.
//
// Lanes 0..n-1 only are touched in memory; a load leaves the other lanes of the register as they were.
#pragma once

#if defined(__clang__)
#define LOOP _Pragma("clang loop vectorize(assume_safety)") for
#else
#define LOOP _Pragma("GCC ivdep") for
#endif

// An element type: `get` widens to a register, `put` narrows, `combine` is what a store of that kind does to memory.
struct F32 {
  typedef f32 mem;
  FN u32 get(mem x) { return as_u(x); }
  FN mem put(u32 x) { return as_f(x); }
  FN u32 combine(abi::Opcode op, u32 a, u32 b) {
    const f32 x = as_f(a), y = as_f(b);
    return as_u(op == abi::Opcode::STORE_ADD   ? x + y
                : op == abi::Opcode::STORE_MUL ? x * y
                : op == abi::Opcode::STORE_MAX ? fmax_(x, y)
                                               : fmin_(x, y));
  }
};
struct BF16 : F32 {
  typedef uint16_t mem;
  FN u32 get(mem x) { return static_cast<u32>(x) << 16; }
  FN mem put(u32 x) { return to_bf16(as_f(x)); }
};
struct F16 : F32 {
  typedef uint16_t mem;
  FN u32 get(mem x) { return as_u(from_f16(x)); }
  FN mem put(u32 x) { return to_f16(as_f(x)); }
};
template <class T>
struct Int {
  typedef T mem;
  FN u32 get(mem x) { return static_cast<u32>(static_cast<i32>(x)); }
  FN mem put(u32 x) { return static_cast<T>(x); }
  FN u32 combine(abi::Opcode op, u32 a, u32 b) {
    if (op == abi::Opcode::STORE_ADD) return a + b;
    if (op == abi::Opcode::STORE_MUL) return a * b;
    return (static_cast<T>(a) < static_cast<T>(b)) == (op == abi::Opcode::STORE_MAX) ? b : a;
  }
};

// Where the lanes of a strip are: base + lane * stride, or one offset per lane.
struct Lanes {
  i64 stride;
  const i64* offset;  // gathered: element offsets per lane, else null
};

template <class T>
FN void load_strip(u32* __restrict d, const char* at, const Lanes& l, int n) {
  const auto* p = reinterpret_cast<const typename T::mem*>(at);
  if (l.offset) {
    for (int i = 0; i < n; ++i) d[i] = T::get(p[l.offset[i]]);
  } else if (l.stride == 1) {
    LOOP (int i = 0; i < n; ++i) d[i] = T::get(p[i]);
  } else if (l.stride == 0) {
    const u32 v = T::get(p[0]);
    for (int i = 0; i < n; ++i) d[i] = v;
  } else {
    for (int i = 0; i < n; ++i) d[i] = T::get(p[i * l.stride]);
  }
}

template <class T>
FN void store_strip(const u32* v, const u32* where, abi::Opcode op, char* at, const Lanes& l, int n) {
  auto* p = reinterpret_cast<typename T::mem*>(at);
  const bool combines = op != abi::Opcode::STORE && op != abi::Opcode::STORE_IF;
  if (!where && !l.offset && l.stride == 1) {
    if (combines) {
      LOOP (int i = 0; i < n; ++i) p[i] = T::put(T::combine(op, T::get(p[i]), v[i]));
    } else {
      LOOP (int i = 0; i < n; ++i) p[i] = T::put(v[i]);
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    if (where && !where[i]) continue;
    auto* q = p + (l.offset ? l.offset[i] : i * l.stride);
    *q = T::put(combines ? T::combine(op, T::get(*q), v[i]) : v[i]);
  }
}

#define BY_DTYPE(dtype, call)                         \
  switch (static_cast<abi::Dtype>(dtype)) {           \
    case abi::Dtype::F32: call(F32); break;           \
    case abi::Dtype::BF16: call(BF16); break;         \
    case abi::Dtype::F16: call(F16); break;           \
    case abi::Dtype::I32: call(Int<i32>); break;      \
    case abi::Dtype::U32: call(Int<u32>); break;      \
    case abi::Dtype::I16: call(Int<int16_t>); break;  \
    case abi::Dtype::U16: call(Int<uint16_t>); break; \
    case abi::Dtype::I8: call(Int<int8_t>); break;    \
    case abi::Dtype::U8:                              \
    case abi::Dtype::BOOL: call(Int<uint8_t>); break; \
  }

static void load_any(uint8_t dtype, u32* d, const char* at, const Lanes& l, int n) {
#define CALL(T) load_strip<T>(d, at, l, n)
  BY_DTYPE(dtype, CALL);
#undef CALL
}

static void store_any(uint8_t dtype, const u32* v, const u32* where, abi::Opcode op, char* at, const Lanes& l, int n) {
#define CALL(T) store_strip<T>(v, where, op, at, l, n)
  BY_DTYPE(dtype, CALL);
#undef CALL
}

FN int size_of(uint8_t dtype) { return abi::DTYPE_BYTES[dtype]; }
