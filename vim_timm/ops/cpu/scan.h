/* The selective scan forward, and what both passes share. */
#pragma once

#include "rows.h"
#include "runtime.h"

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
_Static_assert(FORWARD_STATES <= 16 && BACKWARD_STATES <= 16, "recur has room for 16 states");
/* The fastest decay, e^60 log2(e) as in the reference: minus infinity times a slope of 0 would be NaN, and so would the
   gradient of a slope of 0 be where a larger number overflows. */
#define FASTEST 1.64756840e26f
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
            vec v = plain_nan(load(a));
            v = at_least((scan->log_A ? -exp_of_any(v) : v) * LOG2E, splat(-FASTEST));
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
        vec d = plain_nan(load_some(row(delta, t0 + t) + c, count) + bias);
        if (with_softplus)
            d = softplus(d, slope ? slope + t : NULL);
        else if (slope)
            slope[t] = splat(1.0f);
        largest = at_least(largest, absolute(d)); /* NaN is none: its decays are NaN either way */
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
