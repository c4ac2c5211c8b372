// The gradients of both directions of a selective scan.
//
// A block is one warp on 32 channels of one direction. A lane owns 4 states of 4 channels, so that its registers are,
// as they stand, the left operand of the matrix unit: products whose sum over channels is a gradient of B or C are
// rounded to bfloat16 and summed there, with no way through shared memory. (For float16 tensors too, whose range does
// not hold every product; but then as a sum of two, or the sums would be less accurate than their tensors.) Lane l owns
// channels 16 (l / 4 % 2) + 4 (l % 4) + 0..3 and states 4 (l / 8) + 0..3.
//
// A warp walks over tiles of 16 tokens against scan order. Rows of a tile are put into shared memory in scan order, so
// that a direction is only another order of rows in memory. From the state on entry of every 4 tokens, which the
// forward kernel keeps, the states of these are computed again, and their decays serve both recurrences. That takes all
// registers of two warps a scheduler; three warps that compute the decays twice are slower.
//
// Macros beside common.cuh's: CHUNKED (0 or 1), BLOCKS (of a multiprocessor).

static_assert(BACKWARD_CHANNELS == 32 && KEPT == 4, "a lane owns four channels, and four lanes share the steps of a group");
constexpr int OWN = 4;    // channels of a lane, and states
constexpr int GROUP = KEPT;  // steps whose states are in registers, each time from a kept state
constexpr int PARTS = 1 + HALF;  // bfloat16 numbers whose sum stands for a factor of the matrix unit

struct Shared {
  alignas(16) T x[TILE][ROW];
  alignas(16) T u[2][TILE][BACKWARD_CHANNELS];     // becomes its gradient
  alignas(16) T grad[2][TILE][BACKWARD_CHANNELS];  // becomes the gradient of the step size
  alignas(16) T weight[BACKWARD_CHANNELS][RANK_PAD];
  alignas(16) float delta[TILE][BACKWARD_CHANNELS];
  alignas(16) float input[TILE][BACKWARD_CHANNELS];  // delta u
  alignas(16) T2 packed[PARTS][TILE][BACKWARD_CHANNELS / 2];  // and as bfloat16
  alignas(16) float bc[TILE][2 * STATE];
  alignas(16) T bounds[2][OWN][STATE / OWN][BACKWARD_CHANNELS];  // state 4 i + j at [j][i], against bank conflicts
  float bias[BACKWARD_CHANNELS];
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
    channel0 = blockIdx.x * BACKWARD_CHANNELS;
    begin = blockIdx.y * chunk;
    end = min(begin + chunk, length);
    tiles = (end - begin + TILE - 1) / TILE;
    row0 = (long long)entry * length;
  }
  // The first token of the k-th tile against scan order.
  __device__ __forceinline__ int first(int k) const { return begin + (flip ? k : tiles - 1 - k) * TILE; }
  __device__ __forceinline__ int channel() const { return lane / 4 % 2 * 16 + lane % 4 * 4; }
  __device__ __forceinline__ int state() const { return lane / 8 * 4; }
};

// Copies a tile of the warp's channels; tokens from `rows_left` on become zeros.
__device__ __forceinline__ void copy_rows(T (*to)[BACKWARD_CHANNELS], const T* from, int stride, int rows_left, const Walk& w) {
#pragma unroll
  for (int i = 0; i < TILE * BACKWARD_CHANNELS / 8 / 32; i++) {
    const int row = i * 8 + w.lane / 4, column = w.lane % 4 * 8, token = row ^ w.flip;
    copy16(&to[row][column], from + (token * stride + column), token < rows_left);
  }
}

// The warp's rows of the step sizes' weights and their bias, which the first tile needs.
__device__ __forceinline__ void copy_step_sizes(Shared& s, const T* weight, const float* bias, const Walk& w) {
  copy_weights(s.weight, weight + (long long)w.channel0 * RANK_PAD, w.lane);
  s.bias[w.lane] = bias[w.channel0 + w.lane];
}

