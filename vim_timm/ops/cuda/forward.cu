// Both directions of a selective scan, with the step size projection before and the gate after it.
//
// A block is two warps on the same 64 channels and tokens, one for each direction; a lane owns two channels and keeps
// their states in registers. A direction walks over tiles of 16 tokens, whose rows lie in shared memory in scan order (row
// p is token p ^ flip). For a tile it first does what needs no order: step sizes by the matrix unit, softplus, B and C as
// float32. Then come the 16 steps, whose scarce resource is the special-function unit: 16 exponentials for each channel and
// token. Four steps are free of branches, of stores to shared memory and of reads from global memory, so that the assembler
// can spread the exponentials among the multiplications.
//
// The directions meet in the middle. Up to there each leaves its y in OUT; beyond, where the other one has been, it adds
// what it finds, gates the sum and writes the result. So no sum over directions and no gate pass over memory remain.
//
// Macros beside common.cuh's: LOCAL, CARRY, KEEP, GRAD (0 or 1, see scan_forward), BLOCKS (of a multiprocessor).

static_assert(CHANNELS == 64 && SCAN_THREADS == 64 && KEPT == 4, "a lane owns two channels and writes four steps out");
// Whether a tile's u is asked for before the tile's work, or already after the last one's steps.
constexpr bool U_LATE = !LOCAL && !GRAD;

struct Warp {
  alignas(16) T x[TILE][ROW];
  alignas(16) T u[TILE][CHANNELS];
  alignas(16) T z[TILE][CHANNELS];
  alignas(16) T other[TILE][CHANNELS];
#if GRAD
  alignas(16) T grad[TILE][CHANNELS];
#endif
  alignas(16) T weight[CHANNELS][RANK_PAD];
  alignas(16) float delta[TILE][CHANNELS];  // 8-column groups of row r exchanged by r & 3, against bank conflicts
  alignas(16) float bc[TILE][2 * STATE];
  float bias[CHANNELS];
};

// Whether the multiplication units have time for a part of the exponentials, as measured.
constexpr bool MIXED = LOCAL || (!GRAD && BLOCKS > 5);

__device__ __forceinline__ constexpr bool by_polynomial(int state) { return MIXED && state % 8 == 3; }

// 2^x for x <= 0; for some states not by the special-function unit: 2^i for the nearest integer i by its bits, the rest by a
// polynomial (relative error 3e-6).
__device__ __forceinline__ float decay(float x, int state) {
  if (!by_polynomial(state)) return exp2_fast(x);
  x = fmaxf(x, -126.f);
  const float shifted = x + 12582912.f, rest = x - (shifted - 12582912.f);  // 1.5 * 2^23: i in the lowest bits
  float p = fmaf(rest, 0.00958285294f, 0.0559064262f);
  p = fmaf(p, rest, 0.240240991f);
  p = fmaf(p, rest, 0.693124175f);
  p = fmaf(p, rest, 1.f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// A lane's part of a tile of 64 channels: 8 neighbouring ones in 4 rows, four apart. Rows lie in scan order.
struct Piece {
  int row, column, token, step;

  __device__ __forceinline__ Piece(int flip, int lane) {
    row = lane / 8;
    column = lane % 8 * 8;
    token = row ^ flip;
    step = flip ? -4 : 4;  // from a row's token to the next one's
  }
};

__device__ __forceinline__ void copy_rows(T (*to)[CHANNELS], const T* from, int stride, int rows_left, const Piece& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = p.token + i * p.step;
    copy16(&to[p.row + 4 * i][p.column], from + (token * stride + p.column), token < rows_left);
  }
}

// The step sizes: softplus(dt W^T + bias), 0 beyond the end so that the state stays as it is.
__device__ __forceinline__ void step_sizes(Warp& s, int rows_left, int flip, int lane) {
  float acc[CHANNELS / 8][4];
  const int column = lane % 4 * 2, row = lane / 4;
#pragma unroll
  for (int j = 0; j < CHANNELS / 8; j++) {
    const float2 b = *(const float2*)&s.bias[8 * j + column];
    acc[j][0] = acc[j][2] = b.x;
    acc[j][1] = acc[j][3] = b.y;
  }
  add_steps(acc, s.x, s.weight, [=](int first) { return first + lane / 16 * 8 + lane % 8; }, flip, lane);
  const int swap = (row & 3) << 3;
#pragma unroll
  for (int j = 0; j < CHANNELS / 8; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 d = make_float2(softplus(acc[j][2 * half]), softplus(acc[j][2 * half + 1]));
      *(float2*)&s.delta[row + 8 * half][(8 * j + column) ^ swap] = d;
    }
  }
  if (rows_left < TILE) {
    __syncwarp();
    for (int r = rows_left; r < TILE; r++) *(float2*)&s.delta[r ^ flip][2 * lane] = make_float2(0.f, 0.f);
  }
}

