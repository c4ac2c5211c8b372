// The gradients of the short depthwise convolution of both directions with SiLU.
//
// A warp walks over its tokens, and three before them, with a window of rows in registers, eight steps at a time: the next
// eight rows are on their way while these are used. What the projections' gradient adds to that of u is added here, by the
// matrix unit, and reaches the lanes that convolve through shared memory.

static_assert(CHANNELS == 64 && CONV_GROUP == 8, "a lane owns two channels, and four lanes share a token's gradients");
constexpr int PAD = 8;  // rows of 144 bytes: eight of them have no banks in common

struct Shared {
  alignas(16) T x_proj[2][ROW][CHANNELS + PAD];
  T2 grad[CONV_WARPS][2][CONV_GROUP][CHANNELS / 2];  // pairs of channels of row r exchanged by 4 r, against bank conflicts
};

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

// Which tokens a warp owns. Blocks go over groups of channels first, then over spans of a sequence and the batch.
struct Place {
  int channel0, entry, begin, end, index;

  __device__ __forceinline__ Place(int length, int dim, int span) {
    const int groups = dim / CHANNELS, spans = (length + span - 1) / span;
    channel0 = blockIdx.x % groups * CHANNELS;
    index = blockIdx.x / groups * CONV_WARPS + threadIdx.x / 32;  // of the span in all sequences
    entry = index / spans;
    begin = index % spans * span;
    end = min(begin + span, length);
  }
};

// Gradients of eight tokens, as the matrix unit takes and gives them: of row lane / 4 every fourth pair of channels of u,
// and its share of the projections.
struct Gradients {
  T2 u[CHANNELS / 8], x[ROW / 16][2];

  // Zeros beyond the ends.
  __device__ __forceinline__ void load(const T* grad_u, const T* grad_x, int dim, int t, int length, int lane) {
    const int token = t + lane / 4;
    const bool valid = token >= 0 && token < length;
    grad_u += (long long)token * dim + lane % 4 * 2;
    grad_x += (long long)token * ROW + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < CHANNELS / 8; i++) u[i] = valid ? *(const T2*)&grad_u[8 * i] : 0;
#pragma unroll
    for (int k = 0; k < ROW / 16; k++)
#pragma unroll
      for (int half = 0; half < 2; half++) x[k][half] = valid ? *(const T2*)&grad_x[16 * k + 8 * half] : 0;
  }

  // u + x x_proj.
  __device__ __forceinline__ void add(T2 (*to)[CHANNELS / 2], const T (*x_proj)[CHANNELS + PAD], int lane) const {
    const int row = lane / 4;
#pragma unroll
    for (int n = 0; n < CHANNELS / 8; n += 2) {
      const float2 low = unpack(u[n]), high = unpack(u[n + 1]);
      float sum[2][4] = {{low.x, low.y, 0.f, 0.f}, {high.x, high.y, 0.f, 0.f}};
#pragma unroll
      for (int k = 0; k < ROW / 16; k++) {
        unsigned b[4];
        load_transposed(b, &x_proj[16 * k + lane / 8 % 2 * 8 + lane % 8][8 * n + lane / 16 * 8]);
        const unsigned a[4] = {x[k][0], 0, x[k][1], 0};
        multiply(sum[0], a, b[0], b[1]);
        multiply(sum[1], a, b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) to[row][(4 * (n + i) + lane % 4) ^ 4 * row] = pack(sum[i][0], sum[i][1]);
    }
  }
};

// The gradient before the activation of y.
__device__ __forceinline__ float through_silu(float grad, float y) {
  const float s = sigmoid(y);
  return grad * s * fmaf(y, 1.f - s, 1.f);
}

