// The convolution of both directions with SiLU, and the projection of its result to dt, B and C, in one pass over the tokens.
//
// The sequences lie in one column of rows, three rows of zeros after each, which is all that a tap beyond an end has to
// meet; so no sequence is too short to fill a block, and nothing but the stores asks where one ends. A block takes 64
// rows and walks over the channels, 32 at a time. Two warps of each direction take 32 rows each.
//
// What a lane convolves is what the matrix unit wants it to hold as the right factor of weights (ROW x 16 channels) times u
// (16 channels x 8 tokens): of four successive tokens, one for each of four products, eight neighbouring channels, for two
// steps of 16; the order of tokens and channels is free if weights and results follow it. So u goes from the convolution
// to the product in registers and to memory 16 bytes at a time, and seven rows of x serve four tokens. The backward
// direction looks at t .. t + 3 instead of t - 3 .. t and has its taps reversed; else it is the same program.
//
// Copies to shared memory run STAGES - 1 slabs ahead. What limits the kernel is memory; next comes the special-function
// unit with two operations for each channel and direction of a token.
//
// Macros beside common.cuh's: WIDTH (1 to 4), HAS_BIAS (0 or 1).

constexpr int REACH = 3, ROWS = 64, SLAB = 32, CHUNKS = SLAB / 8, STAGES = 3;
constexpr int THREADS = 128, BLOCKS = ROW <= 48 ? 4 : 3;  // of a multiprocessor, as many as registers allow

// Of both directions and a slab of channels.
struct Parameters {
  uint4 weight[2][ROW / 16][SLAB / 16][32];  // a lane's operands of a product
  // In the order of tokens, the first ones of a narrow convolution zero, and the bias, all times log2(e).
  alignas(16) float taps[2][5][SLAB];
};

struct Stage {
  Parameters parameters;
  // 16 bytes of 8 channels of a token. With an odd pitch lanes of successive channels and of every fourth token find
  // theirs in different banks.
  alignas(16) T x[CHUNKS][ROWS + 2 * REACH + 3][8];
};

// The row of the projection that is row `row` of product `m` of 16 rows: such that a lane's results, of rows g and g + 8,
// are neighbours, four of two products or two of a last one.
__device__ __forceinline__ int output(int m, int row) {
  const int members = m / 2 * 2 + 1 < ROW / 16 ? 4 : 2;
  return m / 2 * 32 + row % 8 * members + m % 2 * 2 + row / 8;
}

// Packs taps (dim, WIDTH), their biases and the projection's weights (RANK + 32, dim). Grid: blocks for ROW * dim threads.
extern "C" __global__ void __launch_bounds__(THREADS)
pack_parameters(const float* taps_f, const float* taps_b, const float* bias_f, const float* bias_b,
                const float* weight_f, const float* weight_b, Parameters* packed, int dim) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i < ROW * dim) {
    const int part = i % 4, lane = i / 4 % 32, step = i / 128 % 2, m = i / 256 % (ROW / 16), rest = i / (16 * ROW);
    const int row = output(m, lane / 4 + part % 2 * 8), source = row < RANK ? row : row - (RANK_PAD - RANK);
    const int slab = rest / 2, channel = slab * SLAB + lane % 4 * 8 + step * 4 + part / 2 * 2;
    float2 v = {};
    if (row < RANK || row >= RANK_PAD) v = *(const float2*)&(rest % 2 ? weight_b : weight_f)[source * dim + channel];
    ((T2*)packed[slab].weight)[i - slab * 2 * 16 * ROW] = pack(v.x, v.y);
  }
  if (i < 10 * dim) {
    const int channel = i % dim, k = i / dim % 5, backward = i / dim / 5;
    const int tap = (backward ? 3 - k : k) - (4 - WIDTH);
    float v = 0.f;
    if (k < 4 && tap >= 0) v = (backward ? taps_b : taps_f)[channel * WIDTH + tap];
    if (k == 4 && HAS_BIAS) v = (backward ? bias_b : bias_f)[channel];
    packed[channel / SLAB].taps[backward][k][channel % SLAB] = v * LOG2E;
  }
}

// SiLU of y / log2(e).
__device__ __forceinline__ float silu_of_scaled(float y) { return y * reciprocal(fmaf(exp2_fast(-y), LOG2E, LOG2E)); }

