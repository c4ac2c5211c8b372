/* Selective scan and depthwise causal convolution of Vision Mamba in float32: both directions, forward and backward.

   Compiled once per instruction set, with LANES floats to a vector and ISA in the name of each entry point.

   Layout: channels-last. Vectors run over channels, so nothing is transposed or summed across lanes, and the matrix
   products of the block feed the kernel directly through their strides. The backward direction walks the same rows with
   a negative step, and adds its result to the forward direction's.

   Letters: b batch entry, t token, c channel, n state, g channel group. A task is one (b, g). Groups and the order of every
   sum depend on the shape only, never on the number of threads: results are bit-equal for any number. */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "runtime.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ENTRY(name) JOIN(name, ISA)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* ---- vectors ------------------------------------------------------------------------------------------------------- */

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec v) { *(vec_unaligned *)p = v; }
INLINE vec splat(float x) { return x - (vec){0}; } /* 0 + x is no copy: it turns -0 to 0 */

/* The last vector of a row may be partial: `count` channels are left. */
INLINE vec load_some(const float *p, int64_t count) {
    if (count >= LANES) return load(p);
    vec v = {0};
    memcpy(&v, p, sizeof(float) * (size_t)count);
    return v;
}
INLINE void store_some(float *p, vec v, int64_t count) {
    if (count >= LANES)
        store(p, v);
    else
        memcpy(p, &v, sizeof(float) * (size_t)count);
}

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* A NaN in x stays: x86's instructions return their second operand then. */
#if defined(__AVX512F__)
INLINE vec at_least(vec x, vec low) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }
INLINE vec at_most(vec x, vec high) { return (vec)_mm512_min_ps((__m512)high, (__m512)x); }
/* Cheaper than a division; the Newton step makes 14 good bits 28. */
INLINE vec reciprocal(vec x) {
    vec r = (vec)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
}
#else
INLINE vec at_least(vec x, vec low) { return choose(low > x, low, x); }
INLINE vec at_most(vec x, vec high) { return choose(high < x, high, x); }
INLINE vec reciprocal(vec x) { return 1.0f / x; }
#endif