__device__ __forceinline__ void load4(float (&v)[OWN], const float* from) {
  const float4 f = *(const float4*)from;
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

__device__ __forceinline__ void load4(float (&v)[OWN], const T* from) {
  const uint2 f = *(const uint2*)from;
  const float2 low = unpack(f.x), high = unpack(f.y);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// Two neighbouring numbers as factors of the matrix unit.
struct Parts {
  T2 at[PARTS];
};

__device__ __forceinline__ Parts parts(float low, float high) {
  Parts p;
  p.at[0] = pack_bf16(low, high);
#if HALF
  p.at[1] = pack_bf16(low - __uint_as_float(p.at[0] << 16), high - __uint_as_float(p.at[0] & 0xffff0000u));
#endif
  return p;
}

__device__ __forceinline__ Parts parts(T2 v) {
#if HALF
  const float2 f = unpack(v);
  return parts(f.x, f.y);
#else
  return {v};
#endif
}

// What needs no order: step sizes (0 beyond the end), their products with u, B and C as float32.
__device__ __forceinline__ void prepare(Shared& s, int stage, int rows_left, const Walk& w) {
  // Columns of two neighbouring products, 8 each, are taken so that a lane gets four neighbouring channels.
  float acc[BACKWARD_CHANNELS / 8][4];
  const int column = w.lane % 4 * 4, row = w.lane / 4;
#pragma unroll
  for (int j = 0; j < BACKWARD_CHANNELS / 16; j++) {
    const float4 b = *(const float4*)&s.bias[16 * j + column];
    acc[2 * j][0] = acc[2 * j][2] = b.x;
    acc[2 * j][1] = acc[2 * j][3] = b.y;
    acc[2 * j + 1][0] = acc[2 * j + 1][2] = b.z;
    acc[2 * j + 1][1] = acc[2 * j + 1][3] = b.w;
  }
  const auto channel = [&](int first) { return first + w.lane % 8 / 2 * 4 + w.lane / 16 * 2 + w.lane % 2; };
  add_steps(acc, s.x, s.weight, channel, w.flip, w.lane);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + 8 * half;
    const bool valid = (r ^ w.flip) < rows_left;
#pragma unroll
    for (int j = 0; j < BACKWARD_CHANNELS / 16; j++) {
      float u[OWN], d[OWN];
      load4(u, &s.u[stage][r][16 * j + column]);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float v = softplus(acc[2 * j + i / 2][2 * half + i % 2]);
        d[i] = valid ? v : 0.f;
        u[i] *= d[i];
      }
      *(float4*)&s.delta[r][16 * j + column] = make_float4(d[0], d[1], d[2], d[3]);
      *(float4*)&s.input[r][16 * j + column] = make_float4(u[0], u[1], u[2], u[3]);
      const Parts low = parts(u[0], u[1]), high = parts(u[2], u[3]);
#pragma unroll
      for (int i = 0; i < PARTS; i++)
        *(uint2*)&s.packed[i][r][8 * j + column / 2] = make_uint2(low.at[i], high.at[i]);
    }
  }
  widen_b_and_c(s.bc, s.x, w.flip, w.lane);
  __syncwarp();
}

// What a step needs of its token; v is delta u, only needed as bfloat16 against scan order.
struct Operands {
  float d[OWN], v[OWN], b[OWN], c[OWN];
  T2 grad[2];
  Parts packed[2];

  __device__ __forceinline__ void load_common(const Shared& s, int stage, int row, int channel, int state) {
    load4(d, &s.delta[row][channel]);
    load4(b, &s.bc[row][state]);
    const uint2 g = *(const uint2*)&s.grad[stage][row][channel];
    grad[0] = g.x, grad[1] = g.y;
  }
  __device__ __forceinline__ void load_state(const Shared& s, int stage, int row, int channel, int state) {
    load_common(s, stage, row, channel, state);
    load4(v, &s.input[row][channel]);
  }
  __device__ __forceinline__ void load_gradient(const Shared& s, int stage, int row, int channel, int state) {
    load_common(s, stage, row, channel, state);
    load4(c, &s.bc[row][STATE + state]);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const uint2 v = *(const uint2*)&s.packed[i][row][channel / 2];
      packed[0].at[i] = v.x, packed[1].at[i] = v.y;
    }
  }
  __device__ __forceinline__ void widen(float (&g)[OWN]) const {
    const float2 low = unpack(grad[0]), high = unpack(grad[1]);
    g[0] = low.x, g[1] = low.y, g[2] = high.x, g[3] = high.y;
  }
};