// grad (batch, L, dim) with rows of x_stride, the gradient of x, from those of u by the scan (2, batch, L, dim) and of its
// projections (2, batch, L, ROW), with x_proj (2, ROW, dim); sums (spans of all sequences, 2, 5, dim): of tap 0 to 3 and of
// the bias, to be added in a fixed order. p and q are the gradients before the activation of the forward and the backward
// direction; x[t] meets p[t .. t + 3] and q[t - 3 .. t].
extern "C" __global__ void __launch_bounds__(32 * CONV_WARPS, 3)
conv_backward(const T* x, long long x_stride, const float* weight_f, const float* weight_b, const float* bias_f,
              const float* bias_b, const T* grad_u, const T* grad_x, const T* x_proj, T* grad, float* sums, int batch,
              int length, int dim, int span) {
  __shared__ Shared shared;
  const Place place(length, dim, span);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = place.channel0 + 2 * lane;
#pragma unroll
  for (int i = threadIdx.x; i < 2 * ROW * CHANNELS / 8; i += 32 * CONV_WARPS) {
    const int row = i / (CHANNELS / 8), column = i % (CHANNELS / 8) * 8;
    copy16(&shared.x_proj[0][0][0] + row * (CHANNELS + PAD) + column, x_proj + row * dim + place.channel0 + column, true);
  }
  copies_commit();
  copies_wait<0>();
  block_sync();
  if (place.entry >= batch) return;
  const Taps f(weight_f, bias_f, channel), b(weight_b, bias_b, channel);
  const long long row0 = (long long)place.entry * length, other = (long long)batch * length;
  x += row0 * x_stride + channel;
  grad += row0 * x_stride + channel;
  grad_u += row0 * dim + place.channel0;
  grad_x += row0 * ROW;
  const T *grad_u_b = grad_u + other * dim, *grad_x_b = grad_x + other * ROW;

  int t = place.begin - REACH;
  Row window[REACH + CONV_GROUP];
  T2 next[CONV_GROUP];
  Gradients next_f, next_b;
  float p[REACH + CONV_GROUP][2] = {}, q[REACH + CONV_GROUP][2] = {};
  float sum_f[5][2] = {}, sum_b[5][2] = {};
#pragma unroll
  for (int i = 0; i < REACH; i++) window[i] = widen(load_row(x, x_stride, t + i, length));
#pragma unroll
  for (int i = 0; i < CONV_GROUP; i++) next[i] = load_row(x, x_stride, t + REACH + i, length);
  next_f.load(grad_u, grad_x, dim, t + REACH, length, lane);
  next_b.load(grad_u_b, grad_x_b, dim, t, length, lane);
  for (; t < place.end; t += CONV_GROUP) {
    T2(*through)[CONV_GROUP][CHANNELS / 2] = shared.grad[warp];
    next_f.add(through[0], shared.x_proj[0], lane);
    next_b.add(through[1], shared.x_proj[1], lane);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CONV_GROUP; i++) {
      window[REACH + i] = widen(next[i]);
      next[i] = load_row(x, x_stride, t + REACH + CONV_GROUP + i, length);
    }
    next_f.load(grad_u, grad_x, dim, t + REACH + CONV_GROUP, length, lane);
    next_b.load(grad_u_b, grad_x_b, dim, t + CONV_GROUP, length, lane);
#pragma unroll
    for (int i = 0; i < CONV_GROUP; i++) {
      const Row g_f = widen(through[0][i][lane ^ 4 * i]), g_b = widen(through[1][i][lane ^ 4 * i]);
      const bool own_f = t + i + REACH < place.end, own_b = t + i >= place.begin && t + i < place.end;
      float to_x[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float y = f.bias[c], y_b = b.bias[c];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          y = fmaf(f.tap[k][c], window[i + k].at[c], y);
          y_b = fmaf(b.tap[k][c], window[i + 3 - k].at[c], y_b);
        }
        p[REACH + i][c] = through_silu(g_f.at[c], y);
        q[REACH + i][c] = through_silu(g_b.at[c], y_b);
        const float own_p = own_f ? p[REACH + i][c] : 0.f, own_q = own_b ? q[REACH + i][c] : 0.f;
        to_x[c] = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          sum_f[k][c] = fmaf(own_p, window[i + k].at[c], sum_f[k][c]);
          sum_b[k][c] = fmaf(own_q, window[i + 3 - k].at[c], sum_b[k][c]);
          to_x[c] = fmaf(f.tap[k][c], p[i + 3 - k][c], to_x[c]);
          to_x[c] = fmaf(b.tap[k][c], q[i + k][c], to_x[c]);
        }
        sum_f[4][c] += own_p;
        sum_b[4][c] += own_q;
      }
      if (own_b) *(T2*)&grad[(t + i) * x_stride] = pack(to_x[0], to_x[1]);
    }
#pragma unroll
    for (int i = 0; i < REACH; i++) {
      window[i] = window[CONV_GROUP + i];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        p[i][c] = p[CONV_GROUP + i][c];
        q[i][c] = q[CONV_GROUP + i][c];
      }
    }
    __syncwarp();  // the next gradients overwrite what other lanes may still read
  }
  sums += (long long)place.index * 10 * dim + channel;
#pragma unroll
  for (int k = 0; k < 5; k++) {
    *(float2*)&sums[k * dim] = make_float2(sum_f[k][0], sum_f[k][1]);
    *(float2*)&sums[(5 + k) * dim] = make_float2(sum_b[k][0], sum_b[k][1]);
  }
}
