// Types, bits of the storage types, and the group of threads that works on a task.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

namespace mpk {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(void*) == 8);

__device__ __forceinline__ float f(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 b(float x) { return __float_as_uint(x); }
#define LOWEST (__uint_as_float(0xff800000u))  // -infinity

// ---- storage types: a register is 32 bits; memory may be narrower ----------------------------------------------------

__device__ __forceinline__ float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }

// Round to nearest even; a NaN stays a NaN.
__device__ __forceinline__ u16 f32_to_bf16(float x) {
  u32 u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (u16)((u >> 16) | 0x40);
  return (u16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// Conversions of numbers; what they make of a NaN is up to them (ptx.cuh).
__device__ __forceinline__ float cvt_f32_f16(u16 h);
__device__ __forceinline__ u16 cvt_f16_f32(float x);

// Infinities and NaN by their bits: a NaN keeps its sign and what it carries.
__device__ __forceinline__ float f16_to_f32(u16 h) {
  const float x = cvt_f32_f16(h);
  return (h & 0x7c00) == 0x7c00 ? __uint_as_float((u32)(h & 0x8000) << 16 | 0x7f800000u | (u32)(h & 1023) << 13) : x;
}

// Round to nearest even; a NaN keeps its sign.
__device__ __forceinline__ u16 f32_to_f16(float x) {
  const u16 y = cvt_f16_f32(x);
  return x != x ? (u16)(__float_as_uint(x) >> 16 & 0x8000 | 0x7e00) : y;
}

struct F32 {};
struct BF16 {};
struct F16 {};
struct I32 {};
struct I16 {};
struct I8 {};
struct U32 {};
struct U16 {};
struct U8 {};
struct BOOL {};

// load<T>(p, i): element i as register bits; store<T>(p, i, bits): narrows.
template <class T> struct Storage;
#define MPK_STORAGE(T, M, LOAD, STORE)                                                                   \
  template <> struct Storage<T> {                                                                        \
    using type = M;                                                                                      \
    static __device__ __forceinline__ u32 widen(M x) { return LOAD; }                                    \
    static __device__ __forceinline__ M narrow(u32 x) { return STORE; }                                  \
    static __device__ __forceinline__ u32 load(const void* p, i64 i) { return widen(((const M*)p)[i]); } \
    static __device__ __forceinline__ void store(void* p, i64 i, u32 x) { ((M*)p)[i] = narrow(x); }      \
  };
MPK_STORAGE(F32, u32, x, x)
MPK_STORAGE(I32, u32, x, x)
MPK_STORAGE(U32, u32, x, x)
MPK_STORAGE(BF16, u16, (u32)x << 16, f32_to_bf16(f(x)))
MPK_STORAGE(F16, u16, b(f16_to_f32(x)), f32_to_f16(f(x)))
MPK_STORAGE(I16, short, (u32)(int)x, (short)x)
MPK_STORAGE(U16, u16, x, (u16)x)
MPK_STORAGE(I8, signed char, (u32)(int)x, (signed char)x)
MPK_STORAGE(U8, u8, x, (u8)x)
MPK_STORAGE(BOOL, u8, x != 0, (u8)(x != 0))
#undef MPK_STORAGE

template <class T> __device__ __forceinline__ u32 load(const void* p, i64 i) { return Storage<T>::load(p, i); }
template <class T> __device__ __forceinline__ void store(void* p, i64 i, u32 x) { Storage<T>::store(p, i, x); }

// N neighbours, as many bytes at a time as there are, up to 16; their address is a multiple of these.
template <class T, int N> struct Wide {
  using type = typename Storage<T>::type;
  static constexpr int SIZE = sizeof(type), EACH = 4 / SIZE, WORDS = N * SIZE / 4, BITS = 8 * SIZE;
  static_assert(N * SIZE == 2 || N * SIZE == 4 || N * SIZE == 8 || N * SIZE % 16 == 0);
  u32 word[WORDS ? WORDS : 1];

  __device__ __forceinline__ u32 get(int n) const {
    if constexpr (SIZE == 4) return Storage<T>::widen((type)word[n]);
    else return Storage<T>::widen((type)(word[n / EACH] >> (n % EACH * BITS)));
  }
  __device__ __forceinline__ void set(int n, u32 x) {
    if constexpr (SIZE == 4) {
      word[n] = (u32)Storage<T>::narrow(x);
    } else {
      const u32 bits = ((u32)Storage<T>::narrow(x) & ((1u << BITS) - 1)) << (n % EACH * BITS);
      word[n / EACH] = n % EACH ? word[n / EACH] | bits : bits;
    }
  }
  __device__ __forceinline__ void load(const void* p, i64 i) {
    const type* at = (const type*)p + i;
    if constexpr (WORDS == 0) word[0] = *(const u16*)at;
    else if constexpr (WORDS == 1) word[0] = *(const u32*)at;
    else if constexpr (WORDS == 2) {
      const uint2 x = *(const uint2*)at;
      word[0] = x.x, word[1] = x.y;
    } else
#pragma unroll
      for (int k = 0; k < WORDS; k += 4) {
        const uint4 x = ((const uint4*)at)[k / 4];
        word[k] = x.x, word[k + 1] = x.y, word[k + 2] = x.z, word[k + 3] = x.w;
      }
  }
  __device__ __forceinline__ void store(void* p, i64 i) const {
    type* at = (type*)p + i;
    if constexpr (WORDS == 0) *(u16*)at = (u16)word[0];
    else if constexpr (WORDS == 1) *(u32*)at = word[0];
    else if constexpr (WORDS == 2) *(uint2*)at = make_uint2(word[0], word[1]);
    else
#pragma unroll
      for (int k = 0; k < WORDS; k += 4)
        ((uint4*)at)[k / 4] = make_uint4(word[k], word[k + 1], word[k + 2], word[k + 3]);
  }
};

__device__ __forceinline__ i64 clamp_to(u32 x, int limit) { return min(max((int)x, 0), limit); }

}  // namespace mpk