// Adds to sums what a step's f times a vector is over the channels. Of the product's 8 columns two belong to the step,
// one for the vector's lower and one for its upper half of the channels; its rows belong to one of the halves each.
__device__ __forceinline__ void sum_channels(float (&sums)[2][4], const float (&f)[OWN][OWN], const Parts (&vector)[2],
                                             int step, int lane) {
  unsigned b[2][PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    b[0][i] = lane / 8 == step ? vector[0].at[i] : 0;
    b[1][i] = lane / 8 == step ? vector[1].at[i] : 0;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float(&low)[OWN] = f[i], (&high)[OWN] = f[i + 2];
    const Parts p[4] = {parts(low[0], low[1]), parts(high[0], high[1]), parts(low[2], low[3]), parts(high[2], high[3])};
    const unsigned a[4] = {p[0].at[0], p[1].at[0], p[2].at[0], p[3].at[0]};
    multiply_bf16(sums[i], a, b[0][0], b[1][0]);
#if HALF
    const unsigned rest[4] = {p[0].at[1], p[1].at[1], p[2].at[1], p[3].at[1]};
    multiply_bf16(sums[i], rest, b[0][0], b[1][0]);
    multiply_bf16(sums[i], a, b[0][1], b[1][1]);
#endif
  }
}

// Both halves together: of step lane % 4, for the lane's first two states or, where it owns upper channels, the others.
__device__ __forceinline__ float2 total(const float (&sums)[2][4], int lane) {
  const bool upper = lane & 4;
  float v[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    v[i] = (upper ? sums[i][3] : sums[i][0]) + __shfl_xor_sync(~0u, upper ? sums[i][1] : sums[i][2], 4);
  return make_float2(v[0], v[1]);
}

// Sum over the four lanes that share four channels; a lane gets that of one channel.
__device__ __forceinline__ float sum_states(const float (&v)[OWN], bool upper, bool odd) {
  const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 16);
  const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 16);
  return (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
}

// softplus' at v from d = softplus(v): 1 - e^-d, by a series where that would lose its digits.
__device__ __forceinline__ float softplus_slope(float d) {
  return d < 0.0078125f ? fmaf(d * d, -0.5f, d) : 1.f - exp2_fast(d * -LOG2E);
}

__device__ __forceinline__ void load_decays(float (&a)[OWN][OWN], const float* A_log, const Walk& w) {
#pragma unroll
  for (int c = 0; c < OWN; c++) {
    float v[OWN];
    load4(v, A_log + (long long)(w.channel0 + w.channel() + c) * STATE + w.state());
#pragma unroll
    for (int n = 0; n < OWN; n++) a[n][c] = decay_rate(v[n]);
  }
}

