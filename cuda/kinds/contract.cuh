// CONTRACT: acc_j[m][n] = sum over k of act[m][k] * rhs_j[n][k], for every batch point of the task.
//
// V, generated: Sum (float or u32), N_RHS, M and N (rows and columns of a full tile), K, KC (what the activation holds of
// it), LDA (row length of the activation), LAYOUT, TOGETHER (room for the partial sums of all operands at once); range(),
// batches(), at_batch(), tile(), rows(), columns(), lhs(), epilogue(), act(), acc(), red().
#pragma once

namespace mpk {

// The activation of this batch point is in place. Tasks that share a prologue and a tile find it where it was left.
template <class V, class R> __device__ __forceinline__ void activate(Worker& w, const Desc& d, const R& r) {
  const u64 key = d.prologue == 0 ? 0 : (((u64)d.prologue << 32 | (u32)V::tile(r)) << 1) + V::LAYOUT;
  if (key && key == w.act_key) return;
  V::lhs(w, d, r, 0);
  if constexpr (V::LAYOUT == 1 && V::K % 128 != 0)  // frames are whole: zeros meet the zeros of the copy engine
    for (int i = threadIdx.x; i < V::M * 128; i += THREADS)
      if (V::K + i % 128 < V::LDA) ((u16*)V::act(w))[i / 128 * V::LDA + V::K + i % 128] = 0;
  sync_consumers();
  w.act_key = key;
}

#if MPK_STREAM
// Streamed bf16 weights. A frame is 64 columns x 128 k; warp w takes columns 16*(w%4) and k 32*(w/4) of it. Weights
// are the A operand, up to 16 activation rows the B operand, so every row has the same sums whatever its neighbours.
template <class V> __device__ __forceinline__ void contract_stream(Worker& w, const Desc& d) {
  constexpr int MT = (V::M + 7) / 8, FRAMES = (V::K + 127) / 128, CHUNK = V::KC < V::K ? V::KC / 128 : FRAMES;
  const auto all = V::range(d.index);

#pragma unroll 1
  for (int point = 0; point < V::batches(all); ++point) {
    const auto r = V::at_batch(all, point);
    const int rows = V::rows(r), columns = V::columns(r);
    if constexpr (CHUNK == FRAMES) activate<V>(w, d, r);
    stamp(w, d, 1);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, nt = warp & 3, kg = warp >> 2;
    const int g = lane >> 2, t = lane & 3;
    // Byte offsets inside a frame of this lane's rows for ldmatrix (128-byte rows, 16-byte chunks swizzled by row % 8).
    u32 at[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if constexpr (V::COLUMNS_INNER) {  // [128 k][64 n]
        const int k = kg * 32 + s * 16 + ((lane >> 4) << 3) + (lane & 7), chunk = nt * 2 + ((lane >> 3) & 1);
        at[s] = k * 128 + ((chunk ^ (k & 7)) << 4);
      } else {  // [2][64 n][64 k]
        const int n = nt * 16 + (((lane >> 3) & 1) << 3) + (lane & 7), chunk = (kg & 1) * 4 + s * 2 + (lane >> 4);
        at[s] = (kg >> 1) * 8192 + n * 128 + ((chunk ^ (n & 7)) << 4);
      }
    }
    const u32 ring = smem_address(w.ring);
    float *red = (float*)V::red(w), *out = (float*)V::acc(w);
    const u16* act = (const u16*)V::act(w) + kg * 32 + t * 2;
#pragma unroll 1
    for (int c0 = 0; c0 < columns; c0 += 64) {
#pragma unroll 1
      for (int j = 0; j < V::N_RHS; ++j) {
        float acc[MT][4] = {};
#pragma unroll 1
        for (int kf = 0; kf < FRAMES; ++kf) {
          if constexpr (CHUNK < FRAMES)
            if (kf % CHUNK == 0) {
              sync_consumers();  // nobody needs the chunk before this one
              V::lhs(w, d, r, kf * 128);
              sync_consumers();
            }
          wait_phase(w.state, &w.sh->full[w.frame], w.phase, d.task);
          u32 a[2][4];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            if constexpr (V::COLUMNS_INNER) ldmatrix_trans(a[s], ring + w.frame * FRAME + at[s]);
            else ldmatrix(a[s], ring + w.frame * FRAME + at[s]);
          }
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
              u32 b0 = 0, b1 = 0;
              if (mt * 8 + g < rows) {
                const u16* p = act + (mt * 8 + g) * V::LDA + (CHUNK < FRAMES ? kf % CHUNK : kf) * 128 + s * 16;
                b0 = *(const u32*)p;
                b1 = *(const u32*)(p + 8);
              }
              mma_bf16(acc[mt], a[s], b0, b1);
            }
          __syncwarp();
          if (lane == 0) mbarrier_arrive_after(&w.sh->empty[w.frame], a[0][0], a[1][0]);
          if (++w.frame == MPK_RING) {
            w.frame = 0;
            w.phase ^= 1;
          }
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int m = mt * 8 + t * 2 + (i & 1), n = nt * 16 + g + (i >> 1) * 8;
            if (m < rows) red[((V::TOGETHER ? j * 4 : 0) + kg) * V::M * 64 + m * 64 + n] = acc[mt][i];
          }
        if (V::TOGETHER && j + 1 < V::N_RHS) continue;  // the sums of all operands in one go
        sync_consumers();
        const int j0 = V::TOGETHER ? 0 : j;
#pragma unroll 1
        for (int i = threadIdx.x; i < (j + 1 - j0) * V::M * 64; i += THREADS) {
          const int o = i / (V::M * 64), m = i / 64 % V::M, n = c0 + i % 64;
          if (m >= rows || n >= columns) continue;
          const float* p = red + (o * 4) * V::M * 64 + i % (V::M * 64);
          float sum = p[0];
#pragma unroll
          for (int q = 1; q < 4; ++q) sum += p[q * V::M * 64];
          out[((j0 + o) * V::M + m) * V::N + n] = sum;
        }
        sync_consumers();
      }
    }
    stamp(w, d, 2);
    V::epilogue(w, d, r);
    if (point + 1 < V::batches(all)) sync_consumers();
  }
  if constexpr (CHUNK < FRAMES) w.act_key = 0;
  w.keep<true>();
  finish(w, d, true);
}
#endif