INLINE float lane_sum(const vec *v) {
    typedef float four __attribute__((vector_size(16), may_alias));
    const four *p = (const four *)v;
    four s = p[0];
    for (int i = 1; i < LANES / 4; i++) s += p[i];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* Adding this number rounds a float of moderate size to an integer, which then stands in the low bits. */
#define ROUNDER 12582912.0f
#define LOG2E 1.44269504088896f
#define LOG2E_LOW 1.92596299e-8f
#define LN2 0.693147180559945f
/* 2^x is a normal number below this size. */
#define EXP2_LIMIT 126.0f

/* 2^f for |f| <= 1/2, within 1.1e-7. The first two coefficients are 1 and ln 2: the recurrence takes numbers near 1 to a
   power of thousands, so the error must vanish at 0. */
#define POLY5 1.330026407e-03f
#define POLY4 9.669708397e-03f
#define POLY3 5.550559994e-02f
#define POLY2 2.402228161e-01f
INLINE vec exp2_fraction(vec f) {
    vec p = POLY5 * f + POLY4;
    p = p * f + POLY3;
    p = p * f + POLY2;
    p = p * f + LN2;
    return p * f + 1.0f;
}
INLINE vec scale_by_power(vec p, vec rounded) { return (vec)((ivec)p + ((ivec)rounded << 23)); }

INLINE vec exp_of_moderate(vec x) {
    vec rounded = x * LOG2E + ROUNDER, whole = rounded - ROUNDER;
    return scale_by_power(exp2_fraction((x * LOG2E - whole) + x * LOG2E_LOW), rounded);
}
INLINE vec exp_of_negative(vec x) { return exp_of_moderate(at_least(x, splat(-EXP2_LIMIT * LN2))); }
INLINE vec exp_of_any(vec x) { return exp_of_negative(at_most(x, splat(EXP2_LIMIT * LN2))); }

/* out[i] = 2^(d * a[i]), four at a time to keep the pipelines full. `wide` takes any product: the square of 2^(x/2). */
#ifndef EXPS
#define EXPS 4
#endif
INLINE void exp2_products(const int count, const int wide, vec d, const vec *a, vec *out) {
    vec rounded[EXPS], f[EXPS], p[EXPS];
    if (wide) {
        UNROLL for (int i = 0; i < count; i++) {
            vec x = at_least(at_most(d * a[i] * 0.5f, splat(EXP2_LIMIT)), splat(-EXP2_LIMIT));
            rounded[i] = x + ROUNDER;
            p[i] = scale_by_power(exp2_fraction(x - (rounded[i] - ROUNDER)), rounded[i]);
            out[i] = p[i] * p[i];
        }
        return;
    }
    UNROLL for (int i = 0; i < count; i++) rounded[i] = d * a[i] + ROUNDER;
    UNROLL for (int i = 0; i < count; i++) f[i] = rounded[i] - ROUNDER;
    UNROLL for (int i = 0; i < count; i++) f[i] = d * a[i] - f[i];
    UNROLL for (int i = 0; i < count; i++) p[i] = POLY5 * f[i] + POLY4;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + POLY3;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + POLY2;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + LN2;
    UNROLL for (int i = 0; i < count; i++) p[i] = p[i] * f[i] + 1.0f;
    UNROLL for (int i = 0; i < count; i++) out[i] = scale_by_power(p[i], rounded[i]);
}

INLINE vec sigmoid(vec x) { return reciprocal(1.0f + exp_of_any(-x)); }

/* max(x, 0) + log(1 + e^-|x|), the logarithm as an atanh series: small steps keep their relative accuracy.
   *slope, where asked for, is its derivative sigmoid(x). */
INLINE vec softplus(vec x, vec *slope) {
    vec w = exp_of_negative(-absolute(x)), s = w * reciprocal(2.0f + w), q = s * s;
    vec p = 1.400599307e-01f * q + 1.400090261e-01f;
    p = p * q + 2.001076363e-01f;
    p = p * q + 3.333320814e-01f;
    p = p * q + 1.0f;
    if (slope) *slope = choose(x < 0.0f, w, splat(1.0f)) * reciprocal(1.0f + w);
    return at_least(x, splat(0)) + 2.0f * s * p;
}

/* ---- tensors ------------------------------------------------------------------------------------------------------- */

/* A (batch, length, channels or states) tensor with unit last stride; strides in floats. data is NULL when absent. */
typedef struct {
    float *data;
    int64_t batch, token;
} Rows;

/* The rows of one batch entry in the order in which a direction meets them. */
typedef struct {
    float *first;
    int64_t step;
} Walk;

INLINE Walk walk(const Rows *rows, int64_t b, int64_t length, int backward) {
    if (!rows->data) return (Walk){NULL, 0};
    float *data = rows->data + b * rows->batch;
    return backward ? (Walk){data + (length - 1) * rows->token, -rows->token} : (Walk){data, rows->token};
}
INLINE float *row(Walk w, int64_t t) { return w.first + t * w.step; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* out[j][c] = in[c][j], rows of out padded with zeros. */
static void transpose(const float *in, float *out, int64_t channels, int64_t padded, int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        for (int64_t c = 0; c < channels; c++) out[j * padded + c] = in[c * count + j];
        for (int64_t c = channels; c < padded; c++) out[j * padded + c] = 0;
    }
}
static void copy_padded(const float *in, float *out, int64_t channels, int64_t padded) {
    memset(out, 0, sizeof(float) * (size_t)padded);
    if (in) memcpy(out, in, sizeof(float) * (size_t)channels);
}

/* ---- selective scan -------------------------------------------------------------------------------------------------- */

/* Tokens to a chunk. In training the state before each chunk is kept, and the backward pass recomputes the rest. */
#ifndef CHUNK
#define CHUNK 64
#endif
/* States held in registers at once. */
#ifndef FORWARD_STATES
#define FORWARD_STATES (LANES == 16 ? 16 : 4)
#endif
#ifndef BACKWARD_STATES
#define BACKWARD_STATES (LANES == 16 ? 8 : 4)
#endif
/* Kept states have their channels padded to this number in every build. */
enum { PADDING = 16 };

typedef struct {
    Rows u, delta, B, C;
    const float *A, *D, *bias; /* (channels, state), (channels), (channels) */
    float *states;             /* (batch, chunks - 1, state, padded channels), or NULL in inference */
    Rows grad_u, grad_delta, grad_B, grad_C;
    float *grad_A, *grad_D, *grad_bias; /* as A, D and bias; the latter two may be NULL */
} Direction;

typedef struct {
    Direction direction[2];
    Rows z, out, grad_z; /* out: the result, or in the backward pass its gradient */
    int64_t directions, batch, length, channels, state, softplus, log_A, threads;
    double scale;
} Scan;

/* A direction's parameters, channels innermost and padded to whole vectors. */
typedef struct {
    float *A2;       /* (state, padded): A log2(e) */
    float *D, *bias; /* (padded) */
    float *largest;  /* (padded): max over the states of |A2| */
} Parameters;

typedef struct {
    const Scan *scan;
    Parameters parameters[2];
    int64_t padded, vectors, groups, kept; /* kept: states of a batch entry, one before each chunk but the first */
    /* Where the scan is cut into tiles of tokens: the states between them, (batch, vectors, state), and whether there are
       tokens before this tile. */
    vec *carry;
    int resumed;
    /* Partial sums of the backward pass. */
    float *grad_A[2], *grad_D[2], *grad_bias[2]; /* (batch, state, padded), (batch, padded), (batch, padded) */
    Rows grad_B[2], grad_C[2];                   /* (groups, batch, length, state), or one group's result itself */
} Plan;

static size_t parameter_floats(int64_t state, int64_t padded) { return (size_t)((state + 3) * padded); }

static Parameters prepare(const Scan *scan, const Direction *direction, float *memory, int64_t padded) {
    int64_t channels = scan->channels, state = scan->state;
    Parameters p = {memory, memory + state * padded, memory + (state + 1) * padded, memory + (state + 2) * padded};
    transpose(direction->A, p.A2, channels, padded, state);
    copy_padded(direction->D, p.D, channels, padded);
    copy_padded(direction->bias, p.bias, channels, padded);
    for (int64_t c = 0; c < padded; c += LANES) {
        vec largest = splat(0);
        for (int64_t n = 0; n < state; n++) {
            float *a = p.A2 + n * padded + c;
            vec v = (scan->log_A ? -exp_of_any(load(a)) : load(a)) * LOG2E;
            store(a, v);
            largest = at_least(absolute(v), largest);
        }
        store(p.largest + c, largest);
    }
    return p;
}

/* Runs one chunk of `steps` tokens for `count` states of one vector of channels: y[t] += sum_n C h.
   When `kept` is given, also the state before and after every token and the decays are written, for the backward pass. */
INLINE void recur(const int count, const int wide, const int keep, int64_t steps, const vec *dt, const vec *dtu,
                  const float *A2, int64_t padded, vec *state, const float *B, int64_t B_step, const float *C,
                  int64_t C_step, vec *y, vec *kept, vec *decays) {
    vec h[16], a2[16];
    UNROLL for (int n = 0; n < count; n++) h[n] = state[n];
    UNROLL for (int n = 0; n < count; n++) a2[n] = load(A2 + n * padded);
    if (keep) {
        UNROLL for (int n = 0; n < count; n++) kept[n] = h[n];
    }
    for (int64_t t = 0; t < steps; t++, B += B_step, C += C_step) {
        vec d = dt[t], x = dtu[t], even = y[t], odd = splat(0);
        UNROLL for (int m = 0; m < count; m += EXPS) {
            const int exps = count - m < EXPS ? count - m : EXPS;
            vec a[EXPS];
            exp2_products(exps, wide, d, a2 + m, a);
            UNROLL for (int i = 0; i < exps; i++) h[m + i] = a[i] * h[m + i] + x * B[m + i];
            UNROLL for (int i = 0; i < exps; i++) {
                if (i & 1)
                    odd += h[m + i] * C[m + i];
                else
                    even += h[m + i] * C[m + i];
                if (keep) {
                    decays[t * count + m + i] = a[i];
                    kept[(t + 1) * count + m + i] = h[m + i];
                }
            }
        }
        y[t] = even + odd;
    }
    UNROLL for (int n = 0; n < count; n++) state[n] = h[n];
}

/* The same chunk backwards in time. carried: gradient that reaches the state from later tokens. */
INLINE void reverse_recur(const int count, int64_t steps, const vec *dt, const vec *dtu, const vec *grad_y,
                          const float *A2, int64_t padded, vec *carried, vec *grad_A, const float *B, int64_t B_step,
                          const float *C, int64_t C_step, const vec *kept, const vec *decays, vec *grad_B, vec *grad_C,
                          int64_t grad_step, vec *grad_dtu, vec *grad_dt) {
    vec q[16], sum_A[16];
    UNROLL for (int n = 0; n < count; n++) q[n] = carried[n];
    UNROLL for (int n = 0; n < count; n++) sum_A[n] = grad_A[n];
    for (int64_t t = steps - 1; t >= 0; t--) {
        vec gy = grad_y[t], d = dt[t], x = dtu[t], to_dtu = grad_dtu[t], to_dt = grad_dt[t];
        const float *b = B + t * B_step, *c = C + t * C_step;
        const vec *before = kept + t * count, *after = before + count, *a = decays + t * count;
        vec *gB = grad_B + t * grad_step, *gC = grad_C + t * grad_step;
        UNROLL for (int n = 0; n < count; n++) {
            gC[n] += gy * after[n];
            q[n] += gy * c[n];
            gB[n] += q[n] * x;
            to_dtu += q[n] * b[n];
            q[n] *= a[n];
            vec w = q[n] * before[n];
            sum_A[n] += w * d;
            to_dt += w * load(A2 + n * padded);
        }
        grad_dtu[t] = to_dtu;
        grad_dt[t] = to_dt;
    }
    UNROLL for (int n = 0; n < count; n++) carried[n] = q[n];
    UNROLL for (int n = 0; n < count; n++) grad_A[n] = sum_A[n];
}

/* What one chunk of one vector of channels holds. */
typedef struct {
    vec u[CHUNK], dt[CHUNK], dtu[CHUNK], y[CHUNK];
} Chunk;

/* Reads u and delta of a chunk; returns whether some dt * A needs the wide exponential. */
INLINE int read_chunk(Chunk *chunk, int64_t steps, Walk u, Walk delta, int64_t t0, int64_t c, int64_t count,
                      const Parameters *parameters, int with_softplus, vec *slope) {
    vec bias = load(parameters->bias + c), largest = splat(0);
    for (int64_t t = 0; t < steps; t++) {
        vec d = load_some(row(delta, t0 + t) + c, count) + bias;
        if (with_softplus)
            d = softplus(d, slope ? slope + t : NULL);
        else if (slope)
            slope[t] = splat(1.0f);
        largest = at_least(absolute(d), largest);
        chunk->dt[t] = d;
        chunk->u[t] = load_some(row(u, t0 + t) + c, count);
        chunk->dtu[t] = d * chunk->u[t];
        chunk->y[t] = splat(0);
    }
    ivec fits = largest * load(parameters->largest + c) < EXP2_LIMIT;
    for (int i = 0; i < LANES; i++)
        if (!fits[i]) return 1;
    return 0;
}

/* Brings in the cache lines that the next vector of channels will want: they are a row apart, which hardware does not
   foresee. After the group's last vector that is its first one, a chunk later. */
INLINE void prefetch_rows(Walk w, int64_t t0, int64_t steps, int64_t c) {
    if (w.first)
        for (int64_t t = 0; t < steps; t++) __builtin_prefetch(row(w, t0 + t) + c);
}

#define FOR_STATE_BLOCKS(LARGEST, state, CALL)                     \
    for (int64_t n = 0; n < (state);) {                            \
        if ((state)-n >= (LARGEST)) {                              \
            CALL(LARGEST);                                         \
            n += (LARGEST);                                        \
        } else if ((LARGEST) > 4 && (state)-n >= 4) {              \
            CALL(4);                                               \
            n += 4;                                                \
        } else {                                                   \
            CALL(1);                                               \
            n += 1;                                                \
        }                                                          \
    }

static void scan_direction(const Plan *plan, int which, int64_t b, int64_t first, int64_t last, vec *states) {
    const Scan *scan = plan->scan;
    const Direction *direction = &scan->direction[which];
    const Parameters *parameters = &plan->parameters[which];
    const int64_t length = scan->length, state = scan->state, padded = plan->padded;
    const int64_t kept_width = round_up(scan->channels, PADDING);
    const int final = which == scan->directions - 1;
    const vec scale = splat((float)scan->scale);
    Walk u = walk(&direction->u, b, length, which), delta = walk(&direction->delta, b, length, which);
    Walk B = walk(&direction->B, b, length, which), C = walk(&direction->C, b, length, which);
    Walk z = walk(&scan->z, b, length, which), out = walk(&scan->out, b, length, which);
    Chunk chunk;
    if (plan->carry) states = plan->carry + (b * plan->vectors + first) * state;
    if (!plan->resumed) memset(states, 0, sizeof(vec) * (size_t)(state * (last - first)));
    for (int64_t t0 = 0; t0 < length; t0 += CHUNK) {
        int64_t steps = least(CHUNK, length - t0);
        for (int64_t v = first; v < last; v++) {
            int64_t c = v * LANES, count = least(LANES, scan->channels - c);
            vec *h = states + (v - first) * state;
            int64_t next = v + 1 < last ? t0 : t0 + CHUNK, next_c = (v + 1 < last ? v + 1 : first) * LANES;
            int64_t next_steps = least(CHUNK, length - next);
            prefetch_rows(u, next, next_steps, next_c);
            prefetch_rows(delta, next, next_steps, next_c);
            if (final) prefetch_rows(z, next, next_steps, next_c);
            if (which) prefetch_rows(out, next, next_steps, next_c);
            int wide = read_chunk(&chunk, steps, u, delta, t0, c, count, parameters, scan->softplus != 0, NULL);
            if (direction->states && (t0 || plan->resumed))
                for (int64_t n = 0; n < state; n++)
                    store(direction->states + ((b * plan->kept + t0 / CHUNK - 1) * state + n) * kept_width + c, h[n]);
            const float *A2 = parameters->A2 + c;
#define RECUR(COUNT)                                                                                                    \
    if (wide)                                                                                                           \
        recur(COUNT, 1, 0, steps, chunk.dt, chunk.dtu, A2 + n * padded, padded, h + n, row(B, t0) + n, B.step,           \
              row(C, t0) + n, C.step, chunk.y, NULL, NULL);                                                             \
    else                                                                                                                \
        recur(COUNT, 0, 0, steps, chunk.dt, chunk.dtu, A2 + n * padded, padded, h + n, row(B, t0) + n, B.step,           \
              row(C, t0) + n, C.step, chunk.y, NULL, NULL)
            FOR_STATE_BLOCKS(FORWARD_STATES, state, RECUR)
#undef RECUR
            vec D = load(parameters->D + c);
            for (int64_t t = 0; t < steps; t++) {
                float *to = row(out, t0 + t) + c;
                vec y = chunk.y[t] + D * chunk.u[t];
                if (which) y += load_some(to, count);
                if (final) {
                    y *= scale;
                    if (z.first) {
                        vec gate = load_some(row(z, t0 + t) + c, count);
                        y *= gate * sigmoid(gate);
                    }
                }
                store_some(to, y, count);
            }
        }
    }
}

INLINE int64_t group_start(const Plan *plan, int64_t group) { return group * plan->vectors / plan->groups; }

static void scan_task(const void *arguments, int64_t index, void *scratch) {
    const Plan *plan = arguments;
    int64_t b = index / plan->groups, g = index % plan->groups;
    for (int which = 0; which < plan->scan->directions; which++)
        scan_direction(plan, which, b, group_start(plan, g), group_start(plan, g + 1), scratch);
}

static Plan plan_scan(const Scan *scan, int64_t wanted_tasks) {
    Plan plan = {.scan = scan, .padded = round_up(scan->channels, LANES), .kept = (scan->length - 1) / CHUNK};
    plan.vectors = plan.padded / LANES;
    plan.groups = most(1, least(plan.vectors, (wanted_tasks + scan->batch - 1) / most(scan->batch, 1)));
    return plan;
}

EXPORT int ENTRY(scan_forward)(const Scan *scan) {
    /* Channels are independent here, so the groups may follow the threads without a change in any sum. */
    Plan plan = plan_scan(scan, scan->threads > 1 ? 4 * scan->threads : 1);
    size_t floats = parameter_floats(scan->state, plan.padded);
    float *memory = vim_timm_allocate(sizeof(float) * floats * 2);
    if (!memory) return -1;
    for (int64_t i = 0; i < scan->directions; i++)
        plan.parameters[i] = prepare(scan, &scan->direction[i], memory + i * (int64_t)floats, plan.padded);
    size_t states = sizeof(vec) * (size_t)(scan->state * (plan.vectors / plan.groups + 1));
    int failed = vim_timm_run(scan_task, &plan, scan->batch * plan.groups, scan->threads, states);
    vim_timm_free(memory);
    return failed;
}

/* Scratch of one task of the backward pass. The first four run over the group's vectors of channels. */
typedef struct {
    vec *carried, *grad_A; /* (vectors, state) */
    vec *grad_D, *grad_bias;
    vec *grad_B, *grad_C; /* (CHUNK, state): sums over the group's vectors, lane by lane */
    vec *kept, *decays;   /* (CHUNK + 1, BACKWARD_STATES), (CHUNK, BACKWARD_STATES) */
} Scratch;

static size_t scratch_bytes(int64_t vectors, int64_t state) {
    return sizeof(vec) * (size_t)(vectors * (2 * state + 2) + 2 * CHUNK * state + (2 * CHUNK + 1) * BACKWARD_STATES + state);
}
static Scratch lay_out(vec *memory, int64_t vectors, int64_t state) {
    Scratch s;
    s.carried = memory;
    s.grad_A = s.carried + vectors * state;
    s.grad_D = s.grad_A + vectors * state;
    s.grad_bias = s.grad_D + vectors;
    s.grad_B = s.grad_bias + vectors;
    s.grad_C = s.grad_B + CHUNK * state;
    s.kept = s.grad_C + CHUNK * state;
    s.decays = s.kept + (CHUNK + 1) * BACKWARD_STATES;
    return s;
}

/* With dt, a = exp(dt A), h and y as in the forward pass, gy the gradient of y, and q_t = a_t gh_t carried back in time:
       gh_t = gy_t C_t + q_{t+1}        gC_t = sum_c gy_t h_t      gB_t = sum_c gh_t dt_t u_t
       w = q_t h_{t-1}                  gA += w dt_t               gdt_t = u_t sum_n gh_t B_t + sum_n w A
       gu_t = dt_t sum_n gh_t B_t + gy_t D                         gz = gout scale y silu'(z) */
static void scan_direction_backward(const Plan *plan, int which, int64_t b, int64_t g, vec *memory) {
    const Scan *scan = plan->scan;
    const Direction *direction = &scan->direction[which];
    const Parameters *parameters = &plan->parameters[which];
    const int64_t length = scan->length, state = scan->state, padded = plan->padded;
    const int64_t chunks = (length + CHUNK - 1) / CHUNK, kept_width = round_up(scan->channels, PADDING);
    const int64_t first = group_start(plan, g), last = group_start(plan, g + 1), vectors = last - first;
    const vec scale = splat((float)scan->scale);
    Walk u = walk(&direction->u, b, length, which), delta = walk(&direction->delta, b, length, which);
    Walk B = walk(&direction->B, b, length, which), C = walk(&direction->C, b, length, which);
    Walk z = walk(&scan->z, b, length, which), grad_out = walk(&scan->out, b, length, which);
    Walk grad_u = walk(&direction->grad_u, b, length, which), grad_z = walk(&scan->grad_z, b, length, which);
    Walk grad_delta = walk(&direction->grad_delta, b, length, which);
    Rows partial_B = plan->grad_B[which], partial_C = plan->grad_C[which];
    partial_B.data += g * scan->batch * length * state;
    partial_C.data += g * scan->batch * length * state;
    Walk to_B = walk(&partial_B, b, length, which), to_C = walk(&partial_C, b, length, which);
    Scratch s = lay_out(memory, vectors, state);
    Chunk chunk;
    vec slope[CHUNK], grad_y[CHUNK], grad_gate[CHUNK], grad_dtu[CHUNK], grad_dt[CHUNK];
    memset(s.carried, 0, sizeof(vec) * (size_t)(vectors * (2 * state + 2)));
    for (int64_t t0 = (chunks - 1) * CHUNK; t0 >= 0; t0 -= CHUNK) {
        int64_t steps = least(CHUNK, length - t0);
        memset(s.grad_B, 0, sizeof(vec) * (size_t)(2 * CHUNK * state));
        for (int64_t v = first; v < last; v++) {
            int64_t c = v * LANES, count = least(LANES, scan->channels - c), own = v - first;
            int64_t next = v + 1 < last ? t0 : t0 - CHUNK, next_c = (v + 1 < last ? v + 1 : first) * LANES;
            if (next >= 0) {
                int64_t next_steps = least(CHUNK, length - next);
                prefetch_rows(u, next, next_steps, next_c);
                prefetch_rows(delta, next, next_steps, next_c);
                prefetch_rows(grad_out, next, next_steps, next_c);
                prefetch_rows(z, next, next_steps, next_c);
            }
            int wide = read_chunk(&chunk, steps, u, delta, t0, c, count, parameters, scan->softplus != 0, slope);
            for (int64_t t = 0; t < steps; t++) {
                vec gradient = load_some(row(grad_out, t0 + t) + c, count) * scale;
                grad_y[t] = gradient;
                if (z.first) {
                    vec gate = load_some(row(z, t0 + t) + c, count), sg = sigmoid(gate);
                    grad_y[t] = gradient * gate * sg;
                    grad_gate[t] = gradient * sg * (1.0f + gate * (1.0f - sg));
                }
                grad_dtu[t] = grad_dt[t] = splat(0);
            }
            const float *A2 = parameters->A2 + c;
            const int64_t start = (b * plan->kept + t0 / CHUNK - 1) * state * kept_width + c;
#define RECUR_BACK(COUNT)                                                                                               \
    vec h[COUNT];                                                                                                       \
    for (int i = 0; i < COUNT; i++) h[i] = t0 ? load(direction->states + start + (n + i) * kept_width) : splat(0);                                        \
    if (wide)                                                                                                           \
        recur(COUNT, 1, 1, steps, chunk.dt, chunk.dtu, A2 + n * padded, padded, h, row(B, t0) + n, B.step,               \
              row(C, t0) + n, C.step, chunk.y, s.kept, s.decays);                                                       \
    else                                                                                                                \
        recur(COUNT, 0, 1, steps, chunk.dt, chunk.dtu, A2 + n * padded, padded, h, row(B, t0) + n, B.step,               \
              row(C, t0) + n, C.step, chunk.y, s.kept, s.decays);                                                       \
    reverse_recur(COUNT, steps, chunk.dt, chunk.dtu, grad_y, A2 + n * padded, padded, s.carried + own * state + n,      \
                  s.grad_A + own * state + n, row(B, t0) + n, B.step, row(C, t0) + n, C.step, s.kept, s.decays,         \
                  s.grad_B + n, s.grad_C + n, state, grad_dtu, grad_dt)
            FOR_STATE_BLOCKS(BACKWARD_STATES, state, RECUR_BACK)
#undef RECUR_BACK
            vec D = load(parameters->D + c), grad_D = s.grad_D[own], grad_bias = s.grad_bias[own];
            for (int64_t t = steps - 1; t >= 0; t--) {
                if (z.first) {
                    float *to = row(grad_z, t0 + t) + c;
                    vec gradient = grad_gate[t] * (chunk.y[t] + D * chunk.u[t]);
                    store_some(to, which ? gradient + load_some(to, count) : gradient, count);
                }
                /* A2 = A log2(e) */
                vec gradient = (grad_dtu[t] * chunk.u[t] + grad_dt[t] * LN2) * slope[t];
                store_some(row(grad_delta, t0 + t) + c, gradient, count);
                store_some(row(grad_u, t0 + t) + c, grad_dtu[t] * chunk.dt[t] + grad_y[t] * D, count);
                grad_bias += gradient;
                grad_D += grad_y[t] * chunk.u[t];
            }
            s.grad_D[own] = grad_D;
            s.grad_bias[own] = grad_bias;
        }
        for (int64_t t = 0; t < steps; t++)
            for (int64_t n = 0; n < state; n++) {
                row(to_B, t0 + t)[n] = lane_sum(s.grad_B + t * state + n);
                row(to_C, t0 + t)[n] = lane_sum(s.grad_C + t * state + n);
            }
    }
    for (int64_t v = first; v < last; v++) {
        int64_t c = v * LANES, own = v - first;
        for (int64_t n = 0; n < state; n++)
            store(plan->grad_A[which] + (b * state + n) * padded + c, s.grad_A[own * state + n]);
        store(plan->grad_D[which] + b * padded + c, s.grad_D[own]);
        store(plan->grad_bias[which] + b * padded + c, s.grad_bias[own]);
    }
}

static void scan_backward_task(const void *arguments, int64_t index, void *scratch) {
    const Plan *plan = arguments;
    for (int which = 0; which < plan->scan->directions; which++)
        scan_direction_backward(plan, which, index / plan->groups, index % plan->groups, scratch);
}

/* to[i] = sum over `count` partial sums that lie `step` apart, in their order. */
static void add_up(float *to, const float *partial, int64_t count, int64_t step, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        int64_t left = size - i;
        vec sum = load_some(partial + i, left);
        for (int64_t k = 1; k < count; k++) sum += load_some(partial + k * step + i, left);
        store_some(to + i, sum, left);
    }
}

