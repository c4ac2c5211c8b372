// The gradients of a block's weights: those of the projections, which are sums of outer products over all tokens, and the
// order in which `Mixer.backward` returns all of them.
//
// A library's product would be slow at these shapes, thousands of tokens for a few rows and columns, and take a call for
// each of four. Here a block sums over a part of the tokens, so that blocks fill the device; sums.cu adds them up.

constexpr int WARPS = CHANNELS / 16;    // of a block
constexpr int TOKENS = PRODUCT_TOKENS;  // in shared memory at once, while the next are on their way
constexpr int COLUMNS = RANK_PAD + ROW;
constexpr int PAD = 8;  // rows of 144, 208 or 272 bytes: eight of them have no banks in common

struct Stage {
  alignas(16) T channels[2][TOKENS][CHANNELS + PAD];  // grad_delta and u
  alignas(16) T columns[TOKENS][COLUMNS + PAD];       // dt, and the gradient of the projections
};

// parts (2, gridDim.y, dim, COLUMNS) float32: for each channel the sum over tokens of grad_delta times dt, the first RANK_PAD
// columns of x, and of u times grad_x. grad_delta and u are (2, tokens, dim), x and grad_x (2, tokens, ROW). A grid of
// (dim / 64, parts of `span` tokens, 2) blocks.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
sum_outer_products(const T* grad_delta, const T* u, const T* x, const T* grad_x, float* parts, int tokens, int dim,
                   int span) {
  __shared__ Stage shared[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel0 = blockIdx.x * CHANNELS;
  const int begin = blockIdx.y * span, end = min(begin + span, tokens);
  const long long first = (long long)blockIdx.z * tokens;
  grad_delta += first * dim + channel0;
  u += first * dim + channel0;
  x += first * ROW;
  grad_x += first * ROW;

  const auto copy_tokens = [&](int t0) {
    if (t0 < end) {
      Stage& s = shared[(t0 - begin) / TOKENS % 2];
      const T *delta_0 = grad_delta + (long long)t0 * dim, *u_0 = u + (long long)t0 * dim;
      const T *x_0 = x + (long long)t0 * ROW, *grad_x_0 = grad_x + (long long)t0 * ROW;
#pragma unroll
      for (int i = 0; i < TOKENS * CHANNELS / 8; i += 32 * WARPS) {
        const int at = i + threadIdx.x, row = at / (CHANNELS / 8), column = at % (CHANNELS / 8) * 8;
        copy16(&s.channels[0][row][column], delta_0 + (row * dim + column), t0 + row < end);
        copy16(&s.channels[1][row][column], u_0 + (row * dim + column), t0 + row < end);
      }
#pragma unroll
      for (int i = 0; i < TOKENS * COLUMNS / 8; i += 32 * WARPS) {
        const int at = i + threadIdx.x, row = at / (COLUMNS / 8), column = at % (COLUMNS / 8) * 8;
        const T* from = column < RANK_PAD ? x_0 + column : grad_x_0 + (column - RANK_PAD);
        copy16(&s.columns[row][column], from + row * ROW, t0 + row < end);
      }
    }
    copies_commit();
  };

  float acc[COLUMNS / 8][4] = {};
  copy_tokens(begin);
  for (int t0 = begin; t0 < end; t0 += TOKENS) {
    const Stage& s = shared[(t0 - begin) / TOKENS % 2];
    copy_tokens(t0 + TOKENS);
    copies_wait<1>();
    block_sync();
#pragma unroll
    for (int k = 0; k < TOKENS; k += 16) {
      // Tokens are the rows in memory, but what a product sums over: both factors are read transposed.
      unsigned a[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++)
        load_transposed(a[i], &s.channels[i][k + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8]);
#pragma unroll
      for (int n = 0; n < COLUMNS; n += 16) {
        unsigned b[4];
        load_transposed(b, &s.columns[k + lane / 8 % 2 * 8 + lane % 8][n + lane / 16 * 8]);
        multiply(acc[n / 8], a[n >= RANK_PAD], b[0], b[1]);
        multiply(acc[n / 8 + 1], a[n >= RANK_PAD], b[2], b[3]);
      }
    }
    block_sync();  // the copies after next overwrite this stage
  }
  parts += ((long long)(blockIdx.z * gridDim.y + blockIdx.y) * dim + channel0 + 16 * warp + lane / 4) * COLUMNS + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; n++) {
    *(float2*)&parts[8 * n] = make_float2(acc[n][0], acc[n][1]);
    *(float2*)&parts[8 * COLUMNS + 8 * n] = make_float2(acc[n][2], acc[n][3]);
  }
}

// Gradients to where `Mixer.backward` returns them, `direction` numbers of each direction, the first of which sum_rows has
// written: of four taps and the bias (2, 5, dim), of dt and x_proj in `products` (2, dim, COLUMNS), and `others` of
// out_proj. A thread for one number of each.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
place_gradients(const float* taps, const float* products, const T* out_proj, float* weights, int direction, int dim,
                int width, int others) {
  const int i = blockIdx.x * FLAT_THREADS + threadIdx.x, row = i / dim;
#pragma unroll
  for (int d = 0; d < 2; d++, taps += 5 * dim, products += dim * COLUMNS) {
    float* to = weights + d * direction + (STATE + 2) * dim;
    if (row < width) to[i] = taps[(4 - width + i % width) * dim + i / width];
    to += width * dim;
    if (row == 0) to[i] = taps[4 * dim + i];
    to += dim;
    if (row < RANK) to[i] = products[i / RANK * COLUMNS + i % RANK];
    to += RANK * dim;
    if (row < RANK + 2 * STATE) to[i] = products[i % dim * COLUMNS + RANK_PAD + (row < RANK ? row : row + RANK_PAD - RANK)];
  }
  if (i < others) weights[2 * direction + i] = unpack(out_proj[i]).x;
}
