/* The symmetric state space dual forward: y_i = D x_i + sum over j of (C_i . B_j) dt_j x_j sum over orders of
   exp(-|s_i - s_j|), without a matrix of scores in memory. */
#pragma once

#include "product.h"
#include "rows.h"
#include "runtime.h"

typedef struct {
    Rows x, B, C, y;           /* (batch, L, H P), (batch, L, N), (batch, L, N), (batch, L, H P) */
    const float *dt, *growth;  /* (batch, L, H), (batch, orders, L, H): what s grows by at a token */
    const float *D;            /* (H) or NULL */
    const int64_t *visits[2];  /* (batch, L): the tokens as each order meets them, or NULL for 0 to L - 1 */
    int64_t visits_batch[2];   /* strides */
    int64_t batch, length, heads, headdim, state, orders, threads;
    int64_t chunk;             /* tokens; at `length` the decays of all orders are added before the product with x */
} Dual;

typedef struct {
    const Dual *dual;
    int64_t order, chunks, padded; /* padded: of a chunk's tokens, to whole vectors */
    float *v, *B, *s;              /* whole: (batch, H, L, P), (batch, N, padded), (batch, orders, H, padded) */
    float *states, *totals;        /* chunks: (batch, chunks, H, N, 2 P), (batch, chunks, H) */
} DualPlan;

/* Rows of scores whose products with the decays are made at once. */
enum { DUAL_ROWS = 32 };

INLINE int64_t visited(const Dual *d, int64_t order, int64_t b, int64_t t) {
    const int64_t *visits = d->visits[order];
    return visits ? visits[b * d->visits_batch[order] + t] : t;
}
INLINE const float *token(const Rows *rows, int64_t b, int64_t t) { return rows->data + b * rows->batch + t * rows->token; }

/* to[n][t] = row[n]: a token's row becomes a column. */
INLINE void put_column(float *to, int64_t padded, int64_t t, const float *row, int64_t count) {
    for (int64_t n = 0; n < count; n++) to[n * padded + t] = row[n];
}

/* to[c] = scale from[c]. */
INLINE void scale_row(float *to, const float *from, float scale, int64_t width) {
    for (int64_t c = 0; c < width; c += LANES) store_some(to + c, scale * load_some(from + c, width - c), width - c);
}

/* out[j] = scores[j] dt[j] exp(-|s[i] - s[j]|), without dt where it is NULL; with s_2 that order's decays are added. */
INLINE void decayed_row(float *out, const float *scores, const float *dt, const float *s, const float *s_2, int64_t i,
                        int64_t length) {
    const vec own = splat(s[i]), own_2 = splat(s_2 ? s_2[i] : 0.0f);
    for (int64_t j = 0; j < length; j += LANES) {
        vec decay = exp_of_negative(-absolute(own - load(s + j)));
        if (s_2) decay += exp_of_negative(-absolute(own_2 - load(s_2 + j)));
        if (dt) decay *= load(dt + j);
        store(out + j, decay * load(scores + j));
    }
}

/* --- all tokens at once */

/* One head's steps times x, and its s in every order; after the last head, B with its axes exchanged. */
static void dual_prepare_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const DualPlan *plan = arguments;
    const Dual *d = plan->dual;
    const int64_t length = d->length, b = index / (d->heads + 1), h = index % (d->heads + 1);
    if (h == d->heads) {
        float *to = plan->B + b * d->state * plan->padded;
        memset(to, 0, sizeof(float) * (size_t)(d->state * plan->padded));
        for (int64_t t = 0; t < length; t++) put_column(to, plan->padded, t, token(&d->B, b, t), d->state);
        return;
    }
    float *v = plan->v + (b * d->heads + h) * length * d->headdim;
    for (int64_t t = 0; t < length; t++)
        scale_row(v + t * d->headdim, token(&d->x, b, t) + h * d->headdim, d->dt[(b * length + t) * d->heads + h], d->headdim);
    for (int64_t o = 0; o < d->orders; o++) {
        float *s = plan->s + ((b * d->orders + o) * d->heads + h) * plan->padded, sum = 0;
        memset(s, 0, sizeof(float) * (size_t)plan->padded);
        for (int64_t t = 0; t < length; t++) {
            const int64_t at = visited(d, o, b, t);
            s[at] = sum += d->growth[((b * d->orders + o) * length + at) * d->heads + h];
        }
    }
}

static size_t dual_whole_scratch(const DualPlan *plan) { return sizeof(float) * (size_t)(2 * DUAL_ROWS * plan->padded); }