/* Adds up the partial sums of batch entry `index`: gradients of B and C. */
static void add_groups_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Plan *plan = arguments;
    const Scan *scan = plan->scan;
    int64_t length = scan->length, state = scan->state, step = scan->batch * length * state;
    for (int which = 0; which < scan->directions; which++) {
        const Direction *direction = &scan->direction[which];
        Walk B = walk(&direction->grad_B, index, length, 0), C = walk(&direction->grad_C, index, length, 0);
        Walk partial_B = walk(&plan->grad_B[which], index, length, 0), partial_C = walk(&plan->grad_C[which], index, length, 0);
        for (int64_t t = 0; t < length; t++) {
            add_up(row(B, t), row(partial_B, t), plan->groups, step, state);
            add_up(row(C, t), row(partial_C, t), plan->groups, step, state);
        }
    }
}

static void add_batch(const Plan *plan, int which) {
    const Scan *scan = plan->scan;
    const Direction *direction = &scan->direction[which];
    int64_t channels = scan->channels, state = scan->state, padded = plan->padded;
    float *sum = plan->grad_A[which];
    add_up(sum, sum, scan->batch, state * padded, state * padded);
    for (int64_t n = 0; n < state; n++)
        for (int64_t c = 0; c < channels; c++) {
            float a = plan->parameters[which].A2[n * padded + c] * LN2;
            direction->grad_A[c * state + n] = sum[n * padded + c] * (scan->log_A ? a : 1.0f);
        }
    if (direction->grad_D) add_up(direction->grad_D, plan->grad_D[which], scan->batch, padded, channels);
    if (direction->grad_bias) add_up(direction->grad_bias, plan->grad_bias[which], scan->batch, padded, channels);
}

