// What the scan's forward and backward kernels do with a tile of TILE tokens: its projections and the step sizes' weights come
// to shared memory, and the step sizes before their activation, B and C are made of them. Rows of results are in scan order
// (row p is token p ^ flip), rows of projections in order of tokens.

// A_log as kernels take it: a step's decay is exp2_fast(step * decay_rate). At most FASTEST: infinity times a step of 0 would
// be NaN, and so would the gradient of a step of 0 be where a larger number overflows.
__device__ __forceinline__ float decay_rate(float A_log) {
  const float rate = -LOG2E * exp2_fast(A_log * LOG2E);
  return rate < -FASTEST ? -FASTEST : rate;
}

// Copies the projections of a tile; tokens from `rows_left` on become zeros.
__device__ __forceinline__ void copy_projections(T (&to)[TILE][ROW], const T* x, int rows_left, int lane) {
#pragma unroll
  for (int i = 0; i < TILE * ROW / 8 / 32; i++) {
    const int at = (i * 32 + lane) * 8;
    copy16(&to[0][0] + at, x + at, at < rows_left * ROW);
  }
}

// Copies the step sizes' weights of a warp's N channels.
template <int N>
__device__ __forceinline__ void copy_weights(T (&to)[N][RANK_PAD], const T* weight, int lane) {
#pragma unroll
  for (int i = lane * 8; i < N * RANK_PAD; i += 32 * 8) copy16(&to[0][0] + i, weight + i, true);
}

// Adds the first columns of a tile's projections times the step sizes' weights. The products' columns are N channels; which
// of them a lane hands to two products, 16 columns from `first` on, is `channel(first)`.
template <int N, class Channel>
__device__ __forceinline__ void add_steps(float (&acc)[N / 8][4], const T (&x)[TILE][ROW], const T (&weight)[N][RANK_PAD],
                                          const Channel& channel, int flip, int lane) {
#pragma unroll
  for (int k = 0; k < RANK_PAD; k += 16) {
    unsigned a[4], b[4];
    load_matrices(a, &x[lane % 16 ^ flip][k + lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      load_matrices(b, &weight[channel(8 * j)][k + lane / 8 % 2 * 8]);
      multiply(acc[j], a, b[0], b[1]);
      multiply(acc[j + 1], a, b[2], b[3]);
    }
  }
}

// B and C as float32.
__device__ __forceinline__ void widen_b_and_c(float (&to)[TILE][2 * STATE], const T (&x)[TILE][ROW], int flip, int lane) {
#pragma unroll
  for (int i = 0; i < TILE; i += 8) {
    const int row = i + lane / 4, column = lane % 4 * 8;
    const uint4 v = *(const uint4*)&x[row ^ flip][RANK_PAD + column];
    const float2 p = unpack(v.x), q = unpack(v.y), r = unpack(v.z), t = unpack(v.w);
    *(float4*)&to[row][column] = make_float4(p.x, p.y, q.x, q.y);
    *(float4*)&to[row][column + 4] = make_float4(r.x, r.y, t.x, t.y);
  }
}