// A tile's y, which stands in place of the step sizes.
__device__ __forceinline__ void load_y(float (&y)[8], const Warp& s, int row, int column) {
  const float* from = &s.delta[row][column ^ ((row & 3) << 3)];
  const float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
  y[0] = low.x, y[1] = low.y, y[2] = low.z, y[3] = low.w;
  y[4] = high.x, y[5] = high.y, y[6] = high.z, y[7] = high.w;
}

// One direction's y as it is.
__device__ __forceinline__ void leave(const Warp& s, T* out, int out_stride, int rows_left, const Piece& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = p.token + i * p.step;
    float y[8];
    load_y(y, s, p.row + 4 * i, p.column);
    const uint4 v = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
    store16(out + (token * out_stride + p.column), v, token < rows_left);
  }
}

// The gated sum of both directions, or where its gradient has come the gradients.
__device__ __forceinline__ void finish(const Warp& s, T* out, int out_stride, T* grad_y, T* gated, int gated_stride,
                                       float scale, int rows_left, const Piece& p) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = p.row + 4 * i, token = p.token + i * p.step;
    float y[8];
    load_y(y, s, row, p.column);
    const uint4 z4 = *(const uint4*)&s.z[row][p.column], o4 = *(const uint4*)&s.other[row][p.column];
    const T2 z2[4] = {z4.x, z4.y, z4.z, z4.w}, o2[4] = {o4.x, o4.y, o4.z, o4.w};
    T2 product[4];
#if GRAD
    const uint4 g4 = *(const uint4*)&s.grad[row][p.column];
    const T2 g2[4] = {g4.x, g4.y, g4.z, g4.w};
    T2 through[4], to_z[4];
#endif
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float2 z = unpack(z2[k]), o = unpack(o2[k]);
      const float s0 = sigmoid(z.x), s1 = sigmoid(z.y);
      const float y0 = (y[2 * k] + o.x) * scale, y1 = (y[2 * k + 1] + o.y) * scale;
      product[k] = pack(y0 * z.x * s0, y1 * z.y * s1);
#if GRAD
      const float2 g = unpack(g2[k]);
      through[k] = pack(g.x * scale * z.x * s0, g.y * scale * z.y * s1);
      to_z[k] = pack(y0 * g.x * s0 * (1.f + z.x * (1.f - s0)), y1 * g.y * s1 * (1.f + z.y * (1.f - s1)));
#endif
    }
    const bool valid = token < rows_left;
    const uint4 v = make_uint4(product[0], product[1], product[2], product[3]);
    const int at = token * out_stride + p.column;
#if GRAD
    store16(gated + (token * gated_stride + p.column), v, valid && gated);
    store16(grad_y + at, make_uint4(through[0], through[1], through[2], through[3]), valid);
    store16(out + at, make_uint4(to_z[0], to_z[1], to_z[2], to_z[3]), valid);
#else
    store16(out + at, v, valid);
#endif
  }
}