EXPORT int ENTRY(scan_backward)(const Scan *scan) {
    enum { TASKS = 8 };
    Plan plan = plan_scan(scan, TASKS);
    int64_t floats = (int64_t)parameter_floats(scan->state, plan.padded);
    int64_t per_batch = (scan->state + 2) * plan.padded;
    int64_t partial = plan.groups == 1 ? 0 : plan.groups * scan->batch * scan->length * scan->state;
    int64_t each = round_up(floats + scan->batch * per_batch + 2 * partial, PADDING);
    float *memory = vim_timm_allocate(sizeof(float) * (size_t)(each * scan->directions));
    if (!memory) return -1;
    for (int64_t i = 0; i < scan->directions; i++) {
        const Direction *direction = &scan->direction[i];
        float *p = memory + i * each;
        plan.parameters[i] = prepare(scan, direction, p, plan.padded);
        plan.grad_A[i] = p + floats;
        plan.grad_D[i] = plan.grad_A[i] + scan->batch * scan->state * plan.padded;
        plan.grad_bias[i] = plan.grad_D[i] + scan->batch * plan.padded;
        plan.grad_B[i] = direction->grad_B;
        plan.grad_C[i] = direction->grad_C;
        if (partial) {
            float *sums = plan.grad_bias[i] + scan->batch * plan.padded;
            plan.grad_B[i] = (Rows){sums, scan->length * scan->state, scan->state};
            plan.grad_C[i] = (Rows){sums + partial, scan->length * scan->state, scan->state};
        }
    }
    size_t scratch = scratch_bytes(plan.vectors / plan.groups + 1, scan->state);
    int failed = vim_timm_run(scan_backward_task, &plan, scan->batch * plan.groups, scan->threads, scratch);
    if (!failed && partial) failed = vim_timm_run(add_groups_task, &plan, scan->batch, scan->threads, 0);
    if (!failed)
        for (int64_t i = 0; i < scan->directions; i++) add_batch(&plan, (int)i);
    vim_timm_free(memory);
    return failed;
}

/* ---- depthwise causal convolution --------------------------------------------------------------------------------------- */

/* Tokens to a task of the forward pass, and to a tile of the backward pass. */
enum { TILE = 32 };

typedef struct {
    Rows x, y[2], grad_x; /* y: the results, or in the backward pass their gradients */
    const float *weight[2], *bias[2]; /* (channels, width), (channels) or NULL */
    float *grad_weight[2], *grad_bias[2];
    int64_t directions, batch, length, channels, width, silu, threads;
} Convolution;

typedef struct {
    const Convolution *conv;
    float *taps[2]; /* (width, padded): row j meets the token j steps before, in the direction's order */
    float *bias[2]; /* (padded) */
    float *zeros;   /* (padded): the tokens before the first */
    int64_t padded, vectors, groups;
    float *grad_taps[2], *grad_bias[2]; /* (batch, width, padded), (batch, padded) */
} ConvolutionPlan;

