// The short depthwise convolution of both directions with SiLU and the projection of its result to dt, B and C.
//
// Beyond what the result takes, only x and the weights move: 64 channels of a block's tokens at a time are convolved in
// registers, written to u, and multiplied by the weights while they are in shared memory. The next 64 are on their way.
// Registers are short: what can be computed anew is not kept from part to part.
//
// Macros beside taps.cuh's: PROJECT (0 or 1, see conv_project), WARPS (of a block of it), SHARED_BYTES.

// Weights in two bytes: those of the projection, (RANK + 32, dim) float32 of each direction, to packed (2, ROW, dim) with
// zeros from RANK to RANK_PAD; of the step sizes, (dim, RANK) each, to packed_dt (2, dim, RANK_PAD); and `others`
// neighbouring numbers of out_proj. A thread for two numbers of each.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
pack_weights(const float* forward, const float* backward, const float* dt_f, const float* dt_b, const float* out_proj,
             T* packed, T* packed_dt, T* packed_out, int dim, int others) {
  let_next_kernel_start();
  const int i = 2 * (blockIdx.x * FLAT_THREADS + threadIdx.x), row = i / dim, column = i % dim;
  if (i < others) {
    const float2 v = *(const float2*)&out_proj[i];
    *(T2*)&packed_out[i] = pack(v.x, v.y);
  }
  if (i < dim * RANK_PAD) {
    const int r = i % RANK_PAD, from = i / RANK_PAD * RANK + r;
#pragma unroll
    for (int d = 0; d < 2; d++) {
      const float* dt = d ? dt_b : dt_f;
      *(T2*)&packed_dt[d * dim * RANK_PAD + i] = pack(r < RANK ? dt[from] : 0.f, r + 1 < RANK ? dt[from + 1] : 0.f);
    }
  }
  if (row >= ROW) return;
  const int source = row < RANK ? row : row - (RANK_PAD - RANK);
  float2 f = {}, b = {};
  if (row < RANK || row >= RANK_PAD) {
    f = *(const float2*)&forward[source * dim + column];
    b = *(const float2*)&backward[source * dim + column];
  }
  *(T2*)&packed[i] = pack(f.x, f.y);
  *(T2*)&packed[ROW * dim + i] = pack(b.x, b.y);
}

constexpr int ROWS = WARPS * TILE + 2 * REACH;  // of x that a block sees

// Rows of 128 bytes. Where pieces of 16 bytes are read from rows at once, they stand at `piece ^ row % 8`, against conflicts.
struct Shared {
  alignas(16) T x[2][ROWS][CHANNELS];
  alignas(16) T u[WARPS][2][TILE][CHANNELS];
#if PROJECT
  alignas(16) T weight[2][2 * ROW][CHANNELS];
#endif
};
static_assert(CHANNELS == 64 && sizeof(Shared) == SHARED_BYTES, "a launch asks for another size of shared memory");

