// What the kernel shell and the task bodies need of CUDA, for a host compiler: every CUDA thread is a fiber (fibers.cc),
// and this header takes the place of cuda/runtime/ptx.cuh. Included before the generated source.
#pragma once

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

struct Index { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern "C" {
struct Thread {
  Index thread, block, grid;
  unsigned char* shared;
};
extern Thread* emulated_thread;
void emulated_pause();  // somebody else's turn
void emulated_barrier(unsigned id, unsigned threads, bool wait);
// All 32 lanes meet; gives what each of them passed (`words` of up to 16). `sync`: their memory accesses are ordered too.
const unsigned (*emulated_exchange(const unsigned* mine, int words, bool sync))[16];
void emulated_acquire(const void* word);
void emulated_release(const void* word);
void emulated_copy16(void* to, const void* from);
void emulated_copy16_wait();
void emulated_mbarrier(void* b, int count);
void emulated_arrive(void* b, int bytes);
bool emulated_phase(void* b, unsigned parity);
unsigned long long emulated_clock();
void emulated_copy(void* to, const void* map, int x, int y, int z, int u, unsigned long long* barrier);
float expf(float), exp2f(float), expm1f(float), logf(float), log1pf(float), sqrtf(float), cbrtf(float), tanhf(float),
    sinf(float), cosf(float), erff(float), floorf(float), ceilf(float), rintf(float), roundf(float),
    fmodf(float, float), powf(float, float), atan2f(float, float), fabsf(float), fmaf(float, float, float);
}

// As max.f32 and min.f32 of PTX: the other operand of a NaN, and -0 below +0, which libm leaves open.
inline float fmaxf(float x, float y) {
  return x != x ? y : y != y ? x : x == y ? (__builtin_signbit(x) ? y : x) : x > y ? x : y;
}
inline float fminf(float x, float y) {
  return x != x ? y : y != y ? x : x == y ? (__builtin_signbit(x) ? x : y) : x < y ? x : y;
}

#define threadIdx (emulated_thread->thread)
#define blockIdx (emulated_thread->block)
#define gridDim (emulated_thread->grid)

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __uint_as_float(unsigned x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
inline int __float2int_rz(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : (int)x;
}
inline unsigned __float2uint_rz(float x) { return !(x > 0) ? 0 : x >= 4294967296.0f ? ~0u : (unsigned)x; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned)(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
#define EMULATED_MINMAX(T)                         \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATED_MINMAX(int)
EMULATED_MINMAX(unsigned)
EMULATED_MINMAX(long long)
EMULATED_MINMAX(unsigned long long)

inline unsigned emulated_bits(float x) { return __float_as_uint(x); }
inline unsigned emulated_bits(unsigned x) { return x; }
inline unsigned emulated_bits(int x) { return (unsigned)x; }
inline void emulated_from(float& to, unsigned x) { to = __uint_as_float(x); }
inline void emulated_from(unsigned& to, unsigned x) { to = x; }
inline void emulated_from(int& to, unsigned x) { to = (int)x; }
template <class T> T __shfl_sync(unsigned, T x, int lane) {
  const unsigned mine = emulated_bits(x);
  T out;
  emulated_from(out, emulated_exchange(&mine, 1, false)[lane & 31][0]);
  return out;
}
inline unsigned long long __shfl_sync(unsigned, unsigned long long x, int lane) {
  const unsigned mine[2] = {(unsigned)x, (unsigned)(x >> 32)};
  const auto* all = emulated_exchange(mine, 2, false);
  return (unsigned long long)all[lane & 31][1] << 32 | all[lane & 31][0];
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return __shfl_sync(mask, x, (int)(threadIdx.x & 31) ^ bits);
}
inline unsigned __ballot_sync(unsigned, bool p) {
  const unsigned mine = p;
  const auto* all = emulated_exchange(&mine, 1, false);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= all[i][0] << i;
  return out;
}
inline bool __all_sync(unsigned m, bool p) { return __ballot_sync(m, p) == ~0u; }
inline bool __any_sync(unsigned m, bool p) { return __ballot_sync(m, p) != 0; }
inline void __syncwarp() {
  const unsigned mine = 0;
  emulated_exchange(&mine, 1, true);
}
inline void __syncthreads() { emulated_barrier(0, 19 * 32, true); }

namespace mpk {
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;

inline u64 now_ns() { return emulated_clock(); }
inline float cvt_f32_f16(u16 h) {
  const u32 sign = (u32)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 0) return __uint_as_float(sign | __float_as_uint((float)m * 5.9604644775390625e-8f));
  return __uint_as_float(sign | ((e + 112) << 23) | (m << 13));
}
inline u16 cvt_f16_f32(float x) {
  const u32 u = __float_as_uint(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a >= 0x477ff000u) return (u16)(sign | 0x7c00);  // 65520 and more round to infinity
  if (a < 0x38800000u)                                // subnormal: let the f32 adder do the rounding
    return (u16)(sign | (__float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u));
  return (u16)(sign | ((a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13));
}
// Accesses that cannot race: they are not instrumented.
#define EMULATED_ATOMIC __attribute__((no_sanitize_thread)) inline
EMULATED_ATOMIC u32 ld_acquire(const u32* p) {
  emulated_pause();
  emulated_acquire(p);
  return *(const volatile u32*)p;
}
EMULATED_ATOMIC u32 ld_relaxed(const u32* p) { return *(const volatile u32*)p; }
EMULATED_ATOMIC void red_release(u32* p, u32 n) {
  emulated_release(p);
  *p += n;
}
EMULATED_ATOMIC u32 atom_add_acq_rel(u32* p, u32 n) {
  emulated_pause();
  emulated_acquire(p);
  emulated_release(p);
  const u32 old = *p;
  *p += n;
  return old;
}
EMULATED_ATOMIC bool claim(u32* p) {
  emulated_acquire(p);
  emulated_release(p);
  const bool first = *p == 0;
  *p = 1;
  return first;
}
EMULATED_ATOMIC void st_release_sys(u32* p, u32 v) { *p = v; }
inline void prefetch_l2(const void*) {}
inline void forget() {}
inline void copy16(void* to, const void* from) { emulated_copy16(to, from); }
inline void copy16_wait() { emulated_copy16_wait(); }
inline void barrier_sync(u32 id, u32 threads) { emulated_barrier(id, threads, true); }
inline void barrier_arrive(u32 id, u32 threads) { emulated_barrier(id, threads, false); }
inline uint4 load16(const void* p) { return *(const uint4*)p; }
inline uint4 load16_shared(const void* p) { return *(const uint4*)p; }
inline u32 smem_address(const void* p) { return (u32)((const u8*)p - emulated_thread->shared); }

inline void emulated_matrix(u32 (&r)[4], u32 address, bool transposed) {
  const auto* all = emulated_exchange(&address, 1, false);
  const int lane = threadIdx.x & 31;
  for (int m = 0; m < 4; ++m) {
    auto at = [&](int row, int column) {
      return (u32)((const u16*)(emulated_thread->shared + all[8 * m + row][0]))[column];
    };
    const int row = lane / 4, column = 2 * (lane % 4);
    r[m] = transposed ? at(column, row) | at(column + 1, row) << 16 : at(row, column) | at(row, column + 1) << 16;
  }
}
inline void ldmatrix(u32 (&r)[4], u32 address) { emulated_matrix(r, address, false); }
inline void ldmatrix_trans(u32 (&r)[4], u32 address) { emulated_matrix(r, address, true); }

inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* all = emulated_exchange(mine, 6, false);
  const int lane = threadIdx.x & 31;
  auto half = [](u32 x, int i) { return __uint_as_float(i ? x & 0xffff0000u : x << 16); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >> 1) * 8, column = 2 * (lane % 4) + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const float x = half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k & 1);
      const float y = half(all[column * 4 + k % 8 / 2][4 + k / 8], k & 1);
      c[i] = fmaf(x, y, c[i]);
    }
  }
}

inline u32 pack_bf16(float low, float high) {
  auto round = [](float x) {
    const u32 u = __float_as_uint(x);
    return x != x ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline void mbarrier_init(u64* b, u32 count) { emulated_mbarrier(b, (int)count); }
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(u64* b) { emulated_arrive(b, 0); }
inline void mbarrier_arrive_after(u64* b, u32, u32) { mbarrier_arrive(b); }
inline void mbarrier_expect(u64* b, u32 bytes) { emulated_arrive(b, (int)bytes); }
inline bool mbarrier_try_wait(u64* b, u32 parity) {
  emulated_pause();
  return emulated_phase(b, parity);
}
inline void copy_box(void* to, const void* map, int x, int y, int z, int u, u64* b) {
  emulated_copy(to, map, x, y, z, u, b);
}
}  // namespace mpk