/* y = act(bias + sum_j taps[j] x[t -+ j]) for one token. */
INLINE void convolve_row(const int width, const ConvolutionPlan *plan, int which, int64_t b, int64_t t, const int silu,
                         float *y) {
    const Convolution *conv = plan->conv;
    const int64_t taps = width ? width : conv->width, padded = plan->padded;
    const float *x = conv->x.data + b * conv->x.batch;
    const float *rows[8];
    if (width)
        for (int j = 0; j < width; j++) {
            int64_t from = which ? t + j : t - j;
            rows[j] = from < 0 || from >= conv->length ? plan->zeros : x + from * conv->x.token;
        }
    for (int64_t c = 0; c < conv->channels; c += LANES) {
        int64_t count = least(LANES, conv->channels - c);
        vec s = load(plan->bias[which] + c);
        if (width) {
            UNROLL for (int j = 0; j < width; j++) s += load_some(rows[j] + c, count) * load(plan->taps[which] + j * padded + c);
        } else {
            for (int64_t j = 0; j < taps; j++) {
                int64_t from = which ? t + j : t - j;
                if (from >= 0 && from < conv->length)
                    s += load_some(x + from * conv->x.token + c, count) * load(plan->taps[which] + j * padded + c);
            }
        }
        store_some(y + c, silu ? s * sigmoid(s) : s, count);
    }
}

static void convolution_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const ConvolutionPlan *plan = arguments;
    const Convolution *conv = plan->conv;
    int64_t tiles = (conv->length + TILE - 1) / TILE, b = index / tiles, t0 = index % tiles * TILE;
    for (int64_t t = t0; t < least(t0 + TILE, conv->length); t++)
        for (int which = 0; which < conv->directions; which++) {
            float *y = row(walk(&conv->y[which], b, conv->length, 0), t);
            if (conv->width == 4 && conv->silu)
                convolve_row(4, plan, which, b, t, 1, y);
            else
                convolve_row(0, plan, which, b, t, conv->silu != 0, y);
        }
}

static ConvolutionPlan plan_convolution(const Convolution *conv) {
    enum { TASKS = 8 };
    ConvolutionPlan plan = {.conv = conv, .padded = round_up(conv->channels, LANES)};
    plan.vectors = plan.padded / LANES;
    plan.groups = most(1, least(plan.vectors, (TASKS + conv->batch - 1) / most(conv->batch, 1)));
    return plan;
}

static void lay_out_taps(ConvolutionPlan *plan, float *memory) {
    const Convolution *conv = plan->conv;
    int64_t width = conv->width, padded = plan->padded;
    plan->zeros = memory;
    memset(plan->zeros, 0, sizeof(float) * (size_t)padded);
    for (int64_t i = 0; i < conv->directions; i++) {
        plan->bias[i] = memory + (1 + i * (width + 1)) * padded;
        plan->taps[i] = plan->bias[i] + padded;
        copy_padded(conv->bias[i], plan->bias[i], conv->channels, padded);
        for (int64_t j = 0; j < width; j++)
            for (int64_t c = 0; c < padded; c++)
                plan->taps[i][j * padded + c] = c < conv->channels ? conv->weight[i][c * width + width - 1 - j] : 0;
    }
}

static size_t tap_floats(const ConvolutionPlan *plan) {
    return (size_t)((1 + plan->conv->directions * (plan->conv->width + 1)) * plan->padded);
}

EXPORT int ENTRY(conv_forward)(const Convolution *conv) {
    ConvolutionPlan plan = plan_convolution(conv);
    float *memory = vim_timm_allocate(sizeof(float) * tap_floats(&plan));
    if (!memory) return -1;
    lay_out_taps(&plan, memory);
    int64_t tiles = (conv->length + TILE - 1) / TILE;
    int failed = vim_timm_run(convolution_task, &plan, conv->batch * tiles, conv->threads, 0);
    vim_timm_free(memory);
    return failed;
}

/* One tile of one vector of channels. x: (tile + 2 halo), gradient: (tile + halo), both of the caller's scratch.
   With s the sum before the activation: gs = gy act'(s), gx_t = sum_j taps[j] gs_{t +- j}, gtaps[j] = sum_t gs_t x_{t -+ j}. */
INLINE void convolve_tile_back(const int width, const ConvolutionPlan *plan, int64_t b, int64_t t0, int64_t c, vec *x,
                               vec *gradient, vec *grad_taps[2], vec *grad_bias[2]) {
    const Convolution *conv = plan->conv;
    const int64_t taps = width ? width : conv->width, halo = taps - 1, length = conv->length, padded = plan->padded;
    const int64_t steps = least(TILE, length - t0), count = least(LANES, conv->channels - c);
    for (int64_t i = 0; i < steps + 2 * halo; i++) {
        int64_t t = t0 - halo + i;
        x[i] = t < 0 || t >= length ? splat(0)
                                    : load_some(conv->x.data + b * conv->x.batch + t * conv->x.token + c, count);
    }
    for (int which = 0; which < conv->directions; which++) {
        const float *tap = plan->taps[which] + c;
        const vec bias = load(plan->bias[which] + c);
        /* The tile's tokens receive from outputs up to `halo` later in the direction's order: gradient[0] is token `from`. */
        const int64_t from = which ? t0 - halo : t0;
        for (int64_t i = 0; i < steps + halo; i++) {
            int64_t t = from + i;
            if (t < 0 || t >= length) {
                gradient[i] = splat(0);
                continue;
            }
            const vec *centre = x + (t - t0 + halo);
            const Rows *rows = &conv->y[which];
            vec g = load_some(rows->data + b * rows->batch + t * rows->token + c, count);
            if (conv->silu) {
                vec s = bias;
                for (int64_t j = 0; j < taps; j++) s += centre[which ? j : -j] * load(tap + j * padded);
                vec sg = sigmoid(s);
                g *= sg * (1.0f + s * (1.0f - sg));
            }
            gradient[i] = g;
        }
        vec sum_bias = *grad_bias[which];
        for (int64_t i = 0; i < steps; i++) {
            const vec *own = gradient + i + (which ? halo : 0);
            float *to = conv->grad_x.data + b * conv->grad_x.batch + (t0 + i) * conv->grad_x.token + c;
            vec gx = which ? load_some(to, count) : splat(0);
            for (int64_t j = 0; j < taps; j++) gx += own[which ? -j : j] * load(tap + j * padded);
            store_some(to, gx, count);
            sum_bias += *own;
        }
        *grad_bias[which] = sum_bias;
        for (int64_t j = 0; j < taps; j++) {
            vec sum = grad_taps[which][j];
            for (int64_t i = 0; i < steps; i++) sum += gradient[i + (which ? halo : 0)] * x[i + halo + (which ? j : -j)];
            grad_taps[which][j] = sum;
        }
    }
}

static size_t conv_scratch_vectors(int64_t vectors, int64_t width) {
    return (size_t)(vectors * 2 * (width + 1) + TILE + 2 * width + TILE + width);
}

static void convolution_backward_task(const void *arguments, int64_t index, void *scratch) {
    const ConvolutionPlan *plan = arguments;
    const Convolution *conv = plan->conv;
    const int64_t b = index / plan->groups, g = index % plan->groups, width = conv->width, padded = plan->padded;
    const int64_t first = g * plan->vectors / plan->groups, last = (g + 1) * plan->vectors / plan->groups;
    /* (vectors, directions, 1 + width): gradients of bias and taps */
    vec *sums = scratch, *x = sums + (last - first) * 2 * (width + 1), *gradient = x + TILE + 2 * width;
    memset(sums, 0, sizeof(vec) * (size_t)((last - first) * 2 * (width + 1)));
    for (int64_t t0 = 0; t0 < conv->length; t0 += TILE)
        for (int64_t v = first; v < last; v++) {
            vec *own = sums + (v - first) * 2 * (width + 1);
            vec *grad_bias[2] = {own, own + width + 1}, *grad_taps[2] = {own + 1, own + width + 2};
            if (width == 4)
                convolve_tile_back(4, plan, b, t0, v * LANES, x, gradient, grad_taps, grad_bias);
            else
                convolve_tile_back(0, plan, b, t0, v * LANES, x, gradient, grad_taps, grad_bias);
        }
    for (int64_t v = first; v < last; v++)
        for (int which = 0; which < conv->directions; which++) {
            const vec *own = sums + (v - first) * 2 * (width + 1) + which * (width + 1);
            store(plan->grad_bias[which] + b * padded + v * LANES, own[0]);
            for (int64_t j = 0; j < width; j++)
                store(plan->grad_taps[which] + (b * width + j) * padded + v * LANES, own[1 + j]);
        }
}

static void add_taps(const ConvolutionPlan *plan, int which) {
    const Convolution *conv = plan->conv;
    const int64_t width = conv->width, padded = plan->padded;
    float *sum = plan->grad_taps[which];
    add_up(sum, sum, conv->batch, width * padded, width * padded);
    for (int64_t j = 0; j < width; j++)
        for (int64_t c = 0; c < conv->channels; c++)
            conv->grad_weight[which][c * width + width - 1 - j] = sum[j * padded + c];
    if (conv->grad_bias[which]) add_up(conv->grad_bias[which], plan->grad_bias[which], conv->batch, padded, conv->channels);
}