// u, x of both directions: (batch, L, D) and (batch, L, ROW) contiguous, ROW as in common.cuh; weight (D,
// RANK_PAD); bias, skip (D), A_log (D, 16) float32; z and out (batch, L, D) with rows of the given strides.
// LOCAL: the state at the exit of each chunk from zero (H) and the chunk's sum of step sizes (S); nothing else.
// CARRY: the scan starts from the states in H (2 batch, chunks, 16, D), else from zero.
// KEEP: the state on entry of every KEPT tokens, in two bytes, to BOUNDS (2 batch, ceil(L / KEPT), 16, D).
// Offsets in a sequence are 32 bits: 2 L D < 2^31.
// GRAD: from the output's gradient `grad` (batch, L, D) the gradient of z to OUT and that of y to GRAD_Y, whose rows lie
// as OUT's; the output itself to GATED (batch, L, D) if that is not null; it may be `grad`: a thread has read what it
// overwrites.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, BLOCKS)
scan_forward(const T* u_f, const T* u_b, const T* x_f, const T* x_b, const T* weight_f, const T* weight_b,
             const float* bias_f, const float* bias_b, const float* A_f, const float* A_b, const float* skip_f,
             const float* skip_b, const T* z, int z_stride, T* out, int out_stride, const T* grad,
             T* grad_y, T* gated, float* H, float* S, T* bounds, float scale, int batch, int length, int dim, int chunk) {
  __shared__ Warp shared[2];
  const int lane = threadIdx.x % 32;
  const bool reverse = threadIdx.x >= 32;
  const int flip = reverse ? TILE - 1 : 0;
  const Piece piece(flip, lane);
  Warp& s = shared[reverse];
  const int channel0 = blockIdx.x * CHANNELS, entry = blockIdx.z;
  const int cell = reverse ? batch + entry : entry;
  const int begin = blockIdx.y * chunk, end = min(begin + chunk, length);
  const int tiles = (end - begin + TILE - 1) / TILE, middle = tiles / 2;

  const long long first_row = (long long)entry * length;
  const T* u = (reverse ? u_b : u_f) + first_row * dim + channel0;
  const T* x = (reverse ? x_b : x_f) + first_row * ROW;
  z += first_row * z_stride + channel0;
  out += first_row * out_stride + channel0;
  grad += first_row * dim + channel0;
  grad_y += first_row * out_stride + channel0;
  if (gated) gated += first_row * dim + channel0;

  const int channel = channel0 + 2 * lane;
  *(float2*)&s.bias[2 * lane] = *(const float2*)&(reverse ? bias_b : bias_f)[channel];
  float2 skip = *(const float2*)&(reverse ? skip_b : skip_f)[channel];
  float a[2][STATE], h[2][STATE];
  const float* A = (reverse ? A_b : A_f) + (long long)channel * STATE;
  H += ((long long)cell * gridDim.y + blockIdx.y) * STATE * dim + channel;
#pragma unroll
  for (int n = 0; n < STATE; n += 4) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float4 v = *(const float4*)&A[c * STATE + n];
      const float log[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int m = 0; m < 4; m++) {
        a[c][n + m] = decay_rate(log[m]);
        // The polynomial would lose a NaN.
        if (by_polynomial(n + m) && log[m] != log[m]) (c ? skip.y : skip.x) = log[m];
      }
    }
  }
  // What has been read so far was there before pack_weights, which conv_project waits for before it lets others start.
  wait_for_last_kernel();
  // Three groups of copies, each waited for where it is used: projections, u, and z with its companions.
  {
    const int t0 = begin + (reverse ? tiles - 1 : 0) * TILE;
    const T* weight = (reverse ? weight_b : weight_f) + (long long)channel0 * RANK_PAD;
    copy_weights(s.weight, weight, lane);
    copy_projections(s.x, x + t0 * ROW, end - t0, lane);
    copies_commit();
    if (!U_LATE) {
      copy_rows(s.u, u + t0 * dim, dim, end - t0, piece);
      copies_commit();
    }
  }
#pragma unroll
  for (int n = 0; n < STATE; n++) {
    float2 v = make_float2(0.f, 0.f);
#if CARRY
    v = *(const float2*)&H[(long long)n * dim];
#endif
    h[0][n] = v.x;
    h[1][n] = v.y;
  }
#if LOCAL
  float2 total = make_float2(0.f, 0.f);
#endif
#if KEEP
  bounds += (long long)cell * ((length + KEPT - 1) / KEPT) * STATE * dim + channel;
#endif
  int column[4];  // of this lane's step sizes in row r, by r & 3
