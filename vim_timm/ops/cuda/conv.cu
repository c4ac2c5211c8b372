// The short depthwise convolution of both directions with SiLU, forward together with the projection of its result, and
// backward.
//
// The same rows x[t - 3 .. t + 3] give both directions' outputs at t: tap k meets x[t - 3 + k] forward and x[t + 3 - k]
// backward. A convolution narrower than 4 has zeros before its first tap.
//
// Macros beside common.cuh's: WIDTH (1 to 4), HAS_BIAS, PROJECT (0 or 1, see conv_project).

constexpr int REACH = 3, GROUP = 8;

// Neighbouring channels of a lane: PAIRS * 2.
template <int PAIRS>
struct Row {
  float at[2 * PAIRS];
};

template <int PAIRS>
struct Raw {
  T2 at[PAIRS];
};

template <int PAIRS>
__device__ __forceinline__ Raw<PAIRS> load_row(const T* x, long long stride, int t, int length) {
  Raw<PAIRS> r = {};
  if (t >= 0 && t < length) {
    if constexpr (PAIRS == 2) {
      uint2 v = *(const uint2*)&x[t * stride];
      r.at[0] = v.x, r.at[1] = v.y;
    } else {
      r.at[0] = *(const T2*)&x[t * stride];
    }
  }
  return r;
}

template <int PAIRS>
__device__ __forceinline__ Row<PAIRS> widen(Raw<PAIRS> r) {
  Row<PAIRS> f;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float2 v = unpack(r.at[i]);
    f.at[2 * i] = v.x, f.at[2 * i + 1] = v.y;
  }
  return f;
}

template <int PAIRS>
__device__ __forceinline__ void store_row(T* to, const float (&f)[2 * PAIRS]) {
  if constexpr (PAIRS == 2)
    *(uint2*)to = make_uint2(pack(f[0], f[1]), pack(f[2], f[3]));
  else
    *(T2*)to = pack(f[0], f[1]);
}

template <int C>
struct Taps {
  float tap[4][C], bias[C];

  __device__ __forceinline__ Taps(const float* weight, const float* bias_, int channel) {
#pragma unroll
    for (int c = 0; c < C; c++) {
#if WIDTH == 4
      const float4 v = *(const float4*)&weight[(channel + c) * 4];
      tap[0][c] = v.x, tap[1][c] = v.y, tap[2][c] = v.z, tap[3][c] = v.w;
#else
#pragma unroll
      for (int k = 0; k < 4; k++) tap[k][c] = k < 4 - WIDTH ? 0.f : weight[(channel + c) * WIDTH + k - (4 - WIDTH)];
#endif
      bias[c] = HAS_BIAS ? bias_[channel + c] : 0.f;
    }
  }
};

// Which part of the tensors a warp owns: warps go over channels first, then over spans of a sequence, then the batch.
struct Place {
  int channel, entry, begin, end, spans, index;

  __device__ __forceinline__ Place(int channels, int length, int dim, int span) {
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, blocks = (dim + 32 * channels - 1) / (32 * channels);
    spans = (length + span - 1) / span;
    channel = (warp % blocks * 32 + threadIdx.x % 32) * channels;
    index = warp / blocks;  // of the span in all sequences
    entry = index / spans;
    begin = index % spans * span;
    end = min(begin + span, length);
  }
};