// u, x, weight, bias, skip, A_log of both directions and bounds as in scan_forward; grad (batch, L, D) with rows of 2 D,
// the gradient of y. Q (2 batch, chunks, 16, D), only where CHUNKED: the gradient of the state that leaves each chunk.
// grad_u, grad_delta (2, batch, L, D), the latter before softplus. Partial sums: part_x (D / 32, 2, batch, L, 32) for B and
// C, part_p (2 batch, chunks, 18 D) for bias (D), A_log (D, 16) and skip (D). A grid of (D / 32, chunks, 2 batch)
// warps; `chunk` tokens, a multiple of 16 if there are several. Offsets in a sequence are 32 bits: 4 L D < 2^31.
extern "C" __global__ void __launch_bounds__(32, BLOCKS)
scan_backward(const T* u_f, const T* u_b, const T* x_f, const T* x_b, const T* weight_f, const T* weight_b,
              const float* bias_f, const float* bias_b, const float* A_f, const float* A_b, const float* skip_f,
              const float* skip_b, const T* grad, const T* bounds, const float* Q, T* grad_u, T* grad_delta,
              float* part_x, float* part_p, int batch, int length, int dim, int chunk) {
  __shared__ Shared s;
  const Walk w(batch, length, chunk);
  const int lane = w.lane, states = w.state(), own = w.channel();
  const bool reverse = w.flip, upper = lane & 16, odd = lane & 8;
  const int single = own + 2 * upper + odd;  // the channel whose results come to this lane

  const T* u = (reverse ? u_b : u_f) + w.row0 * dim + w.channel0;
  const T* x = (reverse ? x_b : x_f) + w.row0 * ROW;
  grad += w.row0 * 2 * dim + w.channel0;
  grad_u += ((long long)w.cell * length) * dim + w.channel0;
  grad_delta += ((long long)w.cell * length) * dim + w.channel0;
  bounds += (long long)w.cell * ((length + GROUP - 1) / GROUP) * STATE * dim + w.channel0;
  // Of a group's four steps one lane of four writes the sums over channels.
  const int summed = (lane ^ w.flip) % GROUP;
  part_x += (((long long)blockIdx.x * 2 * batch + w.cell) * length + summed) * (2 * STATE) + states + lane / 4 % 2 * 2;
  const long long part = (long long)w.cell * gridDim.y + blockIdx.y;

  const auto copy_tile = [&](int k) {
    if (k < w.tiles) {
      const int t0 = w.first(k), rows_left = w.end - t0;
      copy_projections(s.x, x + t0 * ROW, rows_left, w.lane);
      copy_rows(s.u[k % 2], u + t0 * dim, dim, rows_left, w);
      copy_rows(s.grad[k % 2], grad + t0 * 2 * dim, 2 * dim, rows_left, w);
    }
    copies_commit();
  };
  // Groups of four tokens, the first of them `now`, against scan order; the state on its entry is copied two groups ahead.
  const int along = reverse ? GROUP : -GROUP;
  int now = reverse ? w.begin : w.begin + w.tiles * TILE - GROUP, ahead = now;
  const int copied = lane / 4, copied_column = lane % 4 * 8;
  bounds += ((long long)now / GROUP * STATE + copied) * dim + copied_column;
  const auto copy_bounds = [&](int slot) {
    if (ahead >= w.begin && ahead < w.end) {
      T* to = &s.bounds[slot][copied % OWN][copied / OWN][copied_column];
      copy16(to, bounds, true);
      copy16(to + 2 * BACKWARD_CHANNELS, bounds + 8 * dim, true);  // 8 states on
    }
    copies_commit();
    ahead += along;
    bounds += along / GROUP * STATE * dim;
  };
  copy_step_sizes(s, reverse ? weight_b : weight_f, reverse ? bias_b : bias_f, w);
  copy_tile(0);
  copy_bounds(1);
  copy_bounds(0);

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
    for (int group = TILE / GROUP - 1; group >= 0; group--) {
      const int row = group * GROUP;
      copies_wait<1>();  // for this group's state; what was asked for last, the next state or a tile, may be on its way
      if (now < w.end) {
        float h[GROUP + 1][OWN][OWN], e[GROUP][OWN][OWN];
#pragma unroll
        for (int n = 0; n < OWN; n++) load4(h[0][n], &s.bounds[group % 2][n][lane / 8][own]);
        float* to = part_x + now * (2 * STATE);
        float sum_c[2][4] = {}, sum_b[2][4] = {};
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          Operands at;
          at.load_state(s, stage, row + i, own, states);
#pragma unroll
          for (int n = 0; n < OWN; n++)
#pragma unroll
            for (int c = 0; c < OWN; c++) {
              e[i][n][c] = exp2_fast(at.d[c] * a[n][c]);
              h[i + 1][n][c] = fmaf(e[i][n][c], h[i][n][c], at.v[c] * at.b[n]);
            }
          const Parts g2[2] = {parts(at.grad[0]), parts(at.grad[1])};
          sum_channels(sum_c, h[i + 1], g2, i, lane);
        }
        const float2 total_c = total(sum_c, lane);
        if (now + summed < w.end) *(float2*)&to[STATE] = total_c;
        const int again = anew(row);  // what both recurrences need is loaded twice: no registers are left to keep it
        float grad_v[GROUP], grad_d[GROUP];
#pragma unroll
        for (int i = GROUP - 1; i >= 0; i--) {
          Operands at;
          at.load_gradient(s, stage, again + i, own, states);
          float g[OWN], to_v[OWN], to_d[OWN], grad_h[OWN][OWN];
          at.widen(g);
#pragma unroll
          for (int n = 0; n < OWN; n++)
#pragma unroll
            for (int c = 0; c < OWN; c++) {
              grad_h[n][c] = fmaf(g[c], at.c[n], q[n][c]);
              to_v[c] = n ? fmaf(grad_h[n][c], at.b[n], to_v[c]) : grad_h[n][c] * at.b[n];
              q[n][c] = e[i][n][c] * grad_h[n][c];
              const float p = q[n][c] * h[i][n][c];
              to_d[c] = n ? fmaf(p, a[n][c], to_d[c]) : p * a[n][c];
              grad_A[n][c] = fmaf(p, at.d[c], grad_A[n][c]);
            }
          sum_channels(sum_b, grad_h, at.packed, i, lane);
          grad_v[i] = sum_states(to_v, upper, odd);
          grad_d[i] = sum_states(to_d, upper, odd);
        }
        __syncwarp();
        // One channel a lane. The results take the place of u and grad.
        float v[GROUP], g[GROUP], d[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          v[i] = unpack(s.u[stage][row + i][single]).x;
          g[i] = unpack(s.grad[stage][row + i][single]).x;
          d[i] = s.delta[row + i][single];
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
          const float to_delta = fmaf(v[i], grad_v[i], LN2 * grad_d[i]) * softplus_slope(d[i]);
          grad_bias += to_delta;
          grad_skip = fmaf(g[i], v[i], grad_skip);
          const T2 both = pack(fmaf(d[i], grad_v[i], skip * g[i]), to_delta);
          s.u[stage][row + i][single] = (T)both;
          s.grad[stage][row + i][single] = (T)(both >> 16);
        }
        const float2 total_b = total(sum_b, lane);
        if (now + summed < w.end) *(float2*)to = total_b;
        __syncwarp();
      }
      copy_bounds(group % 2);
      now += along;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILE * BACKWARD_CHANNELS / 8 / 32; i++) {
      const int row = i * 8 + lane / 4, column = lane % 4 * 8, token = row ^ w.flip;
      if (token < rows_left) {
        const int at = (t0 + token) * dim + column;
        *(uint4*)&grad_u[at] = *(const uint4*)&s.u[stage][row][column];
        *(uint4*)&grad_delta[at] = *(const uint4*)&s.grad[stage][row][column];
      }
    }
  }

  part_p += part * (STATE + 2) * dim;
  part_p[w.channel0 + single] = grad_bias;
  part_p += dim;
