// What the kernels share beside the instructions of ptx.cuh.
//
// Macros from the caller: RANK (dt_rank), RANK_PAD (RANK rounded up to 16).

constexpr int STATE = 16;
constexpr int ROW = RANK_PAD + 2 * STATE;  // a token's projections: dt, B, C
constexpr int TILE = 16;                   // tokens that a warp prepares at once, the height of a matrix product
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// log(1 + e^x), and x itself above 20 as in torch. The digits that log2(1 + e) loses where e is small matter to float16,
// which gets a series; for bfloat16 a relative error of 1e-3, at e = 2^-12, is nothing, and instructions count.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(x * LOG2E);
#if HALF
  const float small = e * fmaf(e, fmaf(e, fmaf(e, -0.25f, 0.333333333f), -0.5f), 1.f), limit = 0.0625f;
#else
  const float small = e, limit = 0.000244140625f;
#endif
  const float y = e < limit ? small : log2_fast(1.f + e) * LN2;
  return x > 20.f ? x : y;
}
