// What the kernels share beside the instructions of ptx.cuh.
//
// Macros from the caller: RANK (dt_rank), RANK_PAD (RANK rounded up to 16), ROW (a token's projections: dt, B, C), and those
// that sizes.py explains.

static_assert(STATE == 16 && TILE == 16 && RANK_PAD % 16 == 0 && ROW == RANK_PAD + 2 * STATE, "products are 16 wide and high");
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// log(1 + e^x) as max(x, 0) + log1p(e^-|x|), the latter e times a polynomial in e (relative error 6e-5 at most; the minimax
// one of its degree): as many instructions as a logarithm, without a second use of the special-function unit.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * LOG2E);
  float p = fmaf(e, 0.04134728f, -0.15742717f);
  p = fmaf(p, e, 0.3063009f);
  p = fmaf(p, e, -0.4969778f);
  p = fmaf(p, e, 0.99994328f);
  return fmaf(e, p, fmaxf(x, 0.f));
}
