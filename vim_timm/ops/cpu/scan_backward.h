/* The gradients of the selective scan. */
#pragma once

#include "scan.h"

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
