// The gradients of both directions of a selective scan.
//
// A block is one warp on 32 channels of one direction. A lane owns 4 states of 4 channels, so that its registers are, as
// they stand, the left operand of the matrix unit: products whose sum over channels is a gradient of B or C are rounded to
// bfloat16 and summed there, with no way through shared memory. Lane l owns channels 16 (l / 8 % 2) + 4 (l % 4) + 0..3 and
// states 4 (l / 4 % 2 + l / 16 * 2) + 0..3.
//
// A warp walks over tiles of 16 tokens against scan order. Rows of a tile are put into shared memory in scan order, so
// that a direction is only another order of rows in memory. From the state on entry of every 8 tokens, which the forward
// kernel keeps, states are computed again for 4 tokens at a time, and their decays serve both recurrences.
//
// Macros beside common.cuh's: CHUNKED (0 or 1), BLOCKS (of a multiprocessor).

constexpr int CHANNELS = 32;
constexpr int WIDE = CHANNELS + 8;  // a padded row, against bank conflicts
constexpr int OWN = 4;              // channels of a lane, and states
constexpr int GROUP = 4;            // steps whose states are in registers
constexpr int EVERY = 8;            // tokens between two kept states

struct Shared {
  alignas(16) T x[2][TILE][ROW];
  alignas(16) T u[2][TILE][WIDE];     // becomes its gradient
  alignas(16) T grad[2][TILE][WIDE];  // becomes the gradient of the step size
  alignas(16) T weight[CHANNELS][RANK_PAD];
  alignas(16) float delta[TILE][WIDE];
  alignas(16) float input[TILE][WIDE];  // delta u
  alignas(16) float bc[TILE][2 * STATE];
  alignas(16) float bounds[2][STATE][CHANNELS];
  alignas(16) float sums[GROUP][2][2][STATE];  // steps; B, C; halves of the channels
  float bias[CHANNELS];
};

// Where a warp works. Row p of a tile is token p ^ flip.
struct Walk {
  int lane, flip, cell, channel0, begin, end, tiles;
  long long row0;  // of the batch entry

  __device__ __forceinline__ Walk(int batch, int length, int chunk) {
    lane = threadIdx.x;
    const int entry = blockIdx.z / 2, reverse = blockIdx.z % 2;
    flip = reverse ? TILE - 1 : 0;
    cell = reverse * batch + entry;
    channel0 = blockIdx.x * CHANNELS;
    begin = blockIdx.y * chunk;
    end = min(begin + chunk, length);
    tiles = (end - begin + TILE - 1) / TILE;
    row0 = (long long)entry * length;
  }
  // The first token of the k-th tile against scan order.
  __device__ __forceinline__ int first(int k) const { return begin + (flip ? k : tiles - 1 - k) * TILE; }
  __device__ __forceinline__ int channel() const { return lane / 8 % 2 * 16 + lane % 4 * 4; }
  __device__ __forceinline__ int state() const { return (lane / 4 % 2 + lane / 16 * 2) * 4; }
};

template <int COLUMNS, int STRIDE>
__device__ __forceinline__ void copy_rows(T (*to)[STRIDE], const T* from, long long stride, int rows_left, const Walk& w) {
  constexpr int PIECES = COLUMNS / 8;
#pragma unroll
  for (int i = 0; i < (TILE * PIECES + 31) / 32; i++) {
    const int piece = i * 32 + w.lane, row = piece / PIECES, column = piece % PIECES * 8;
    if (TILE * PIECES % 32 == 0 || row < TILE) {
      const int token = row ^ w.flip;
      const bool valid = token < rows_left;
      copy16(&to[row][column], from + (valid ? token : 0) * stride + column, valid);
    }
  }
}

__device__ __forceinline__ void load_weights(Shared& s, const float* weight, const float* bias, const Walk& w) {
  weight += (long long)w.channel0 * RANK;
  for (int i = w.lane; i < CHANNELS * RANK_PAD / 2; i += 32) {
    const int c = i / (RANK_PAD / 2), r = i % (RANK_PAD / 2) * 2;
    const float w0 = r < RANK ? weight[c * RANK + r] : 0.f, w1 = r + 1 < RANK ? weight[c * RANK + r + 1] : 0.f;
    *(T2*)&s.weight[c][r] = pack(w0, w1);
  }
  s.bias[w.lane] = bias[w.channel0 + w.lane];
}