// Weights in two bytes. Those of the projection, (RANK + 32, dim) float32 of each direction, to packed (2, ROW, dim) with
// zeros from RANK to RANK_PAD, and `others` neighbouring numbers of out_proj.
extern "C" __global__ void __launch_bounds__(256)
pack_weights(const float* forward, const float* backward, T* packed, const float* out_proj, T* packed_out, int dim,
             int others) {
  const int i = 2 * (blockIdx.x * 256 + threadIdx.x), row = i / dim, column = i % dim;
  if (i < others) {
    const float2 v = *(const float2*)&out_proj[i];
    *(T2*)&packed_out[i] = pack(v.x, v.y);
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

constexpr int WARPS = PROJECT ? 4 : 1;  // of a block
constexpr int TOKENS = 16;              // of a warp, the height of a product
constexpr int PART = 64;                // channels that a block has in shared memory at once
constexpr int ROWS = WARPS * TOKENS + 2 * REACH;

// Rows of 128 bytes. Where pieces of 16 bytes are read from rows at once, they stand at `piece ^ row % 8`, against conflicts.
struct Shared {
  alignas(16) T x[2][ROWS][PART];
  alignas(16) T u[WARPS][2][TOKENS][PART];
#if PROJECT
  alignas(16) T weight[2][2 * ROW][PART];
#endif
};

// u of both directions (tokens, dim) contiguous from x (tokens, dim) with rows of x_stride; sequences of `length` tokens
// one after the other. PROJECT: their projections (2, tokens, ROW) too. A warp owns 16 tokens, whatever sequences they are
// of: a lane convolves two channels of them, then they are a factor of the matrix unit. `packed` as from pack_weights.
// A grid of (tokens / (16 WARPS), PROJECT ? 1 : dim / 64) blocks.
extern "C" __global__ void __launch_bounds__(32 * WARPS, PROJECT ? 3 : 8)
conv_project(const T* x, long long x_stride, const float* weight_f, const float* weight_b, const float* bias_f,
             const float* bias_b, const T* packed, T* u_f, T* u_b, T* projected, int tokens, int length, int dim) {
  DYNAMIC_SHARED(Shared, s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block0 = blockIdx.x * WARPS * TOKENS, first = block0 + warp * TOKENS;
  const int first_part = PROJECT ? 0 : blockIdx.y, end = PROJECT ? dim / PART : first_part + 1;
  // A thread copies one piece of every 4 WARPS-th row.
  const auto copy_part = [&](int part, int stage) {
    const int thread = anew(threadIdx.x), copied = thread / 8, piece = thread % 8 * 8;
    const T* from = x + (block0 + copied - REACH) * x_stride + part * PART + piece;
#pragma unroll
    for (int i = 0; i < ROWS; i += 4 * WARPS, from += 4 * WARPS * x_stride) {
      const int row = i + copied, token = block0 + row - REACH;
      if (row < ROWS) copy16(&s.x[stage][row][piece], from, token >= 0 && token < tokens);
    }
#if PROJECT
    const T* weight = packed + (copied * dim + part * PART + piece);
#pragma unroll
    for (int i = 0; i < 2 * ROW; i += 4 * WARPS, weight += 4 * WARPS * dim)
      copy16(&s.weight[stage][i + copied][piece ^ copied % 8 * 8], weight, true);
#endif
    copies_commit();
  };

  const int position = first % length;
  // Whether all rows that the warp sees are of one sequence.
  const bool whole = position >= REACH && position + TOKENS + REACH <= length;
#if PROJECT
  float acc[2][ROW / 8][4] = {};
#endif
  copy_part(first_part, first_part % 2);
#pragma unroll 1
  for (int part = first_part; part < end; part++) {
    const int stage = part % 2, channel = part * PART + 2 * lane;
    const Taps<2> f(weight_f, bias_f, channel), b(weight_b, bias_b, channel);
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
      for (int i = 0; i < 2 * REACH; i++) row[i] = unpack(*(const T2*)&s.x[stage][warp * TOKENS + i][2 * lane]);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        row[2 * REACH] = unpack(*(const T2*)&s.x[stage][warp * TOKENS + t + 2 * REACH][2 * lane]);
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
      T* to = (d ? u_b : u_f) + (long long)(first + own / 8) * dim + part * PART + own % 8 * 8;
      uint4 v[TOKENS / 4];
#pragma unroll
      for (int i = 0; i < TOKENS / 4; i++) {
        const int row = 4 * i + own / 8;
        v[i] = *(const uint4*)&s.u[warp][d][row][(own % 8 ^ row % 8) * 8];
      }
#pragma unroll
      for (int i = 0; i < TOKENS / 4; i++, to += 4 * dim) store16(to, v[i], 4 * i + own / 8 < tokens - first);
    }
#if PROJECT
    const int reader = anew(lane);
#pragma unroll
    for (int d = 0; d < 2; d++)
#pragma unroll
      for (int k = 0; k < PART / 16; k++) {
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

// The gradient before the activation of y.
__device__ __forceinline__ float through_silu(float grad, float y) {
  const float s = sigmoid(y);
  return grad * s * fmaf(y, 1.f - s, 1.f);
}

// grad_x (batch, L, dim) with rows of x_stride from the gradients of u (batch, L, dim contiguous); sums (spans of all
// sequences, 2, 5, dim): of tap 0 to 3 and of the bias, to be added in a fixed order. p and q are the gradients before
// the activation of the forward and the backward direction; x[t] meets p[t .. t + 3] and q[t - 3 .. t].
extern "C" __global__ void __launch_bounds__(128, 3)
conv_backward(const T* x, long long x_stride, const float* weight_f, const float* weight_b, const float* bias_f,
              const float* bias_b, const T* grad_f, const T* grad_b, T* grad_x, float* sums, int batch, int length,
              int dim, int span) {
  const Place place(2, length, dim, span);
  if (place.channel >= dim || place.entry >= batch) return;
  const Taps<2> f(weight_f, bias_f, place.channel), b(weight_b, bias_b, place.channel);
  const long long row0 = (long long)place.entry * length;
  x += row0 * x_stride + place.channel;
  grad_x += row0 * x_stride + place.channel;
  grad_f += row0 * dim + place.channel;
  grad_b += row0 * dim + place.channel;

  int t = place.begin - REACH;
  Row<1> window[REACH + GROUP];
  Raw<1> next[GROUP], next_f[GROUP], next_b[GROUP];
  float p[REACH + GROUP][2] = {}, q[REACH + GROUP][2] = {};
  float sum_f[5][2] = {}, sum_b[5][2] = {};
#pragma unroll
  for (int i = 0; i < REACH; i++) window[i] = widen(load_row<1>(x, x_stride, t + i, length));
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    next[i] = load_row<1>(x, x_stride, t + REACH + i, length);
    next_f[i] = load_row<1>(grad_f, dim, t + REACH + i, length);
    next_b[i] = load_row<1>(grad_b, dim, t + i, length);
  }
  for (; t < place.end; t += GROUP) {
    Row<1> g_f[GROUP], g_b[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      window[REACH + i] = widen(next[i]);
      g_f[i] = widen(next_f[i]);
      g_b[i] = widen(next_b[i]);
      next[i] = load_row<1>(x, x_stride, t + REACH + GROUP + i, length);
      next_f[i] = load_row<1>(grad_f, dim, t + REACH + GROUP + i, length);
      next_b[i] = load_row<1>(grad_b, dim, t + GROUP + i, length);
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      const bool own_f = t + i + REACH < place.end, own_b = t + i >= place.begin && t + i < place.end;
      float grad[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float y = f.bias[c], y_b = b.bias[c];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          y = fmaf(f.tap[k][c], window[i + k].at[c], y);
          y_b = fmaf(b.tap[k][c], window[i + 3 - k].at[c], y_b);
        }
        p[REACH + i][c] = through_silu(g_f[i].at[c], y);
        q[REACH + i][c] = through_silu(g_b[i].at[c], y_b);
        const float own_p = own_f ? p[REACH + i][c] : 0.f, own_q = own_b ? q[REACH + i][c] : 0.f;
        grad[c] = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          sum_f[k][c] = fmaf(own_p, window[i + k].at[c], sum_f[k][c]);
          sum_b[k][c] = fmaf(own_q, window[i + 3 - k].at[c], sum_b[k][c]);
          grad[c] = fmaf(f.tap[k][c], p[i + 3 - k][c], grad[c]);
          grad[c] = fmaf(b.tap[k][c], q[i + k][c], grad[c]);
        }
        sum_f[4][c] += own_p;
        sum_b[4][c] += own_q;
      }
      if (own_b) store_row<1>(&grad_x[(t + i) * x_stride], grad);
    }
#pragma unroll
    for (int i = 0; i < REACH; i++) {
      window[i] = window[GROUP + i];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        p[i][c] = p[GROUP + i][c];
        q[i][c] = q[GROUP + i][c];
      }
    }
  }
  sums += (long long)place.index * 10 * dim + place.channel;
#pragma unroll
  for (int k = 0; k < 5; k++) {
    *(float2*)&sums[k * dim] = make_float2(sum_f[k][0], sum_f[k][1]);
    *(float2*)&sums[(5 + k) * dim] = make_float2(sum_b[k][0], sum_b[k][1]);
  }
}