EXPORT int ENTRY(conv_backward)(const Convolution *conv) {
    ConvolutionPlan plan = plan_convolution(conv);
    int64_t width = conv->width, padded = plan.padded, each = conv->batch * (width + 1) * padded;
    size_t taps = tap_floats(&plan);
    float *memory = vim_timm_allocate(sizeof(float) * (taps + (size_t)(each * conv->directions)));
    if (!memory) return -1;
    lay_out_taps(&plan, memory);
    for (int64_t i = 0; i < conv->directions; i++) {
        plan.grad_taps[i] = memory + (int64_t)taps + i * each;
        plan.grad_bias[i] = plan.grad_taps[i] + conv->batch * width * padded;
    }
    size_t scratch = sizeof(vec) * conv_scratch_vectors(plan.vectors / plan.groups + 1, width);
    int failed = vim_timm_run(convolution_backward_task, &plan, conv->batch * plan.groups, conv->threads, scratch);
    if (!failed)
        for (int64_t i = 0; i < conv->directions; i++) add_taps(&plan, (int)i);
    vim_timm_free(memory);
    return failed;
}

/* ---- matrix products -------------------------------------------------------------------------------------------------- */

/* A tile of the result, held in registers: rows and vectors of columns. */
enum { PRODUCT_ROWS = LANES == 16 ? 8 : 4, PRODUCT_VECTORS = LANES == 16 ? 3 : 2, PRODUCT_BLOCK = 32 };

/* For each entry, out (rows, columns) = a (rows, depth) b (depth, columns), or `add`ed to it. a has any strides; b's rows
   can be read in whole vectors up to b_columns. */
typedef struct {
    const float *a, *b;
    float *out;
    int64_t entries, rows, columns, depth, a_entry, a_row, a_column, b_row, b_columns, out_entry, out_row, add;
} Product;