static void dual_whole_task(const void *arguments, int64_t index, void *scratch) {
    const DualPlan *plan = arguments;
    const Dual *d = plan->dual;
    const int64_t length = d->length, padded = plan->padded, blocks = (length + DUAL_ROWS - 1) / DUAL_ROWS;
    const int64_t b = index / blocks, first = index % blocks * DUAL_ROWS, rows = least(DUAL_ROWS, length - first);
    float *scores = scratch, *mixed = scores + DUAL_ROWS * padded;
    multiply_here(&(Product){.a = token(&d->C, b, first), .b = plan->B + b * d->state * padded, .out = scores, .rows = rows,
                             .columns = padded, .depth = d->state, .a_row = d->C.token, .a_column = 1, .b_row = padded,
                             .b_columns = padded, .out_row = padded});
    for (int64_t h = 0; h < d->heads; h++) {
        const float *s = plan->s + (b * d->orders * d->heads + h) * padded;
        const float *s_2 = d->orders > 1 ? s + d->heads * padded : NULL;
        for (int64_t i = 0; i < rows; i++)
            decayed_row(mixed + i * padded, scores + i * padded, NULL, s, s_2, first + i, length);
        float *y = (float *)token(&d->y, b, first) + h * d->headdim;
        for (int64_t i = 0; i < rows && d->D; i++)
            scale_row(y + i * d->y.token, token(&d->x, b, first + i) + h * d->headdim, d->D[h], d->headdim);
        multiply_here(&(Product){.a = mixed, .b = plan->v + (b * d->heads + h) * length * d->headdim, .out = y, .rows = rows,
                                 .columns = d->headdim, .depth = length, .a_row = padded, .a_column = 1, .b_row = d->headdim,
                                 .b_columns = d->headdim, .out_row = d->y.token, .add = d->D != NULL});
    }
}

static int dual_whole(const Dual *d) {
    const int64_t padded = round_up(d->length, LANES), all = d->batch * d->heads;
    const int64_t sizes[] = {round_up(all * d->length * d->headdim, LANES), d->batch * d->state * padded};
    float *memory = vim_timm_borrow(sizeof(float) * (size_t)(sizes[0] + sizes[1] + all * d->orders * padded));
    if (!memory) return -1;
    DualPlan plan = {.dual = d, .padded = padded, .v = memory, .B = memory + sizes[0], .s = memory + sizes[0] + sizes[1]};
    int failed = vim_timm_run(dual_prepare_task, &plan, d->batch * (d->heads + 1), d->threads, 0);
    const int64_t blocks = (d->length + DUAL_ROWS - 1) / DUAL_ROWS;
    if (!failed) failed = vim_timm_run(dual_whole_task, &plan, d->batch * blocks, d->threads, dual_whole_scratch(&plan));
    vim_timm_give_back(memory);
    return failed;
}

/* --- in chunks, one order after the other: each chunk's own tokens as above, all others through states */

/* A task's chunk, its tokens side by side. */
typedef struct {
    int64_t b, first, count;
    float *x, *B, *s, *dt; /* (H, chunk, P), (N, padded), and of one head (padded) */
    float *end;            /* of what it takes of the task's memory */
} DualChunk;

static int64_t dual_chunk_floats(const DualPlan *plan) {
    const Dual *d = plan->dual;
    return d->chunk * d->heads * d->headdim + (d->state + 2) * plan->padded;
}

static DualChunk dual_chunk(const DualPlan *plan, int64_t index, float *memory) {
    const Dual *d = plan->dual;
    const int64_t padded = plan->padded, P = d->headdim, first = index % plan->chunks * d->chunk;
    DualChunk c = {.b = index / plan->chunks, .first = first, .count = least(d->chunk, d->length - first), .x = memory};
    c.B = c.x + round_up(d->chunk * d->heads * P, LANES);
    c.s = c.B + d->state * padded;
    c.dt = c.s + padded;
    c.end = c.dt + padded;
    memset(c.B, 0, sizeof(float) * (size_t)((d->state + 2) * padded));
    for (int64_t t = 0; t < c.count; t++) {
        const int64_t at = visited(d, plan->order, c.b, first + t);
        for (int64_t h = 0; h < d->heads; h++)
            memcpy(c.x + (h * d->chunk + t) * P, token(&d->x, c.b, at) + h * P, sizeof(float) * (size_t)P);
        put_column(c.B, padded, t, token(&d->B, c.b, at), d->state);
    }
    return c;
}