// u of both directions (tokens, dim) contiguous from x (tokens, dim) with rows of x_stride; sequences of `length` tokens
// one after the other. PROJECT: their projections (2, tokens, ROW) too. A warp owns TILE tokens, whatever sequences they are
// of: a lane convolves two channels of them, then they are a factor of the matrix unit. `packed` as from pack_weights.
// A grid of (tokens / (TILE WARPS), PROJECT ? 1 : dim / CHANNELS) blocks.
extern "C" __global__ void __launch_bounds__(32 * WARPS, PROJECT ? 3 : 8)
conv_project(const T* x, long long x_stride, const float* weight_f, const float* weight_b, const float* bias_f,
             const float* bias_b, const T* packed, T* u_f, T* u_b, T* projected, int tokens, int length, int dim) {
  DYNAMIC_SHARED(Shared, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block0 = blockIdx.x * WARPS * TILE, first = block0 + warp * TILE;
  const int first_part = PROJECT ? 0 : blockIdx.y, end = PROJECT ? dim / CHANNELS : first_part + 1;
  // A thread copies one piece of every 4 WARPS-th row.
  const auto copy_part = [&](int part, int stage) {
    const int thread = anew(threadIdx.x), copied = thread / 8, piece = thread % 8 * 8;
    const T* from = x + (block0 + copied - REACH) * x_stride + part * CHANNELS + piece;
#pragma unroll
    for (int i = 0; i < ROWS; i += 4 * WARPS, from += 4 * WARPS * x_stride) {
      const int row = i + copied, token = block0 + row - REACH;
      if (row < ROWS) copy16(&s.x[stage][row][piece], from, token >= 0 && token < tokens);
    }
#if PROJECT
    const T* weight = packed + (copied * dim + part * CHANNELS + piece);
#pragma unroll
    for (int i = 0; i < 2 * ROW; i += 4 * WARPS, weight += 4 * WARPS * dim)
      copy16(&s.weight[stage][i + copied][piece ^ copied % 8 * 8], weight, true);
#endif
    copies_commit();
  };

  const int position = first % length;
  // Whether all rows that the warp sees are of one sequence.
  const bool whole = position >= REACH && position + TILE + REACH <= length;
#if PROJECT
  float acc[2][ROW / 8][4] = {};
#endif
  wait_for_last_kernel();
  let_next_kernel_start();  // not before the wait: the scan reads parameters that it relies on being there
  copy_part(first_part, first_part % 2);
#pragma unroll 1
  for (int part = first_part; part < end; part++) {
    const int stage = part % 2, channel = part * CHANNELS + 2 * lane;
    const Taps f(weight_f, bias_f, channel), b(weight_b, bias_b, channel);
    block_sync();  // the last part's products are done
    if (part + 1 < end)
      copy_part(part + 1, stage ^ 1);
    else
      copies_commit();
    copies_wait<1>();
    block_sync();

    const auto convolve = [&](bool all) {
      int at = all ? 0 : anew(position);
      float2 row[2 * REACH + 1];
#pragma unroll
      for (int i = 0; i < 2 * REACH; i++) row[i] = unpack(*(const T2*)&s.x[stage][warp * TILE + i][2 * lane]);
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        row[2 * REACH] = unpack(*(const T2*)&s.x[stage][warp * TILE + t + 2 * REACH][2 * lane]);
        float y[2][2] = {{f.bias[0], f.bias[1]}, {b.bias[0], b.bias[1]}};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float2 before = row[k], after = row[2 * REACH - k];
          if (!all && at < REACH - k) before = make_float2(0.f, 0.f);
          if (!all && at + REACH - k >= length) after = make_float2(0.f, 0.f);
          y[0][0] = fmaf(f.tap[k][0], before.x, y[0][0]);
          y[0][1] = fmaf(f.tap[k][1], before.y, y[0][1]);
          y[1][0] = fmaf(b.tap[k][0], after.x, y[1][0]);
          y[1][1] = fmaf(b.tap[k][1], after.y, y[1][1]);
        }
#pragma unroll
        for (int d = 0; d < 2; d++)
          *(T2*)&s.u[warp][d][t][(lane / 4 ^ t % 8) * 8 + lane % 4 * 2] =
              pack(y[d][0] * sigmoid(y[d][0]), y[d][1] * sigmoid(y[d][1]));
#pragma unroll
        for (int i = 0; i < 2 * REACH; i++) row[i] = row[i + 1];
        at = at + 1 == length ? 0 : at + 1;
      }
    };
    if (whole)
      convolve(true);
    else
      convolve(false);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < 2; d++) {
      const int own = anew(lane);
      T* to = (d ? u_b : u_f) + (long long)(first + own / 8) * dim + part * CHANNELS + own % 8 * 8;
      uint4 v[TILE / 4];
#pragma unroll
      for (int i = 0; i < TILE / 4; i++) {
        const int row = 4 * i + own / 8;
        v[i] = *(const uint4*)&s.u[warp][d][row][(own % 8 ^ row % 8) * 8];
      }
#pragma unroll
      for (int i = 0; i < TILE / 4; i++, to += 4 * dim) store16(to, v[i], 4 * i + own / 8 < tokens - first);
    }
#if PROJECT
    const int reader = anew(lane);
#pragma unroll
    for (int d = 0; d < 2; d++)
#pragma unroll
      for (int k = 0; k < CHANNELS / 16; k++) {
        unsigned a[4];
        load_matrices(a, &s.u[warp][d][reader % 16][((2 * k + reader / 16) ^ reader % 8) * 8]);
#pragma unroll
        for (int n = 0; n < ROW / 16; n++) {
          unsigned w[4];
          const int row = d * ROW + 16 * n + reader / 16 * 8 + reader % 8;
          load_matrices(w, &s.weight[stage][row][((2 * k + reader / 8 % 2) ^ reader % 8) * 8]);
          multiply(acc[d][2 * n], a, w[0], w[1]);
          multiply(acc[d][2 * n + 1], a, w[2], w[3]);
        }
      }
    __syncwarp();
#endif
  }
#if PROJECT
#pragma unroll
  for (int d = 0; d < 2; d++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = first + lane / 4 + 8 * half;
      if (token < tokens) {
#pragma unroll
        for (int n = 0; n < ROW / 8; n++)
          *(T2*)&projected[((long long)d * tokens + token) * ROW + 8 * n + lane % 4 * 2] =
              pack(acc[d][n][2 * half], acc[d][n][2 * half + 1]);
      }
    }
#endif
}