INLINE void product_tile(const int rows, const int vectors, const int partial, const Product *p, int64_t entry, int64_t i,
                         int64_t j) {
    const float *a = p->a + entry * p->a_entry + i * p->a_row, *b = p->b + j;
    const int64_t a_row = p->a_row, a_column = p->a_column, b_row = p->b_row, readable = p->b_columns - j;
    vec sum[8][3];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = splat(0);
    for (int64_t k = p->depth; k > 0; k--, a += a_column, b += b_row) {
        vec right[3];
        UNROLL for (int v = 0; v < vectors; v++) right[v] = partial ? load_some(b, readable) : load(b + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec left = splat(a[r * a_row]);
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += left * right[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *to = p->out + entry * p->out_entry + (i + r) * p->out_row + j + v * LANES;
            const int64_t count = p->columns - j - v * LANES;
            store_some(to, p->add ? sum[r][v] + load_some(to, count) : sum[r][v], count);
        }
}

INLINE void product_rows(const int vectors, const int partial, const Product *p, int64_t entry, int64_t i, int64_t last,
                         int64_t j) {
    for (; i + PRODUCT_ROWS <= last; i += PRODUCT_ROWS) product_tile(PRODUCT_ROWS, vectors, partial, p, entry, i, j);
    for (; i + 4 <= last; i += 4) product_tile(4, vectors, partial, p, entry, i, j);
    for (; i < last; i++) product_tile(1, vectors, partial, p, entry, i, j);
}

static int64_t product_blocks(const Product *p) {
    const int64_t width = PRODUCT_VECTORS * LANES;
    return (p->rows + PRODUCT_BLOCK - 1) / PRODUCT_BLOCK * ((p->columns + width - 1) / width);
}
static void product_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Product *p = arguments;
    const int64_t width = PRODUCT_VECTORS * LANES, each = product_blocks(p), across = (p->columns + width - 1) / width;
    const int64_t entry = index / each, block = index % each;
    const int64_t i = block / across * PRODUCT_BLOCK, last = least(i + PRODUCT_BLOCK, p->rows);
    int64_t j = block % across * width;
    if (j + width <= p->b_columns)
        product_rows(PRODUCT_VECTORS, 0, p, entry, i, last, j);
    else
        for (; j < p->columns; j += LANES)
            if (j + LANES <= p->b_columns)
                product_rows(1, 0, p, entry, i, last, j);
            else
                product_rows(1, 1, p, entry, i, last, j);
}
static int multiply(Product product, int64_t threads) {
    return vim_timm_run(product_task, &product, product.entries * product_blocks(&product), threads, 0);
}

/* ---- the inside of a block ------------------------------------------------------------------------------------------- */

/* Tokens of a slice of the batch, unless one entry is longer, and of a tile of the forward pass: what lies between
   convolution and gate should stay in cache. A multiple of CHUNK. */
#ifndef SLICE
#define SLICE 256
#endif

typedef struct {
    const float *conv, *conv_bias, *x_proj, *dt, *dt_bias, *A_log, *D; /* (D, W), (D), (R + 2 N, D), (D, R), (D), (D, N), (D) */
    float *x, *states;                                                 /* (B, L, R + 2 N), and as the scan's, or NULL */
    float *grad_conv, *grad_conv_bias, *grad_x_proj, *grad_dt, *grad_dt_bias, *grad_A_log, *grad_D;
} MixerDirection;

typedef struct {
    MixerDirection direction[2];
    Rows x, z, out, grad_x, grad_z; /* out: the result, or in the backward pass its gradient */
    int64_t batch, length, channels, state, rank, width, threads;
    double scale;
} Mixer;

/* A slice of the batch on its way through a block: its workspace, and the views of it that are being computed. */
typedef struct {
    const Mixer *mixer;
    int64_t row;                                   /* width of the projections */
    int64_t entries, tile;                         /* at most: batch entries of a slice, tokens of a tile */
    int which;                                     /* direction, */
    int64_t b, first;                              /* batch entry and token of the view's beginning */
    Convolution conv;
    Scan scan;
    ConvolutionPlan conv_plan, whole_conv;         /* of the slice, and of the batch: partial sums begin elsewhere */
    Plan scan_plan, whole_scan;
    float *x_proj[2], *dt[2], *dt_rows[2];         /* transposed (D, padded row) and (R, padded D); dt as (D, padded R) */
    float *u[2], *delta[2], *x[2];                 /* (entries, tile, D or row) */
    float *grad_u[2], *grad_delta[2], *grad_x[2];
    float *grad_dt[2];                             /* transposed: (R, D) */
    float *memory;
} Block;

/* Hands out pieces of one allocation; while there is none it only adds up their sizes. */
typedef struct {
    float *memory;
    int64_t used;
} Arena;
static float *take(Arena *arena, int64_t floats) {
    float *piece = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += round_up(floats, PADDING);
    return piece;
}

static Rows dense(float *data, int64_t length, int64_t width) { return (Rows){data, length * width, width}; }
static Rows from(Rows rows, int64_t b, int64_t t) {
    if (rows.data) rows.data += b * rows.batch + t * rows.token;
    return rows;
}

/* The forward pass computes one direction after the other, in the same memory. */
static void lay_out_forward(Block *block, Arena *arena) {
    const Mixer *m = block->mixer;
    const int64_t tokens = block->entries * block->tile, channels = m->channels;
    const int64_t carried = block->entries * block->scan_plan.padded * m->state;
    block->scan_plan.carry = (vec *)(void *)take(arena, carried);
    float *u = take(arena, tokens * channels), *delta = take(arena, tokens * channels), *x = take(arena, tokens * block->row);
    for (int i = 0; i < 2; i++) {
        block->u[i] = u;
        block->delta[i] = delta;
        block->x[i] = x;
        block->x_proj[i] = take(arena, channels * round_up(block->row, LANES));
        if (arena->memory)
            transpose(m->direction[i].x_proj, block->x_proj[i], block->row, round_up(block->row, LANES), channels);
    }
}

static void lay_out_backward(Block *block, Arena *arena) {
    const Mixer *m = block->mixer;
    Plan *plan = &block->scan_plan;
    const int64_t tokens = block->entries * m->length, channels = m->channels, padded = plan->padded;
    const int64_t width = round_up(m->rank, LANES), partial = plan->groups == 1 ? 0 : plan->groups * tokens * m->state;
    for (int i = 0; i < 2; i++) {
        block->u[i] = take(arena, tokens * channels);
        block->delta[i] = take(arena, tokens * channels);
        block->grad_u[i] = take(arena, tokens * channels);
        block->grad_delta[i] = take(arena, tokens * channels);
        block->grad_x[i] = take(arena, tokens * block->row);
        block->grad_dt[i] = take(arena, m->rank * channels);
        block->dt_rows[i] = take(arena, channels * width);
        if (arena->memory)
            for (int64_t c = 0; c < channels; c++)
                copy_padded(m->direction[i].dt + c * m->rank, block->dt_rows[i] + c * width, m->rank, width);
        plan->grad_A[i] = take(arena, m->batch * m->state * padded);
        plan->grad_D[i] = take(arena, m->batch * padded);
        plan->grad_bias[i] = take(arena, m->batch * padded);
        plan->grad_B[i] = dense(take(arena, partial), m->length, m->state);
        plan->grad_C[i] = dense(take(arena, partial), m->length, m->state);
        block->conv_plan.grad_taps[i] = take(arena, m->batch * m->width * padded);
        block->conv_plan.grad_bias[i] = take(arena, m->batch * padded);
    }
}

static void lay_out_block(Block *block, Arena *arena, int backward) {
    const Mixer *m = block->mixer;
    const int64_t padded = block->scan_plan.padded;
    float *taps = take(arena, (int64_t)tap_floats(&block->conv_plan));
    if (taps) lay_out_taps(&block->conv_plan, taps);
    for (int i = 0; i < 2; i++) {
        float *parameters = take(arena, (int64_t)parameter_floats(m->state, padded));
        if (parameters) block->scan_plan.parameters[i] = prepare(&block->scan, &block->scan.direction[i], parameters, padded);
        block->dt[i] = take(arena, m->rank * padded);
        if (arena->memory) transpose(m->direction[i].dt, block->dt[i], m->channels, padded, m->rank);
    }
    if (backward)
        lay_out_backward(block, arena);
    else
        lay_out_forward(block, arena);
}

/* Returns 0 when there is no memory. */
static int begin_block(Block *block, const Mixer *m, int backward) {
    /* Threads meet four times a tile, which costs as much as 30 of its tokens: they get larger ones. */
    const int64_t tile = m->threads > 1 ? 4 * SLICE : SLICE;
    *block = (Block){.mixer = m, .row = m->rank + 2 * m->state, .tile = backward ? m->length : least(tile, m->length)};
    block->conv = (Convolution){.x = m->x, .directions = 2, .batch = m->batch, .length = m->length,
                                .channels = m->channels, .width = m->width, .silu = 1, .threads = m->threads};
    block->scan = (Scan){.directions = 2, .batch = m->batch, .length = m->length, .channels = m->channels,
                         .state = m->state, .softplus = 1, .log_A = 1, .threads = m->threads, .scale = m->scale};
    for (int i = 0; i < 2; i++) {
        const MixerDirection *d = &m->direction[i];
        Direction *scan = &block->scan.direction[i];
        block->conv.weight[i] = d->conv;
        block->conv.bias[i] = d->conv_bias;
        block->conv.grad_weight[i] = d->grad_conv;
        block->conv.grad_bias[i] = d->grad_conv_bias;
        scan->A = d->A_log;
        scan->D = d->D;
        scan->bias = d->dt_bias;
        scan->grad_A = d->grad_A_log;
        scan->grad_D = d->grad_D;
        scan->grad_bias = d->grad_dt_bias;
    }
    block->conv_plan = plan_convolution(&block->conv);
    /* The groups of the backward pass order sums and must not follow the threads; a slice may. */
    enum { TASKS = 8 };
    block->scan_plan = plan_scan(&block->scan, backward ? TASKS : m->threads > 1 ? 4 * m->threads : 1);
    block->entries = most(1, SLICE / m->length);
    if (m->threads > 1)
        block->entries = most(block->entries, (2 * m->threads + block->scan_plan.groups - 1) / block->scan_plan.groups);
    block->entries = least(block->entries, m->batch);
    Arena arena = {NULL, 0};
    lay_out_block(block, &arena, backward);
    block->memory = arena.memory = vim_timm_borrow(sizeof(float) * (size_t)arena.used);
    if (!arena.memory) return 0;
    arena.used = 0;
    lay_out_block(block, &arena, backward);
    block->whole_conv = block->conv_plan;
    block->whole_scan = block->scan_plan;
    return 1;
}

/* Views of a direction's tokens t to t + count, in its order, of the slice that begins with batch entry b. */
static void take_tile(Block *block, int which, int64_t b, int64_t t, int64_t count) {
    const Mixer *m = block->mixer;
    const MixerDirection *d = &m->direction[which];
    const int64_t channels = m->channels, state = m->state, row = block->row, rank = m->rank;
    Plan *plan = &block->scan_plan;
    Scan *scan = &block->scan;
    Direction *to = &scan->direction[which];
    block->which = which;
    block->b = b;
    block->first = which ? m->length - t - count : t;
    scan->batch = least(block->entries, m->batch - b);
    scan->length = count;
    scan->z = from(m->z, b, block->first);
    scan->out = from(m->out, b, block->first);
    scan->grad_z = from(m->grad_z, b, block->first);
    plan->resumed = t > 0;
    const Rows x = d->x ? from(dense(d->x, m->length, row), b, block->first) : dense(block->x[which], count, row);
    to->u = dense(block->u[which], count, channels);
    to->delta = dense(block->delta[which], count, channels);
    to->B = (Rows){x.data + rank, x.batch, x.token};
    to->C = (Rows){x.data + rank + state, x.batch, x.token};
    to->states = d->states ? d->states + (b * plan->kept + t / CHUNK) * state * round_up(channels, PADDING) : NULL;
    if (!block->grad_x[which]) return;
    const Plan *whole = &block->whole_scan;
    plan->grad_A[which] = whole->grad_A[which] + b * state * plan->padded;
    plan->grad_D[which] = whole->grad_D[which] + b * plan->padded;
    plan->grad_bias[which] = whole->grad_bias[which] + b * plan->padded;
    block->conv_plan.grad_taps[which] = block->whole_conv.grad_taps[which] + b * m->width * plan->padded;
    block->conv_plan.grad_bias[which] = block->whole_conv.grad_bias[which] + b * plan->padded;
    to->grad_u = dense(block->grad_u[which], count, channels);
    to->grad_delta = dense(block->grad_delta[which], count, channels);
    to->grad_B = dense(block->grad_x[which] + rank, count, row);
    to->grad_C = dense(block->grad_x[which] + rank + state, count, row);
    if (plan->groups == 1) {
        plan->grad_B[which] = to->grad_B;
        plan->grad_C[which] = to->grad_C;
    }
}

static void convolve_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Block *block = arguments;
    const int which = block->which;
    const int64_t length = block->scan.length, tiles = (length + TILE - 1) / TILE, e = index / tiles;
    const Walk u = walk(&block->scan.direction[which].u, e, length, 0);
    for (int64_t t = index % tiles * TILE; t < least((index % tiles + 1) * TILE, length); t++)
        if (block->conv.width == 4)
            convolve_row(4, &block->conv_plan, which, block->b + e, block->first + t, 1, row(u, t));
        else
            convolve_row(0, &block->conv_plan, which, block->b + e, block->first + t, 1, row(u, t));
}
static int convolve(const Block *block) {
    const int64_t tiles = (block->scan.length + TILE - 1) / TILE;
    return vim_timm_run(convolve_task, block, block->scan.batch * tiles, block->conv.threads, 0);
}

static int project(const Block *block) {
    const Mixer *m = block->mixer;
    const Direction *d = &block->scan.direction[block->which];
    const int64_t width = round_up(block->row, LANES);
    return multiply((Product){.a = d->u.data, .a_entry = d->u.batch, .a_row = d->u.token, .a_column = 1,
                              .b = block->x_proj[block->which], .b_row = width, .b_columns = width,
                              .out = d->B.data - m->rank, .out_entry = d->B.batch, .out_row = d->B.token,
                              .entries = block->scan.batch, .rows = block->scan.length, .columns = block->row,
                              .depth = m->channels},
                    m->threads);
}

static int compute_step_sizes(const Block *block) {
    const Mixer *m = block->mixer;
    const Direction *d = &block->scan.direction[block->which];
    const int64_t padded = block->scan_plan.padded;
    return multiply((Product){.a = d->B.data - m->rank, .a_entry = d->B.batch, .a_row = d->B.token, .a_column = 1,
                              .b = block->dt[block->which], .b_row = padded, .b_columns = padded,
                              .out = d->delta.data, .out_entry = d->delta.batch, .out_row = d->delta.token,
                              .entries = block->scan.batch, .rows = block->scan.length, .columns = m->channels,
                              .depth = m->rank},
                    m->threads);
}

static void scan_tile_task(const void *arguments, int64_t index, void *scratch) {
    const Block *block = arguments;
    const Plan *plan = &block->scan_plan;
    int64_t b = index / plan->groups, g = index % plan->groups;
    scan_direction(plan, block->which, b, group_start(plan, g), group_start(plan, g + 1), scratch);
}