/* A head's steps, and its s from the chunk's beginning; returns that of the chunk's end. */
static float dual_head(const DualPlan *plan, const DualChunk *c, int64_t h) {
    const Dual *d = plan->dual;
    const float *growth = d->growth + (c->b * d->orders + plan->order) * d->length * d->heads + h;
    const float *dt = d->dt + c->b * d->length * d->heads + h;
    float sum = 0;
    for (int64_t t = 0; t < c->count; t++) {
        const int64_t at = visited(d, plan->order, c->b, c->first + t) * d->heads;
        c->s[t] = sum += growth[at];
        c->dt[t] = dt[at];
    }
    return sum;
}

/* exp(-distance of a vector of tokens from the chunk's beginning, or with `end` from its end). */
INLINE vec dual_edge(const DualChunk *c, float total, int end, int64_t t) {
    return exp_of_negative(end ? load(c->s + t) - total : -load(c->s + t));
}

static size_t dual_states_scratch(const DualPlan *plan) {
    const Dual *d = plan->dual;
    return sizeof(float) * (size_t)(dual_chunk_floats(plan) + LANES + (d->state + 1) * plan->padded);
}

/* (N, 2 P) of each head: sums of B_j dt_j x_j that decay towards the chunk's end, and towards its beginning. */
static void dual_states_task(const void *arguments, int64_t index, void *scratch) {
    const DualPlan *plan = arguments;
    const Dual *d = plan->dual;
    const int64_t P = d->headdim, padded = plan->padded;
    const DualChunk c = dual_chunk(plan, index, scratch);
    for (int64_t h = 0; h < d->heads; h++) {
        const int64_t cell = index * d->heads + h;
        const float total = plan->totals[cell] = dual_head(plan, &c, h);
        for (int way = 0; way < 2; way++) {
            float *weights = c.end, *B = weights + padded;
            for (int64_t t = 0; t < padded; t += LANES)
                store(weights + t, load(c.dt + t) * dual_edge(&c, total, !way, t));
            for (int64_t i = 0; i < d->state * padded; i += LANES)
                store(B + i, load(weights + i % padded) * load(c.B + i));
            multiply_here(&(Product){.a = B, .b = c.x + h * d->chunk * P, .out = plan->states + cell * d->state * 2 * P + way * P,
                                     .rows = d->state, .columns = P, .depth = c.count, .a_row = padded, .a_column = 1,
                                     .b_row = P, .b_columns = P, .out_row = 2 * P});
        }
    }
}

/* Of one head and way through the chunks: from each chunk's own states to those that enter it. */
static void dual_carry_task(const void *arguments, int64_t index, void *scratch) {
    const DualPlan *plan = arguments;
    const Dual *d = plan->dual;
    const int64_t P = d->headdim, back = index % 2, h = index / 2 % d->heads, b = index / 2 / d->heads;
    float *carried = scratch;
    memset(carried, 0, sizeof(float) * (size_t)(d->state * P));
    for (int64_t i = 0; i < plan->chunks; i++) {
        const int64_t cell = (b * plan->chunks + (back ? plan->chunks - 1 - i : i)) * d->heads + h;
        float *own = plan->states + cell * d->state * 2 * P + back * P;
        const vec left = exp_of_negative(-splat(plan->totals[cell]));
        for (int64_t n = 0; n < d->state; n++)
            for (int64_t p = 0; p < P; p += LANES) {
                const vec before = load_some(carried + n * P + p, P - p), here = load_some(own + n * 2 * P + p, P - p);
                store_some(carried + n * P + p, left * before + here, P - p);
                store_some(own + n * 2 * P + p, before, P - p);
            }
    }
}

static size_t dual_chunk_scratch(const DualPlan *plan) {
    const Dual *d = plan->dual;
    const int64_t tokens = d->chunk * (d->heads * d->headdim + 2 * d->state), rows = (d->chunk + DUAL_ROWS) * plan->padded;
    return sizeof(float) * (size_t)(dual_chunk_floats(plan) + 3 * LANES + 2 * plan->padded + tokens + rows);
}

