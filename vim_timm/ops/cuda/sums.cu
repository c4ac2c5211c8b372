// Partial sums of other kernels, added in a fixed order: two runs give the same bits.

constexpr int WARPS = FLAT_THREADS / 32;
static_assert(SUM_COLUMNS == 32 * 4, "a lane takes four columns");

__device__ __forceinline__ void add(float4& sum, float4 v) {
  sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
}

// parts (groups, rows, columns), float32: the sum over the rows of group g to sums + g * stride. A block takes SUM_COLUMNS
// columns, its warps every eighth row. A grid of (columns / SUM_COLUMNS, groups) blocks.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
sum_rows(const float* parts, float* sums, int rows, int columns, int stride) {
  __shared__ float4 shared[WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * SUM_COLUMNS + lane * 4;
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
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
sum_projections(const float* parts, T* sums, int rows, int tokens) {
  const int i = blockIdx.x * FLAT_THREADS + threadIdx.x, token = i / 8, column = i % 8 * 4;
  if (token >= tokens) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 6
  for (int row = 0; row < rows; row++)
    add(sum, *(const float4*)&parts[((long long)row * tokens + token) * (2 * STATE) + column]);
  *(uint2*)&sums[(long long)token * ROW + RANK_PAD + column] = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
}
