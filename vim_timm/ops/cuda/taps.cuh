// The weights of the short depthwise convolution, as its forward and backward kernels hold them.
//
// The same rows x[t - 3 .. t + 3] give both directions' outputs at t: tap k meets x[t - 3 + k] forward and x[t + 3 - k]
// backward. A convolution narrower than 4 has zeros before its first tap.
//
// Macros from the caller: WIDTH (1 to 4), HAS_BIAS (0 or 1).

static_assert(REACH == 3, "four taps are written out");

// Of the two neighbouring channels of a lane.
struct Taps {
  float tap[4][2], bias[2];

  __device__ __forceinline__ Taps(const float* weight, const float* bias_, int channel) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
#if WIDTH == 4
      const float4 v = *(const float4*)&weight[(channel + c) * 4];
      tap[0][c] = v.x, tap[1][c] = v.y, tap[2][c] = v.z, tap[3][c] = v.w;
#else
#pragma unroll
      for (int k = 0; k < 4; k++) tap[k][c] = k < 4 - WIDTH ? 0.f : weight[(channel + c) * WIDTH + k - (4 - WIDTH)];
#endif
      bias[c] = HAS_BIAS ? bias_[channel + c] : 0.f;
    }
  }
};