static void dual_chunk_task(const void *arguments, int64_t index, void *scratch) {
    const DualPlan *plan = arguments;
    const Dual *d = plan->dual;
    const int64_t P = d->headdim, N = d->state, padded = plan->padded, width = d->heads * P;
    const DualChunk c = dual_chunk(plan, index, scratch);
    float *edges = c.end, *scores = edges + 2 * padded, *mixed = scores + d->chunk * padded, *y = mixed + DUAL_ROWS * padded;
    float *C = y + round_up(d->chunk * width, LANES), *read = C + d->chunk * N;
    for (int64_t t = 0; t < c.count; t++) {
        const int64_t at = visited(d, plan->order, c.b, c.first + t);
        memcpy(C + t * N, token(&d->C, c.b, at), sizeof(float) * (size_t)N);
        if (plan->order > 0) memcpy(y + t * width, token(&d->y, c.b, at), sizeof(float) * (size_t)width);
    }
    multiply_here(&(Product){.a = C, .b = c.B, .out = scores, .rows = c.count, .columns = padded, .depth = N, .a_row = N,
                             .a_column = 1, .b_row = padded, .b_columns = padded, .out_row = padded});
    for (int64_t h = 0; h < d->heads; h++) {
        const float total = dual_head(plan, &c, h);
        for (int64_t t = 0; t < 2 * padded; t += LANES)
            store(edges + t, dual_edge(&c, total, t >= padded, t < padded ? t : t - padded));
        for (int64_t t = 0; t < c.count && plan->order == 0 && d->D; t++)
            scale_row(y + t * width + h * P, c.x + (h * d->chunk + t) * P, d->D[h], P);
        Product product = {.a = mixed, .b = c.x + h * d->chunk * P, .columns = P, .depth = c.count, .a_row = padded, .a_column = 1,
                           .b_row = P, .b_columns = P, .out_row = width, .add = plan->order > 0 || d->D};
        for (int64_t i = 0; i < c.count; i += DUAL_ROWS) {
            product.rows = least(DUAL_ROWS, c.count - i);
            for (int64_t r = 0; r < product.rows; r++)
                decayed_row(mixed + r * padded, scores + (i + r) * padded, c.dt, c.s, NULL, i + r, c.count);
            product.out = y + i * width + h * P;
            multiply_here(&product);
        }
        for (int way = 0; way < 2; way++) {
            for (int64_t t = 0; t < c.count; t++) scale_row(read + t * N, C + t * N, edges[way * padded + t], N);
            multiply_here(&(Product){.a = read, .b = plan->states + (index * d->heads + h) * N * 2 * P + way * P,
                                     .out = y + h * P, .rows = c.count, .columns = P, .depth = N, .a_row = N,
                                     .a_column = 1, .b_row = 2 * P, .b_columns = P, .out_row = width, .add = 1});
        }
    }
    for (int64_t t = 0; t < c.count; t++) {
        float *to = (float *)token(&d->y, c.b, visited(d, plan->order, c.b, c.first + t));
        memcpy(to, y + t * width, sizeof(float) * (size_t)width);
    }
}

static int dual_chunks(const Dual *d) {
    const int64_t chunks = (d->length + d->chunk - 1) / d->chunk, cells = d->batch * chunks * d->heads;
    const int64_t size = cells * d->state * 2 * d->headdim, ways = d->batch * d->heads * 2;
    float *memory = vim_timm_borrow(sizeof(float) * (size_t)(size + cells));
    if (!memory) return -1;
    int failed = 0;
    for (int64_t order = 0; order < d->orders && !failed; order++) {
        DualPlan plan = {.dual = d, .order = order, .chunks = chunks, .padded = round_up(d->chunk, LANES),
                         .states = memory, .totals = memory + size};
        const size_t carried = sizeof(float) * (size_t)(d->state * d->headdim);
        failed = vim_timm_run(dual_states_task, &plan, d->batch * chunks, d->threads, dual_states_scratch(&plan));
        if (!failed) failed = vim_timm_run(dual_carry_task, &plan, ways, d->threads, carried);
        if (!failed) failed = vim_timm_run(dual_chunk_task, &plan, d->batch * chunks, d->threads, dual_chunk_scratch(&plan));
    }
    vim_timm_give_back(memory);
    return failed;
}

/* Whether every order meets every token once: 1, 0, or -1 without memory. */
static int dual_meets_all(const Dual *d) {
    char *met = vim_timm_borrow((size_t)d->length);
    if (!met) return -1;
    int all = 1;
    for (int64_t o = 0; o < d->orders; o++)
        for (int64_t b = 0; b < d->batch && d->visits[o] && (b == 0 || d->visits_batch[o]); b++) {
            memset(met, 0, (size_t)d->length);
            for (int64_t t = 0; t < d->length && all; t++) {
                const int64_t at = visited(d, o, b, t);
                all = at >= 0 && at < d->length && !met[at];
                if (all) met[at] = 1;
            }
        }
    vim_timm_give_back(met);
    return all;
}

/* Returns 1, and computes nothing, where an order does not meet every token once. */
EXPORT int ENTRY(dual_forward)(const Dual *d) {
    const int all = dual_meets_all(d);
    if (all != 1) return all < 0 ? -1 : 1;
    return d->length <= d->chunk ? dual_whole(d) : dual_chunks(d);
}
