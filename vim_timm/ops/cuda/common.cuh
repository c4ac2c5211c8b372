// What the kernels share beside the instructions of ptx.cuh.
//
// Macros from the caller: RANK (dt_rank), RANK_PAD (RANK rounded up to 16).

constexpr int STATE = 16;
constexpr int ROW = RANK_PAD + 2 * STATE;  // a token's projections: dt, B, C
constexpr int TILE = 16;                   // tokens that a warp prepares at once, the height of a matrix product
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// log(1 + e^x), and x itself above 20 as in torch; e^x alone where 1 + e^x has lost its digits (relative error 3e-4 at most).
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(x * LOG2E);
  const float y = e < 0.000244140625f ? e : log2_fast(1.f + e) * LN2;
  return x > 20.f ? x : y;
}