#pragma unroll
  for (int j = 0; j < 4; j++) column[j] = 2 * lane ^ j << 3;

  for (int k = 0; k < tiles; k++) {
    const int tile = reverse ? tiles - 1 - k : k;
    const int t0 = begin + tile * TILE, rows_left = end - t0, next = reverse ? t0 - TILE : t0 + TILE;
    const bool second = !LOCAL && (reverse ? tile < middle : tile >= middle);
    if (!LOCAL && k == (reverse ? tiles - middle : middle)) meet<1>(SCAN_THREADS);
    if (U_LATE) {
      copy_rows(s.u, u + t0 * dim, dim, rows_left, piece);
      copies_commit();
    }
    if (second) {
      copy_rows(s.z, z + t0 * z_stride, z_stride, rows_left, piece);
      copy_rows(s.other, out + t0 * out_stride, out_stride, rows_left, piece);
#if GRAD
      copy_rows(s.grad, grad + t0 * dim, dim, rows_left, piece);
#endif
    }
    copies_commit();
    copies_wait<2>();  // the projections
    step_sizes(s, rows_left, flip, lane);
    widen_b_and_c(s.bc, s.x, flip, lane);
    copies_wait<1>();  // u
    if (k + 1 < tiles) copy_projections(s.x, x + next * ROW, end - next, lane);
    copies_commit();

    // Rows of no token are the last ones, or against their order the first.
    const int steps = min(TILE, (rows_left + 3) / 4 * 4), first = reverse ? TILE - steps : 0;
#pragma unroll 1
    for (int row = first; row < first + steps; row += 4) {
#if KEEP
      T* to = bounds + (long long)((t0 + (row ^ (flip & ~3))) / KEPT) * STATE * dim;
#pragma unroll
      for (int n = 0; n < STATE; n++) *(T2*)&to[(long long)n * dim] = pack(h[0][n], h[1][n]);
#endif
      float y[4][2];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 d = *(const float2*)&s.delta[row + j][column[j]];
        const float2 v = unpack(*(const T2*)&s.u[row + j][2 * lane]);
        const float x0 = d.x * v.x, x1 = d.y * v.y;
        y[j][0] = skip.x * v.x;
        y[j][1] = skip.y * v.y;
#pragma unroll
        for (int n = 0; n < STATE; n += 4) {
          const float4 b4 = *(const float4*)&s.bc[row + j][n], c4 = *(const float4*)&s.bc[row + j][STATE + n];
          const float b[4] = {b4.x, b4.y, b4.z, b4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
          for (int m = 0; m < 4; m++) {
            h[0][n + m] = fmaf(decay(d.x * a[0][n + m], n + m), h[0][n + m], x0 * b[m]);
            h[1][n + m] = fmaf(decay(d.y * a[1][n + m], n + m), h[1][n + m], x1 * b[m]);
            y[j][0] = fmaf(h[0][n + m], c[m], y[j][0]);
            y[j][1] = fmaf(h[1][n + m], c[m], y[j][1]);
          }
        }
#if LOCAL
        total.x += d.x;
        total.y += d.y;
#endif
      }
#if !LOCAL
      // In place of the step sizes, which no other lane reads.
#pragma unroll
      for (int j = 0; j < 4; j++) *(float2*)&s.delta[row + j][column[j]] = make_float2(y[j][0], y[j][1]);
#endif
    }
    __syncwarp();
    if (!U_LATE) {
      if (k + 1 < tiles) copy_rows(s.u, u + next * dim, dim, end - next, piece);
      copies_commit();
    }
    copies_wait<U_LATE ? 1 : 2>();  // z and its companions
#if !LOCAL
    if (second)
      finish(s, out + t0 * out_stride, out_stride, grad_y + t0 * out_stride, gated ? gated + t0 * dim : gated, dim, scale,
             rows_left, piece);
    else
      leave(s, out + t0 * out_stride, out_stride, rows_left, piece);
#endif
    __syncwarp();  // the next tile overwrites what other lanes may still read
  }
#if LOCAL
#pragma unroll
  for (int n = 0; n < STATE; n++) *(float2*)&H[(long long)n * dim] = make_float2(h[0][n], h[1][n]);
  *(float2*)&S[((long long)cell * gridDim.y + blockIdx.y) * dim + channel] = total;
#else
  if ((reverse ? tiles - middle : middle) == tiles) meet<1>(SCAN_THREADS);
#endif
}

// From each chunk's exit state from zero (H_in) to the state on its entry (H_out), one thread a state of a channel.
// against = 1: along the gradient, against scan order.
extern "C" __global__ void carry(const float* A_f, const float* A_b, const float* __restrict__ H_in, float* __restrict__ H_out,
                                 const float* __restrict__ S,
                                 int batch, int dim, int chunks, int against) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, cell = blockIdx.y;
  if (i >= STATE * dim) return;
  const int channel = i % dim, n = i / dim;
  const bool from_last = (cell >= batch) != (against != 0);
  const float a = decay_rate((cell >= batch ? A_b : A_f)[(long long)channel * STATE + n]);
  const int step = from_last ? -1 : 1;
  long long j = (long long)cell * chunks + (from_last ? chunks - 1 : 0);
  float h = 0.f;
#pragma unroll 8
  for (int k = 0; k < chunks; k++, j += step) {
    H_out[j * STATE * dim + i] = h;
    h = fmaf(exp2_fast(S[j * dim + channel] * a), h, H_in[j * STATE * dim + i]);
  }
}
