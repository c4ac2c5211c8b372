// The short depthwise convolution of both directions with SiLU, in one pass over the tokens, forward and backward.
//
// The same four rows x[t .. t + 3] give the forward direction's output at t + 3 (tap k meets x[t + k]) and the backward
// direction's at t (tap k meets x[t + 3 - k]). So a warp walks over its tokens, and three before them, with a window of
// four rows in registers, eight steps at a time: the next eight rows are on their way while these are used, for what
// limits it is memory. A convolution narrower than 4 has zeros before its first tap.
//
// Macros beside common.cuh's: WIDTH (1 to 4), HAS_BIAS (0 or 1).

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
#pragma unroll
      for (int k = 0; k < 4; k++) tap[k][c] = k < 4 - WIDTH ? 0.f : weight[(channel + c) * WIDTH + k - (4 - WIDTH)];
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

// Projection weights (RANK + 32, dim) float32 of both directions to packed (2, ROW, dim), zeros from RANK to RANK_PAD.
__device__ void pack_weights(const float* forward, const float* backward, T* packed, int dim, int thread, int threads) {
  for (int i = thread; i < ROW * dim / 2; i += threads) {
    const int row = 2 * i / dim, source = row < RANK ? row : row - (RANK_PAD - RANK);
    float2 f = {}, b = {};
    if (row < RANK || row >= RANK_PAD) {
      f = *(const float2*)&forward[source * dim + 2 * i % dim];
      b = *(const float2*)&backward[source * dim + 2 * i % dim];
    }
    ((T2*)packed)[i] = pack(f.x, f.y);
    ((T2*)packed)[ROW * dim / 2 + i] = pack(b.x, b.y);
  }
}

// u of both directions (batch, L, dim) contiguous from x (batch, L, dim) with rows of x_stride. Blocks from `blocks` on
// pack the weights of the projection that comes next.
extern "C" __global__ void __launch_bounds__(128, 4)
conv_forward(const T* x, long long x_stride, const float* weight_f, const float* weight_b, const float* bias_f,
             const float* bias_b, T* u_f, T* u_b, const float* project_f, const float* project_b, T* packed, int blocks,
             int batch, int length, int dim, int span) {
  if (blockIdx.x >= blocks) {
    pack_weights(project_f, project_b, packed, dim, (blockIdx.x - blocks) * 128 + threadIdx.x,
                 (gridDim.x - blocks) * 128);
    return;
  }
  const Place place(4, length, dim, span);
  if (place.channel >= dim || place.entry >= batch) return;
  const Taps<4> f(weight_f, bias_f, place.channel), b(weight_b, bias_b, place.channel);
  const long long row0 = (long long)place.entry * length;
  x += row0 * x_stride + place.channel;
  u_f += row0 * dim + place.channel;
  u_b += row0 * dim + place.channel;

  int t = place.begin - REACH;
  Row<2> window[REACH + GROUP];
  Raw<2> next[GROUP];
#pragma unroll
  for (int i = 0; i < REACH; i++) window[i] = widen(load_row<2>(x, x_stride, t + i, length));
#pragma unroll
  for (int i = 0; i < GROUP; i++) next[i] = load_row<2>(x, x_stride, t + REACH + i, length);
  for (; t < place.end; t += GROUP) {
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      window[REACH + i] = widen(next[i]);
      next[i] = load_row<2>(x, x_stride, t + REACH + GROUP + i, length);
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      float y[4], y_b[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        y[c] = f.bias[c];
        y_b[c] = b.bias[c];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          y[c] = fmaf(f.tap[k][c], window[i + k].at[c], y[c]);
          y_b[c] = fmaf(b.tap[k][c], window[i + 3 - k].at[c], y_b[c]);
        }
        y[c] *= sigmoid(y[c]);
        y_b[c] *= sigmoid(y_b[c]);
      }
      const int t_f = t + i + REACH, t_b = t + i;
      if (t_f < place.end) store_row<2>(&u_f[(long long)t_f * dim], y);
      if (t_b >= place.begin && t_b < place.end) store_row<2>(&u_b[(long long)t_b * dim], y_b);
    }
#pragma unroll
    for (int i = 0; i < REACH; i++) window[i] = window[GROUP + i];
  }
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