EXPORT int ENTRY(mixer_forward)(const Mixer *m) {
    Block block;
    if (!begin_block(&block, m, 0)) return -1;
    int failed = 0;
    for (int64_t b = 0; b < m->batch && !failed; b += block.entries)
        for (int which = 0; which < 2; which++)
            for (int64_t t = 0; t < m->length && !failed; t += block.tile) {
                take_tile(&block, which, b, t, least(block.tile, m->length - t));
                failed = convolve(&block) || project(&block) || compute_step_sizes(&block) ||
                         vim_timm_run(scan_tile_task, &block, block.scan.batch * block.scan_plan.groups, m->threads, 0);
            }
    vim_timm_give_back(block.memory);
    return failed ? -1 : 0;
}

/* From the gradients of delta, B and C to those of the projections and of u. */
static int project_back(const Block *block) {
    const Mixer *m = block->mixer;
    const int i = block->which;
    const int64_t tokens = block->scan.batch * m->length, channels = m->channels, width = round_up(m->rank, LANES);
    return multiply((Product){.a = block->grad_delta[i], .a_row = channels, .a_column = 1,
                              .b = block->dt_rows[i], .b_row = width, .b_columns = width,
                              .out = block->grad_x[i], .out_row = block->row,
                              .entries = 1, .rows = tokens, .columns = m->rank, .depth = channels},
                    m->threads) ||
           multiply((Product){.a = block->grad_x[i], .a_row = block->row, .a_column = 1,
                              .b = m->direction[i].x_proj, .b_row = channels, .b_columns = channels,
                              .out = block->grad_u[i], .out_row = channels, .add = 1,
                              .entries = 1, .rows = tokens, .columns = channels, .depth = block->row},
                    m->threads);
}

/* Adds the gradients of both projections' weights, entry by entry: the order must not depend on the slices. */
static int add_weight_gradients(const Block *block) {
    const Mixer *m = block->mixer;
    const int i = block->which;
    const int64_t length = m->length, channels = m->channels, row = block->row;
    int failed = 0;
    for (int64_t e = 0; e < block->scan.batch && !failed; e++) {
        const int64_t b = block->b + e;
        failed = multiply((Product){.a = block->grad_x[i] + e * length * row, .a_row = 1, .a_column = row,
                                    .b = block->u[i] + e * length * channels, .b_row = channels, .b_columns = channels,
                                    .out = m->direction[i].grad_x_proj, .out_row = channels, .add = b > 0,
                                    .entries = 1, .rows = row, .columns = channels, .depth = length},
                          m->threads) ||
                 multiply((Product){.a = m->direction[i].x + b * length * row, .a_row = 1, .a_column = row,
                                    .b = block->grad_delta[i] + e * length * channels, .b_row = channels, .b_columns = channels,
                                    .out = block->grad_dt[i], .out_row = channels, .add = b > 0,
                                    .entries = 1, .rows = m->rank, .columns = channels, .depth = length},
                          m->threads);
    }
    return failed;
}

static int convolve_back(Block *block) {
    const ConvolutionPlan *plan = &block->conv_plan;
    Convolution *conv = &block->conv;
    conv->batch = block->scan.batch;
    conv->x = from(block->mixer->x, block->b, 0);
    conv->grad_x = from(block->mixer->grad_x, block->b, 0);
    for (int i = 0; i < 2; i++) conv->y[i] = dense(block->grad_u[i], conv->length, conv->channels);
    const size_t scratch = sizeof(vec) * conv_scratch_vectors(plan->vectors / plan->groups + 1, conv->width);
    int failed = vim_timm_run(convolution_backward_task, plan, conv->batch * plan->groups, conv->threads, scratch);
    conv->x = block->mixer->x;
    return failed;
}

/* The forward pass kept the projections and the scan's states; convolution and step sizes are computed again. */
EXPORT int ENTRY(mixer_backward)(const Mixer *m) {
    Block block;
    if (!begin_block(&block, m, 1)) return -1;
    const Plan *plan = &block.scan_plan;
    const size_t scratch = scratch_bytes(plan->vectors / plan->groups + 1, m->state);
    int failed = 0;
    for (int64_t b = 0; b < m->batch && !failed; b += block.entries) {
        for (int which = 0; which < 2 && !failed; which++) {
            take_tile(&block, which, b, 0, m->length);
            failed = convolve(&block) || compute_step_sizes(&block);
        }
        failed = failed || vim_timm_run(scan_backward_task, plan, block.scan.batch * plan->groups, m->threads, scratch) ||
                 (plan->groups > 1 && vim_timm_run(add_groups_task, plan, block.scan.batch, m->threads, 0));
        for (block.which = 0; block.which < 2 && !failed; block.which++)
            failed = project_back(&block) || add_weight_gradients(&block);
        failed = failed || convolve_back(&block);
    }
    block.scan.batch = block.conv.batch = m->batch;
    for (int i = 0; i < 2 && !failed; i++) {
        add_batch(&block.whole_scan, i);
        add_taps(&block.whole_conv, i);
        transpose(block.grad_dt[i], m->direction[i].grad_dt, m->rank, m->rank, m->channels);
    }
    vim_timm_give_back(block.memory);
    return failed ? -1 : 0;
}

/* ---- root mean square norm ------------------------------------------------------------------------------------------- */

/* Rows to a task. */
enum { NORM_ROWS = 32 };

typedef struct {
    const float *x, *weight, *grad; /* (rows, width), (width), and in the backward pass the gradient of y (rows, width) */
    float *y;                       /* (rows, width): the result, or in the backward pass the gradient of x */
    float *grad_weight;             /* (width) */
    int64_t rows, width, threads;
    double eps;
} Norm;

typedef struct {
    const Norm *norm;
    float *grad_weight; /* (tasks, width): partial sums */
} NormPlan;

/* 1 / sqrt(mean(x^2) + eps) of a row. */
INLINE float inverse_root(const Norm *norm, const float *x) {
    vec sum = splat(0);
    for (int64_t c = 0; c < norm->width; c += LANES) {
        vec v = load_some(x + c, norm->width - c);
        sum += v * v;
    }
    return 1.0f / __builtin_sqrtf(lane_sum(&sum) / (float)norm->width + (float)norm->eps);
}

static void norm_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Norm *norm = ((const NormPlan *)arguments)->norm;
    const int64_t width = norm->width;
    for (int64_t r = index * NORM_ROWS; r < least((index + 1) * NORM_ROWS, norm->rows); r++) {
        const float *x = norm->x + r * width;
        const vec inverse = splat(inverse_root(norm, x));
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            store_some(norm->y + r * width + c, load_some(x + c, left) * inverse * load_some(norm->weight + c, left), left);
        }
    }
}

/* With i the inverse root and g = grad * weight: gx = i g - x i^3 mean(g x), gweight = sum over rows of grad x i. */
static void norm_backward_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const NormPlan *plan = arguments;
    const Norm *norm = plan->norm;
    const int64_t width = norm->width;
    float *sums = plan->grad_weight + index * width;
    memset(sums, 0, sizeof(float) * (size_t)width);
    for (int64_t r = index * NORM_ROWS; r < least((index + 1) * NORM_ROWS, norm->rows); r++) {
        const float *x = norm->x + r * width, *grad = norm->grad + r * width;
        const float inverse = inverse_root(norm, x);
        vec dot = splat(0);
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            vec product = load_some(x + c, left) * load_some(grad + c, left);
            dot += product * load_some(norm->weight + c, left);
            store_some(sums + c, load_some(sums + c, left) + product * inverse, left);
        }
        const float pull = lane_sum(&dot) / (float)width * inverse * inverse * inverse;
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            vec g = load_some(grad + c, left) * load_some(norm->weight + c, left);
            store_some(norm->y + r * width + c, g * inverse - load_some(x + c, left) * pull, left);
        }
    }
}

EXPORT int ENTRY(norm_forward)(const Norm *norm) {
    NormPlan plan = {norm, NULL};
    return vim_timm_run(norm_task, &plan, (norm->rows + NORM_ROWS - 1) / NORM_ROWS, norm->threads, 0);
}

EXPORT int ENTRY(norm_backward)(const Norm *norm) {
    int64_t tasks = (norm->rows + NORM_ROWS - 1) / NORM_ROWS;
    NormPlan plan = {norm, vim_timm_allocate(sizeof(float) * (size_t)(tasks * norm->width))};
    if (!plan.grad_weight) return -1;
    int failed = vim_timm_run(norm_backward_task, &plan, tasks, norm->threads, 0);
    if (!failed) add_up(norm->grad_weight, plan.grad_weight, tasks, norm->width, norm->width);
    vim_timm_free(plan.grad_weight);
    return failed;
}