// Any types and strides, weights read where they lie. Rows go in chunks of MC, the activation is f32 (or 32-bit integers);
// the order of a sum depends on K and on the strides only.
template <class V> __device__ __forceinline__ void contract_direct(Worker& w, const Desc& d) {
  using T = typename V::Sum;
  constexpr int MC = V::M < 4 ? V::M : 4;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int col = threadIdx.x & 63, kg = threadIdx.x >> 6;
  T *act = (T*)V::act(w), *out = (T*)V::acc(w), *red = (T*)V::red(w);
  const auto all = V::range(d.index);
#pragma unroll 1
  for (int point = 0; point < V::batches(all); ++point) {
    const auto r = V::at_batch(all, point);
    const int rows = V::rows(r), columns = V::columns(r);
    activate<V>(w, d, r);
    stamp(w, d, 1);
#pragma unroll 1
    for (int j = 0; j < V::N_RHS; ++j) {
      const void* rhs = V::rhs(d, j);
      const i64 base = V::rhs_offset(r, j), sn = V::rhs_n(j), sk = V::rhs_k(j);
#pragma unroll 1
      for (int m0 = 0; m0 < rows; m0 += MC) {
        if (sk == 1 && sn != 1) {  // a warp a column, lanes along k
#pragma unroll 1
          for (int n = warp; n < columns; n += WARPS) {
            T acc[MC] = {};
#pragma unroll(MC > 1 ? 4 : 8)
            for (int k = lane; k < V::K; k += 32) {
              const T x = V::number(V::load_rhs(rhs, base + n * sn + k, j));
#pragma unroll
              for (int m = 0; m < MC; ++m)
                if (m0 + m < rows) acc[m] += x * act[(m0 + m) * V::LDA + k];
            }
#pragma unroll
            for (int m = 0; m < MC; ++m) {
#pragma unroll
              for (int o = 16; o; o >>= 1) acc[m] += __shfl_xor_sync(~0u, acc[m], o);
              if (lane == 0 && m0 + m < rows) out[(j * V::M + m0 + m) * V::N + n] = acc[m];
            }
          }
        } else {  // 64 columns x 8 residues of k
#pragma unroll 1
          for (int c0 = 0; c0 < columns; c0 += 64) {
            T acc[MC] = {};
            if (c0 + col < columns)
#pragma unroll(MC > 1 ? 4 : 8)
              for (int k = kg; k < V::K; k += 8) {
                const T x = V::number(V::load_rhs(rhs, base + (c0 + col) * sn + k * sk, j));
#pragma unroll
                for (int m = 0; m < MC; ++m)
                  if (m0 + m < rows) acc[m] += x * act[(m0 + m) * V::LDA + k];
              }
#pragma unroll
            for (int m = 0; m < MC; ++m) red[(kg * MC + m) * 64 + col] = acc[m];
            sync_consumers();
            for (int i = threadIdx.x; i < MC * 64; i += THREADS) {
              const int m = m0 + i / 64, n = c0 + i % 64;
              if (m >= rows || n >= columns) continue;
              T sum = red[i];
              for (int q = 1; q < 8; ++q) sum += red[q * MC * 64 + i];
              out[(j * V::M + m) * V::N + n] = sum;
            }
            sync_consumers();
          }
        }
      }
    }
    sync_consumers();
    stamp(w, d, 2);
    V::epilogue(w, d, r);
    if (point + 1 < V::batches(all)) sync_consumers();
  }
  w.keep<false>();
  finish(w, d, true);
}

}  // namespace mpk