// What needs no order: step sizes (0 beyond the end), their products with u, B and C as float32.
__device__ __forceinline__ void prepare(Shared& s, int stage, int rows_left, const Walk& w) {
  float acc[CHANNELS / 8][4];
  const int column = w.lane % 4 * 2, row = w.lane / 4;
#pragma unroll
  for (int j = 0; j < CHANNELS / 8; j++) {
    const float2 b = *(const float2*)&s.bias[8 * j + column];
    acc[j][0] = acc[j][2] = b.x;
    acc[j][1] = acc[j][3] = b.y;
  }
#pragma unroll
  for (int k = 0; k < RANK_PAD; k += 16) {
    unsigned a[4], b[4];
    load_matrices(a, &s.x[stage][w.lane % 16][k + w.lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < CHANNELS / 8; j += 2) {
      load_matrices(b, &s.weight[8 * j + w.lane / 16 * 8 + w.lane % 8][k + w.lane / 8 % 2 * 8]);
      multiply(acc[j], a, b[0], b[1]);
      multiply(acc[j + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    const bool valid = (r ^ w.flip) < rows_left;
#pragma unroll
    for (int j = 0; j < CHANNELS / 8; j++) {
      const float2 u = unpack(*(const T2*)&s.u[stage][r][8 * j + column]);
      float2 d = make_float2(softplus(acc[j][2 * half]), softplus(acc[j][2 * half + 1]));
      if (!valid) d = make_float2(0.f, 0.f);
      *(float2*)&s.delta[r][8 * j + column] = d;
      *(float2*)&s.input[r][8 * j + column] = make_float2(d.x * u.x, d.y * u.y);
    }
  }
#pragma unroll
  for (int i = 0; i < TILE * 4 / 32; i++) {
    const int r = (i * 32 + w.lane) / 4, c = w.lane % 4 * 8;
    const uint4 v = *(const uint4*)&s.x[stage][r][RANK_PAD + c];
    const float2 v0 = unpack(v.x), v1 = unpack(v.y), v2 = unpack(v.z), v3 = unpack(v.w);
    *(float4*)&s.bc[r][c] = make_float4(v0.x, v0.y, v1.x, v1.y);
    *(float4*)&s.bc[r][c + 4] = make_float4(v2.x, v2.y, v3.x, v3.y);
  }
  __syncwarp();
}

__device__ __forceinline__ void load4(float (&v)[OWN], const float* from) {
  const float4 f = *(const float4*)from;
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

// Four neighbouring two-byte numbers as float32 and, for the matrix unit, as bfloat16.
__device__ __forceinline__ void load4(float (&v)[OWN], T2 (&raw)[2], const T* from) {
  const uint2 f = *(const uint2*)from;
  const float2 low = unpack(f.x), high = unpack(f.y);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  raw[0] = HALF ? pack_bf16(v[0], v[1]) : f.x;
  raw[1] = HALF ? pack_bf16(v[2], v[3]) : f.y;
}

// Sums over the channels of a half of f times that half's vector, for the lane's states, to `to`. Columns of the product
// are the two halves' vectors in turn, so each sum appears in two of the four lanes of a row; those store it.
__device__ __forceinline__ void sum_channels(float* to, const float (&f)[OWN][OWN], const T2 (&vector)[2], bool mine) {
  float sum[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i += 2) {
    const unsigned a[4] = {pack_bf16(f[i][0], f[i][1]), pack_bf16(f[i + 1][0], f[i + 1][1]),
                           pack_bf16(f[i][2], f[i][3]), pack_bf16(f[i + 1][2], f[i + 1][3])};
    multiply_bf16(sum[i], sum[i + 1], a, vector[0], vector[1]);
  }
  store_if(mine, to, sum);
}

// Sum over the four lanes that share four channels; a lane gets that of one channel.
__device__ __forceinline__ float sum_states(const float (&v)[OWN], bool upper, bool odd) {
  const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 16);
  const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 16);
  return (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 4);
}

// softplus' at v from d = softplus(v): 1 - e^-d, by a series where that would lose its digits.
__device__ __forceinline__ float softplus_slope(float d) {
  const float small = d * fmaf(d, fmaf(d, fmaf(d, -0.0416666667f, 0.166666667f), -0.5f), 1.f);
  return d < 0.125f ? small : 1.f - exp2_fast(d * -LOG2E);
}

__device__ __forceinline__ void load_decays(float (&a)[OWN][OWN], const float* A_log, const Walk& w) {
#pragma unroll
  for (int c = 0; c < OWN; c++) {
    float v[OWN];
    load4(v, A_log + (long long)(w.channel0 + w.channel() + c) * STATE + w.state());
#pragma unroll
    for (int n = 0; n < OWN; n++) a[n][c] = -LOG2E * exp2_fast(v[n] * LOG2E);
  }
}

// u, x, weight, bias, skip, A_log of both directions and bounds as in scan_forward; grad (batch, L, D), the gradient of
// y. Q (2 batch, chunks, 16, D), only where CHUNKED: the gradient of the state that leaves each chunk.
// grad_u, grad_delta (2, batch, L, D), the latter before softplus. Partial sums, to be added in a fixed order: part_x
// (D / 32, 2, batch, L, 32) for B and C, part_A (2 batch, chunks, D, 16) for A_log, part_v (2 batch, chunks, 2, D) for
// skip and bias. A grid of (D / 32, chunks, 2 batch) warps; `chunk` tokens, a multiple of 16 if there are several.
extern "C" __global__ void __launch_bounds__(32, BLOCKS)
scan_backward(const T* u_f, const T* u_b, const T* x_f, const T* x_b, const float* weight_f, const float* weight_b,
              const float* bias_f, const float* bias_b, const float* A_f, const float* A_b, const float* skip_f,
              const float* skip_b, const T* grad, const float* bounds, const float* Q, T* grad_u, T* grad_delta,
              float* part_x, float* part_A, float* part_v, int batch, int length, int dim, int chunk) {
  __shared__ Shared s;
  const Walk w(batch, length, chunk);
  const int lane = w.lane, states = w.state(), own = w.channel();
  const bool reverse = w.flip, upper = lane & 16, odd = lane & 4;
  const int single = own + 2 * upper + odd;  // the channel whose results come to this lane
  const bool mine = (lane & 1) == lane / 8 % 2;

  const T* u = (reverse ? u_b : u_f) + w.row0 * dim + w.channel0;
  const T* x = (reverse ? x_b : x_f) + w.row0 * ROW;
  grad += w.row0 * dim + w.channel0;
  grad_u += ((long long)w.cell * length) * dim + w.channel0;
  grad_delta += ((long long)w.cell * length) * dim + w.channel0;
  bounds += (long long)w.cell * ((length + EVERY - 1) / EVERY) * STATE * dim + w.channel0;
  part_x += ((long long)blockIdx.x * 2 * batch + w.cell) * length * (2 * STATE);
  const long long part = (long long)w.cell * gridDim.y + blockIdx.y;

  const auto copy_tile = [&](int k) {
    if (k < w.tiles) {
      const int t0 = w.first(k), rows_left = w.end - t0;
      copy_rows<ROW>(s.x[k % 2], x + (long long)t0 * ROW, ROW, rows_left, w);
      copy_rows<CHANNELS>(s.u[k % 2], u + (long long)t0 * dim, dim, rows_left, w);
      copy_rows<CHANNELS>(s.grad[k % 2], grad + (long long)t0 * dim, dim, rows_left, w);
    }
    copies_commit();
  };
  // The state on entry of rows 8 * half + 0..7 of the k-th tile.
  const auto bound = [&](int k, int half) { return w.first(k) / EVERY + (reverse ? 1 - half : half); };
  const auto copy_bounds = [&](int k, int half) {
    if (k < w.tiles && bound(k, half) * EVERY < w.end) {
      const float* from = bounds + (long long)bound(k, half) * STATE * dim;
#pragma unroll
      for (int i = 0; i < STATE * CHANNELS / 4 / 32; i++) {
        const int row = (i * 32 + lane) / 8, column = lane % 8 * 4;
        copy16(&s.bounds[half][row][column], from + (long long)row * dim + column, true);
      }
    }
    copies_commit();
  };
  copy_tile(0);
  copy_bounds(0, 1);
  copy_bounds(0, 0);

  load_weights(s, reverse ? weight_b : weight_f, reverse ? bias_b : bias_f, w);
  float a[OWN][OWN], q[OWN][OWN], grad_A[OWN][OWN];
  load_decays(a, reverse ? A_b : A_f, w);
  const float skip = (reverse ? skip_b : skip_f)[w.channel0 + single];
  float grad_skip = 0.f, grad_bias = 0.f;
#pragma unroll
  for (int n = 0; n < OWN; n++) {
#pragma unroll
    for (int c = 0; c < OWN; c++) q[n][c] = grad_A[n][c] = 0.f;
#if CHUNKED
    load4(q[n], Q + (part * STATE + states + n) * dim + w.channel0 + own);
#endif
  }

#pragma unroll 1
  for (int k = 0; k < w.tiles; k++) {
    const int stage = k % 2, t0 = w.first(k), rows_left = w.end - t0;
    copies_wait<2>();
    prepare(s, stage, rows_left, w);
    copy_tile(k + 1);
#pragma unroll 1
    for (int quarter = 3; quarter >= 0; quarter--) {
      const int half = quarter / 2, row = quarter * GROUP;
      if (quarter % 2) copies_wait<2>();
      if (bound(k, half) * EVERY < w.end) {
        float h[GROUP + 1][OWN][OWN], e[GROUP][OWN][OWN];
#pragma unroll
        for (int n = 0; n < OWN; n++) load4(h[0][n], &s.bounds[half][states + n][own]);
        if (quarter % 2) {
#pragma unroll
          for (int i = -GROUP; i < 0; i++) {
            float d[OWN], v[OWN], b[OWN];
            load4(d, &s.delta[row + i][own]);
            load4(v, &s.input[row + i][own]);
            load4(b, &s.bc[row + i][states]);
#pragma unroll
            for (int n = 0; n < OWN; n++)
#pragma unroll
              for (int c = 0; c < OWN; c++) h[0][n][c] = fmaf(exp2_fast(d[c] * a[n][c]), h[0][n][c], v[c] * b[n]);
          }
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          float d[OWN], v[OWN], b[OWN], g[OWN];
          T2 g2[2];
          load4(d, &s.delta[row + i][own]);
          load4(v, &s.input[row + i][own]);
          load4(b, &s.bc[row + i][states]);
          load4(g, g2, &s.grad[stage][row + i][own]);
#pragma unroll
          for (int n = 0; n < OWN; n++)
#pragma unroll
            for (int c = 0; c < OWN; c++) {
              e[i][n][c] = exp2_fast(d[c] * a[n][c]);
              h[i + 1][n][c] = fmaf(e[i][n][c], h[i][n][c], v[c] * b[n]);
            }
          sum_channels(&s.sums[i][1][lane / 8 % 2][states], h[i + 1], g2, mine);
        }
        float grad_v[GROUP], grad_d[GROUP];
#pragma unroll
        for (int i = GROUP - 1; i >= 0; i--) {
          float d[OWN], v[OWN], b[OWN], c4[OWN], g[OWN], to_v[OWN], to_d[OWN], grad_h[OWN][OWN];
          T2 g2[2];
          load4(d, &s.delta[row + i][own]);
          load4(v, &s.input[row + i][own]);
          load4(b, &s.bc[row + i][states]);
          load4(c4, &s.bc[row + i][STATE + states]);
          load4(g, g2, &s.grad[stage][row + i][own]);
          const T2 v2[2] = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
#pragma unroll
          for (int n = 0; n < OWN; n++)
#pragma unroll
            for (int c = 0; c < OWN; c++) {
              grad_h[n][c] = fmaf(g[c], c4[n], q[n][c]);
              to_v[c] = n ? fmaf(grad_h[n][c], b[n], to_v[c]) : grad_h[n][c] * b[n];
#if AGAIN
              q[n][c] = exp2_fast(d[c] * a[n][c]) * grad_h[n][c];
#else
              q[n][c] = e[i][n][c] * grad_h[n][c];
#endif
              const float p = q[n][c] * h[i][n][c];
              to_d[c] = n ? fmaf(p, a[n][c], to_d[c]) : p * a[n][c];
              grad_A[n][c] = fmaf(p, d[c], grad_A[n][c]);
            }
          sum_channels(&s.sums[i][0][lane / 8 % 2][states], grad_h, v2, mine);
          grad_v[i] = sum_states(to_v, upper, odd);
          grad_d[i] = sum_states(to_d, upper, odd);
        }
        __syncwarp();
        // One channel a lane. The results take the place of u and grad.
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          T *u_at = &s.u[stage][row + i][single], *grad_at = &s.grad[stage][row + i][single];
          const float d = s.delta[row + i][single], v = unpack(*u_at).x, g = unpack(*grad_at).x;
          const float to_delta = fmaf(v, grad_v[i], LN2 * grad_d[i]) * softplus_slope(d);
          grad_bias += to_delta;
          grad_skip = fmaf(g, v, grad_skip);
          *u_at = (T)pack(fmaf(d, grad_v[i], skip * g), 0.f);
          *grad_at = (T)pack(to_delta, 0.f);
        }
        const int step = lane / 8, column = lane % 8 * 4, token = (row + step) ^ w.flip;
        const float4 low = *(const float4*)&s.sums[step][column / STATE][0][column % STATE];
        const float4 high = *(const float4*)&s.sums[step][column / STATE][1][column % STATE];
        if (token < rows_left)
          *(float4*)&part_x[(long long)(t0 + token) * (2 * STATE) + column] =
              make_float4(low.x + high.x, low.y + high.y, low.z + high.z, low.w + high.w);
        __syncwarp();
      }
      if (quarter % 2 == 0) copy_bounds(k + 1, half);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILE * CHANNELS / 8 / 32; i++) {
      const int row = i * 8 + lane / 4, column = lane % 4 * 8, token = row ^ w.flip;
      if (token < rows_left) {
        const long long at = (long long)(t0 + token) * dim + column;
        *(uint4*)&grad_u[at] = *(const uint4*)&s.u[stage][row][column];
        *(uint4*)&grad_delta[at] = *(const uint4*)&s.grad[stage][row][column];
      }
    }
  }

  part_A += (part * dim + w.channel0 + own) * STATE + states;
#pragma unroll
  for (int c = 0; c < OWN; c++) {
    float v[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) v[n] = grad_A[n][c] * a[n][c] * LN2;
    *(float4*)&part_A[c * STATE] = make_float4(v[0], v[1], v[2], v[3]);
  }
  part_v += part * 2 * dim + w.channel0 + single;
  part_v[0] = grad_skip;
  part_v[dim] = grad_bias;
}

// Q (2 batch, chunks, 16, D): the gradient of the state that enters each chunk, from zero at the chunk's end.
// Grid as above.
extern "C" __global__ void __launch_bounds__(32, 12)
grad_states(const T* x_f, const T* x_b, const float* weight_f, const float* weight_b, const float* bias_f,
            const float* bias_b, const float* A_f, const float* A_b, const T* grad, float* Q, int batch, int length,
            int dim, int chunk) {
  __shared__ Shared s;
  const Walk w(batch, length, chunk);
  const int states = w.state(), own = w.channel();
  const bool reverse = w.flip;
  const T* x = (reverse ? x_b : x_f) + w.row0 * ROW;
  grad += w.row0 * dim + w.channel0;
  const auto copy_tile = [&](int k) {
    if (k < w.tiles) {
      const int t0 = w.first(k), rows_left = w.end - t0;
      copy_rows<ROW>(s.x[k % 2], x + (long long)t0 * ROW, ROW, rows_left, w);
      copy_rows<CHANNELS>(s.grad[k % 2], grad + (long long)t0 * dim, dim, rows_left, w);
    }
    copies_commit();
  };
  copy_tile(0);
  load_weights(s, reverse ? weight_b : weight_f, reverse ? bias_b : bias_f, w);
  float a[OWN][OWN], q[OWN][OWN] = {};
  load_decays(a, reverse ? A_b : A_f, w);
#pragma unroll 1
  for (int k = 0; k < w.tiles; k++) {
    const int stage = k % 2;
    copies_wait<0>();
    prepare(s, stage, w.end - w.first(k), w);
    copy_tile(k + 1);
#pragma unroll 1
    for (int row = TILE - GROUP; row >= 0; row -= GROUP) {
#pragma unroll
      for (int i = GROUP - 1; i >= 0; i--) {
        float d[OWN], c4[OWN], g[OWN];
        T2 g2[2];
        load4(d, &s.delta[row + i][own]);
        load4(c4, &s.bc[row + i][STATE + states]);
        load4(g, g2, &s.grad[stage][row + i][own]);
#pragma unroll
        for (int n = 0; n < OWN; n++)
#pragma unroll
          for (int c = 0; c < OWN; c++) q[n][c] = exp2_fast(d[c] * a[n][c]) * fmaf(g[c], c4[n], q[n][c]);
      }
    }
    __syncwarp();
  }
  Q += (((long long)w.cell * gridDim.y + blockIdx.y) * STATE + states) * dim + w.channel0 + own;
#pragma unroll
  for (int n = 0; n < OWN; n++) *(float4*)&Q[(long long)n * dim] = make_float4(q[n][0], q[n][1], q[n][2], q[n][3]);
}
