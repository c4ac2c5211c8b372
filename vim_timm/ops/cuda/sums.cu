// Partial sums of other kernels, added in a fixed order: two runs give the same bits. And gradients of weights as float32.

constexpr int WARPS = 8;

__device__ __forceinline__ void add(float4& sum, float4 v) {
  sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
}

// parts (groups, rows, columns) to `columns` numbers at each `stride`-th of sums, float32. A block takes 128 columns, its warps every eighth row.
// A grid of (columns / 128, groups) blocks.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
sum_rows(const float* parts, float* sums, int rows, int columns, int stride) {
  __shared__ float4 shared[WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 128 + lane * 4;
  parts += (long long)blockIdx.y * rows * columns + column;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int row = warp; row < rows; row += WARPS) add(sum, *(const float4*)&parts[(long long)row * columns]);
  shared[warp][lane] = sum;
  block_sync();
  if (warp > 0) return;
#pragma unroll
  for (int i = 1; i < WARPS; i++) add(sum, shared[i][lane]);
  *(float4*)&sums[blockIdx.y * stride + column] = sum;
}

// parts (rows, tokens, 32) float32, gradients of B and C, to the last 32 columns of (tokens, ROW), in two bytes. A thread
// takes 4 columns of a token.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
sum_projections(const float* parts, T* sums, int rows, int tokens) {
  const int i = blockIdx.x * 32 * WARPS + threadIdx.x, token = i / 8, column = i % 8 * 4;
  if (token >= tokens) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 6
  for (int row = 0; row < rows; row++)
    add(sum, *(const float4*)&parts[((long long)row * tokens + token) * (2 * STATE) + column]);
  *(uint2*)&sums[(long long)token * ROW + RANK_PAD + column] = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
}

// Gradients of weights to where `Mixer.backward` returns them, `direction` numbers of each direction, the first of which
// sum_rows has written: of four taps and the bias (2, 5, dim), dt (2, dim, RANK_PAD), x_proj (2, ROW, dim), and `others`
// of out_proj. A thread for one number of each.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
widen_gradients(const float* taps, const T* dt, const T* x_proj, const T* out_proj, float* weights, int direction, int dim,
                int width, int others) {
  const int i = blockIdx.x * 32 * WARPS + threadIdx.x, row = i / dim;
#pragma unroll
  for (int d = 0; d < 2; d++, taps += 5 * dim, dt += dim * RANK_PAD, x_proj += ROW * dim) {
    float* to = weights + d * direction + (STATE + 2) * dim;
    if (row < width) to[i] = taps[(4 - width + i % width) * dim + i / width];
    to += width * dim;
    if (row == 0) to[i] = taps[4 * dim + i];
    to += dim;
    if (row < RANK) to[i] = unpack(dt[i / RANK * RANK_PAD + i % RANK]).x;
    to += RANK * dim;
    if (row < RANK + 2 * STATE) to[i] = unpack(x_proj[row < RANK ? i : i + (RANK_PAD - RANK) * dim]).x;
  }
  if (i < others) weights[2 * direction + i] = unpack(out_proj[i]).x;
}
