/* The decays of the symmetric state space dual times its scores, forward and backward. */
#pragma once

#include "rows.h"
#include "runtime.h"

/* Rows of scores to a task. */
enum { DECAYED_ROWS = 16 };

/* out[b][h][i][j] = scores[b][i][j] dt[b][h][j] sum over orders of exp(-|s[b][o][h][i] - s[b][o][h][j]|). */
typedef struct {
    const float *scores, *s, *dt, *grad; /* (batch, L, L), (batch, orders, H, L), (batch, H, L), as out */
    float *out, *grad_scores, *grad_s, *grad_dt;
    int64_t batch, orders, heads, length, threads;
} Decayed;

typedef struct {
    const Decayed *decayed;
    float *columns; /* (blocks, batch, orders + 1, H, L): of each block of rows, parts of the gradients of s and dt */
} DecayedPlan;

static int64_t decayed_blocks(const Decayed *d) { return (d->length + DECAYED_ROWS - 1) / DECAYED_ROWS; }

static void decayed_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Decayed *d = ((const DecayedPlan *)arguments)->decayed;
    const int64_t length = d->length, blocks = decayed_blocks(d), b = index / blocks, first = index % blocks * DECAYED_ROWS;
    for (int64_t h = 0; h < d->heads; h++) {
        const float *s = d->s + (b * d->orders * d->heads + h) * length, *s_2 = s + d->heads * length;
        const float *dt = d->dt + (b * d->heads + h) * length;
        for (int64_t i = first; i < least(first + DECAYED_ROWS, length); i++) {
            const float *scores = d->scores + (b * length + i) * length;
            float *out = d->out + ((b * d->heads + h) * length + i) * length;
            const vec own = splat(s[i]), own_2 = splat(d->orders > 1 ? s_2[i] : 0.0f);
            for (int64_t j = 0; j < length; j += LANES) {
                const int64_t left = length - j;
                vec mask = exp_of_negative(-absolute(own - load_some(s + j, left)));
                if (d->orders > 1) mask += exp_of_negative(-absolute(own_2 - load_some(s_2 + j, left)));
                store_some(out + j, mask * load_some(scores + j, left) * load_some(dt + j, left), left);
            }
        }
    }
}

/* E = grad scores dt exp(-|s_i - s_j|) of one order, negative where s_i is the larger: its sum over j is the gradient of
   s_i, that over i is to be taken from the gradient of s_j. Nothing where they are equal. */
INLINE vec signed_edge(vec e, vec own, vec other) {
    return choose(own > other, -e, choose(own < other, e, splat(0)));
}

static void decayed_backward_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const DecayedPlan *plan = arguments;
    const Decayed *d = plan->decayed;
    const int64_t length = d->length, blocks = decayed_blocks(d), b = index / blocks, block = index % blocks;
    const int64_t first = block * DECAYED_ROWS, last = least(first + DECAYED_ROWS, length), size = d->heads * length;
    float *columns = plan->columns + (block * d->batch + b) * (d->orders + 1) * size;
    memset(columns, 0, sizeof(float) * (size_t)((d->orders + 1) * size));
    memset(d->grad_scores + (b * length + first) * length, 0, sizeof(float) * (size_t)((last - first) * length));
    for (int64_t h = 0; h < d->heads; h++) {
        const float *s = d->s + (b * d->orders * d->heads + h) * length, *s_2 = s + size;
        const float *dt = d->dt + (b * d->heads + h) * length;
        float *to = columns + h * length, *to_2 = to + size, *to_dt = to + d->orders * size;
        for (int64_t i = first; i < last; i++) {
            const float *scores = d->scores + (b * length + i) * length;
            const float *grad = d->grad + ((b * d->heads + h) * length + i) * length;
            float *grad_scores = d->grad_scores + (b * length + i) * length;
            const vec own = splat(s[i]), own_2 = splat(d->orders > 1 ? s_2[i] : 0.0f);
            vec sum = splat(0), sum_2 = splat(0);
            for (int64_t j = 0; j < length; j += LANES) {
                const int64_t left = length - j;
                const vec step = load_some(dt + j, left), g = load_some(grad + j, left);
                const vec weight = g * load_some(scores + j, left);
                const vec other = load_some(s + j, left);
                vec mask = exp_of_negative(-absolute(own - other));
                const vec edge = signed_edge(weight * step * mask, own, other);
                sum += edge;
                store_some(to + j, load_some(to + j, left) - edge, left);
                if (d->orders > 1) {
                    const vec other_2 = load_some(s_2 + j, left);
                    const vec mask_2 = exp_of_negative(-absolute(own_2 - other_2));
                    const vec edge_2 = signed_edge(weight * step * mask_2, own_2, other_2);
                    sum_2 += edge_2;
                    store_some(to_2 + j, load_some(to_2 + j, left) - edge_2, left);
                    mask += mask_2;
                }
                store_some(to_dt + j, load_some(to_dt + j, left) + weight * mask, left);
                store_some(grad_scores + j, load_some(grad_scores + j, left) + g * step * mask, left);
            }
            to[i] += lane_sum(&sum);
            if (d->orders > 1) to_2[i] += lane_sum(&sum_2);
        }
    }
}

EXPORT int ENTRY(decayed_forward)(const Decayed *d) {
    DecayedPlan plan = {d, NULL};
    return vim_timm_run(decayed_task, &plan, d->batch * decayed_blocks(d), d->threads, 0);
}

EXPORT int ENTRY(decayed_backward)(const Decayed *d) {
    const int64_t blocks = decayed_blocks(d), size = d->heads * d->length, all = (d->orders + 1) * size;
    DecayedPlan plan = {d, vim_timm_borrow(sizeof(float) * (size_t)(blocks * d->batch * all))};
    if (!plan.columns) return -1;
    int failed = vim_timm_run(decayed_backward_task, &plan, d->batch * blocks, d->threads, 0);
    for (int64_t b = 0; b < d->batch && !failed; b++) {
        const float *own = plan.columns + b * all;
        add_up(d->grad_s + b * d->orders * size, own, blocks, d->batch * all, d->orders * size);
        add_up(d->grad_dt + b * size, own + d->orders * size, blocks, d->batch * all, size);
    }
    vim_timm_give_back(plan.columns);
    return failed;
}
