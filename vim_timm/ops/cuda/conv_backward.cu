// The gradients of the short depthwise convolution of both directions with SiLU.
//
// A warp walks over its tokens, and three before them, with a window of rows in registers, eight steps at a time: the next
// eight rows are on their way while these are used.

constexpr int GROUP = 8;

// Two neighbouring channels of a token, zeros beyond the ends.
__device__ __forceinline__ T2 load_row(const T* x, long long stride, int t, int length) {
  return t >= 0 && t < length ? *(const T2*)&x[t * stride] : 0;
}

struct Row {
  float at[2];
};

__device__ __forceinline__ Row widen(T2 v) {
  const float2 f = unpack(v);
  return {{f.x, f.y}};
}

// Which part of the tensors a warp owns: warps go over channels first, then over spans of a sequence, then the batch.
struct Place {
  int channel, entry, begin, end, spans, index;

  __device__ __forceinline__ Place(int length, int dim, int span) {
    const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, blocks = (dim + 63) / 64;
    spans = (length + span - 1) / span;
    channel = (warp % blocks * 32 + threadIdx.x % 32) * 2;
    index = warp / blocks;  // of the span in all sequences
    entry = index / spans;
    begin = index % spans * span;
    end = min(begin + span, length);
  }
};

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
  const Place place(length, dim, span);
  if (place.channel >= dim || place.entry >= batch) return;
  const Taps f(weight_f, bias_f, place.channel), b(weight_b, bias_b, place.channel);
  const long long row0 = (long long)place.entry * length;
  x += row0 * x_stride + place.channel;
  grad_x += row0 * x_stride + place.channel;
  grad_f += row0 * dim + place.channel;
  grad_b += row0 * dim + place.channel;

  int t = place.begin - REACH;
  Row window[REACH + GROUP];
  T2 next[GROUP], next_f[GROUP], next_b[GROUP];
  float p[REACH + GROUP][2] = {}, q[REACH + GROUP][2] = {};
  float sum_f[5][2] = {}, sum_b[5][2] = {};
#pragma unroll
  for (int i = 0; i < REACH; i++) window[i] = widen(load_row(x, x_stride, t + i, length));
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    next[i] = load_row(x, x_stride, t + REACH + i, length);
    next_f[i] = load_row(grad_f, dim, t + REACH + i, length);
    next_b[i] = load_row(grad_b, dim, t + i, length);
  }
  for (; t < place.end; t += GROUP) {
    Row g_f[GROUP], g_b[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      window[REACH + i] = widen(next[i]);
      g_f[i] = widen(next_f[i]);
      g_b[i] = widen(next_b[i]);
      next[i] = load_row(x, x_stride, t + REACH + GROUP + i, length);
      next_f[i] = load_row(grad_f, dim, t + REACH + GROUP + i, length);
      next_b[i] = load_row(grad_b, dim, t + GROUP + i, length);
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
      if (own_b) *(T2*)&grad_x[(t + i) * x_stride] = pack(grad[0], grad[1]);
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
