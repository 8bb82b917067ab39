// Reads `n` pieces of 16 bytes and does nothing else: the ceiling that shares of bandwidth are taken of. Stands alone
// (jax_mpk/backends/cuda_bandwidth.py compiles it, ffi/cuda/bandwidth.cc launches it).

constexpr int AHEAD = 8;  // loads of a thread in flight

// The whole grid walks the memory together, each block 64 KiB at a time. `out` is written
// only if the bits of what a thread read come to a value that the host makes sure they cannot: no load can be left out.
extern "C" __global__ void __launch_bounds__(512)
    read_stream(const uint4* __restrict__ p, unsigned long long n, unsigned impossible, unsigned* out) {
  unsigned x = 0;
  const unsigned long long step = (unsigned long long)gridDim.x * 512 * AHEAD;
  for (unsigned long long at = (unsigned long long)blockIdx.x * 512 * AHEAD + threadIdx.x; at < n; at += step) {
    uint4 u[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) u[i] = at + i * 512 < n ? p[at + i * 512] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) x |= u[i].x | u[i].y | u[i].z | u[i].w;
  }
  if (x == impossible) *out = x;
}