#pragma unroll
  for (int c = 0; c < OWN; c++) {
    float v[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) v[n] = grad_A[n][c] * a[n][c] * LN2;
    *(float4*)&part_p[(w.channel0 + own + c) * STATE + states] = make_float4(v[0], v[1], v[2], v[3]);
  }
  part_p[STATE * dim + w.channel0 + single] = grad_skip;
}

// Q (2 batch, chunks, 16, D): the gradient of the state that enters each chunk, from zero at the chunk's end.
// Grid as above.
extern "C" __global__ void __launch_bounds__(32, 12)
grad_states(const T* x_f, const T* x_b, const T* weight_f, const T* weight_b, const float* bias_f,
            const float* bias_b, const float* A_f, const float* A_b, const T* grad, float* Q, int batch, int length,
            int dim, int chunk) {
  __shared__ Shared s;
  const Walk w(batch, length, chunk);
  const int states = w.state(), own = w.channel();
  const bool reverse = w.flip;
  const T* x = (reverse ? x_b : x_f) + w.row0 * ROW;
  grad += w.row0 * 2 * dim + w.channel0;
  const auto copy_tile = [&](int k) {
    if (k < w.tiles) {
      const int t0 = w.first(k), rows_left = w.end - t0;
      copy_projections(s.x, x + t0 * ROW, rows_left, w.lane);
      copy_rows(s.grad[k % 2], grad + t0 * 2 * dim, 2 * dim, rows_left, w);
    }
    copies_commit();
  };
  copy_step_sizes(s, reverse ? weight_b : weight_f, reverse ? bias_b : bias_f, w);
  copy_tile(0);
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
        load4(d, &s.delta[row + i][own]);
        load4(c4, &s.bc[row + i][STATE + states]);
        load4(g, &s.grad[stage][row + i][own]);
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