__device__ __forceinline__ unsigned& word(uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// What a row of the column of sequences is in tensors without rows of zeros: how many tokens are before it, and whether
// it is one itself.
struct Place {
  int before;
  bool token;

  __device__ __forceinline__ Place(int row, int batch, int length) {
    const int entry = row / (length + REACH), position = row % (length + REACH);
    before = entry * length + min(position, length);
    token = row >= 0 && entry < batch && position < length;
  }
};

// u of both directions (2, batch, L, dim) and its projection (2, batch, L, ROW) from x (batch, L, dim) with rows of
// x_stride and packed parameters. Grid: one block for every 64 of batch (L + 3) rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_project(const T* x, long long x_stride, const Parameters* packed, T* u, T* projected, int batch,
             int length, int dim) {
  __shared__ Stage stages[STAGES];
  const unsigned thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4;
  const unsigned backward = thread / 32 % 2, first = thread / 64 * 32 + 4 * g;  // the first of the lane's rows in the block
  const int row0 = blockIdx.x * ROWS, slabs = dim / SLAB;

  // Of rows that this thread copies, 8 channels of every slab, and of those that it convolves: bytes from the block's first
  // token, and whether they are tokens, a bit each. Unsigned offsets take half the registers of what they are added to.
  constexpr int COPIERS = THREADS / CHUNKS, COPIED = (ROWS + 2 * REACH + COPIERS - 1) / COPIERS;
  const unsigned chunk = thread % CHUNKS, copied = thread / CHUNKS;
  const int before = Place(max(row0 - REACH, 0), batch, length).before;
  unsigned from[COPIED], to[4], copies = 0, owns = 0;
#pragma unroll
  for (int i = 0; i < COPIED; i++) {
    const Place place(row0 - REACH + i * COPIERS + copied, batch, length);
    from[i] = place.token ? (place.before - before) * (unsigned)(x_stride * sizeof(T)) + 16 * chunk : 0;
    copies |= place.token << i;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Place place(row0 + first + i, batch, length);
    to[i] = (place.before - before) * dim * (unsigned)sizeof(T) + 16 * c;
    owns |= place.token << i;
  }
  x += before * x_stride;
  u += ((long long)backward * batch * length + before) * dim;
  const char* parameters = (const char*)packed + 16 * thread;

  const auto copy = [&](Stage& s) {
#pragma unroll
    for (int i = 0; i < COPIED; i++) {
      const int row = i * COPIERS + copied;
      if ((i + 1) * COPIERS <= ROWS + 2 * REACH || row < ROWS + 2 * REACH)
        copy16(s.x[chunk][row], (const char*)x + from[i], copies >> i & 1);
    }
#pragma unroll
    for (int i = 0; i < sizeof(Parameters); i += 16 * THREADS)
      if (i + 16 * THREADS <= sizeof(Parameters) || i + 16 * thread < sizeof(Parameters))
        copy16((char*)&s.parameters + i + 16 * thread, parameters + i, true);
    x += SLAB;
    parameters += sizeof(Parameters);
  };

  float sum[ROW / 16][4][4] = {};
#pragma unroll
  for (int k = 0; k < STAGES - 1; k++) {
    if (k < slabs) copy(stages[k]);
    copies_commit();
  }

  for (int k = 0, now = 0; k < slabs; k++) {
    copies_wait<STAGES - 2>();
    meet(THREADS);  // all have this slab, and none is still at the last one, whose place the next copies take
    if (k + STAGES - 1 < slabs) copy(stages[now == 0 ? STAGES - 1 : now - 1]);
    copies_commit();
    const Stage& s = stages[now];
    now = now == STAGES - 1 ? 0 : now + 1;

    uint4 window[7];
#pragma unroll
    for (int i = 0; i < 7; i++) window[i] = *(const uint4*)s.x[c][first + REACH * backward + i];
    uint4 v[4];
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      float2 row[7], tap[5];
#pragma unroll
      for (int i = 0; i < 7; i++) row[i] = unpack(word(window[i], pair));
#pragma unroll
      for (int i = 0; i < 5; i++) tap[i] = *(const float2*)&s.parameters.taps[backward][i][8 * c + 2 * pair];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 y = tap[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          y.x = fmaf(tap[j].x, row[i + j].x, y.x);
          y.y = fmaf(tap[j].y, row[i + j].y, y.y);
        }
        word(v[i], pair) = pack(silu_of_scaled(y.x), silu_of_scaled(y.y));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (owns >> i & 1) *(uint4*)((char*)u + to[i]) = v[i];
    u += SLAB;
#pragma unroll
    for (int m = 0; m < ROW / 16; m++) {
#pragma unroll
      for (int step = 0; step < SLAB / 16; step++) {
        const uint4 w = s.parameters.weight[backward][m][step][lane];
#pragma unroll
        for (int i = 0; i < 4; i++)
          multiply(sum[m][i], {w.x, w.y, w.z, w.w}, word(v[i], 2 * step), word(v[i], 2 * step + 1));
      }
    }
  }

  // A lane has results of tokens 4 n + i for columns n = 2 c and 2 c + 1 of products i.
  projected += (long long)backward * batch * length * ROW;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const Place place(row0 + thread / 64 * 32 + 8 * c + i, batch, length);
    if (!place.token) continue;
    T* row = projected + (long long)place.before * ROW;
    T2 r[ROW / 16];
#pragma unroll
    for (int m = 0; m < ROW / 16; m++) r[m] = pack(sum[m][i % 4][i / 4], sum[m][i % 4][i / 4 + 2]);
#pragma unroll
    for (int m = 0; m + 2 <= ROW / 16; m += 2) *(uint2*)&row[16 * m + 4 * g] = make_uint2(r[m], r[m + 1]);
    if (ROW / 16 % 2) *(T2*)&row[ROW - 16 + 2 * g] = r[ROW / 16 - 1];
  }
}
