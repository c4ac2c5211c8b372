/* Bias, SiLU and product of a SwiGLU, forward and backward. */
#pragma once

#include "rows.h"
#include "runtime.h"

/* Rows to a task. */
enum { SWIGLU_ROWS = 32 };

/* y = SiLU(a + first half of bias) (b + second half) for rows [a, b] of x. */
typedef struct {
    const float *x, *bias, *grad; /* (rows, 2 width), (2 width) or NULL, and in the backward pass that of y (rows, width) */
    float *y;                     /* (rows, width), or in the backward pass the gradient of x (rows, 2 width) */
    float *grad_bias;             /* (2 width) or NULL */
    int64_t rows, width, threads;
} SwiGlu;

typedef struct {
    const SwiGlu *glu;
    float *grad_bias; /* (tasks, 2 width): partial sums, or NULL */
} SwiGluPlan;

static int64_t swiglu_tasks(const SwiGlu *glu) { return (glu->rows + SWIGLU_ROWS - 1) / SWIGLU_ROWS; }

INLINE void swiglu_rows(const SwiGlu *glu, int64_t index, const int backward, float *sums) {
    const int64_t width = glu->width;
    for (int64_t r = index * SWIGLU_ROWS; r < least((index + 1) * SWIGLU_ROWS, glu->rows); r++) {
        const float *x = glu->x + r * 2 * width;
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t left = width - c;
            vec a = load_some(x + c, left), b = load_some(x + width + c, left);
            if (glu->bias) {
                a += load_some(glu->bias + c, left);
                b += load_some(glu->bias + width + c, left);
            }
            const vec open = sigmoid(a);
            if (!backward) {
                store_some(glu->y + r * width + c, a * open * b, left);
                continue;
            }
            const vec grad = load_some(glu->grad + r * width + c, left);
            const vec grad_a = grad * b * (open + a * open * (1.0f - open)), grad_b = grad * a * open;
            float *to = glu->y + r * 2 * width + c;
            store_some(to, grad_a, left);
            store_some(to + width, grad_b, left);
            if (sums) {
                store_some(sums + c, load_some(sums + c, left) + grad_a, left);
                store_some(sums + width + c, load_some(sums + width + c, left) + grad_b, left);
            }
        }
    }
}

static void swiglu_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    swiglu_rows(((const SwiGluPlan *)arguments)->glu, index, 0, NULL);
}
static void swiglu_backward_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const SwiGluPlan *plan = arguments;
    const int64_t both = 2 * plan->glu->width;
    float *sums = plan->grad_bias ? plan->grad_bias + index * both : NULL;
    if (sums) memset(sums, 0, sizeof(float) * (size_t)both);
    swiglu_rows(plan->glu, index, 1, sums);
}

EXPORT int ENTRY(swiglu_forward)(const SwiGlu *glu) {
    SwiGluPlan plan = {glu, NULL};
    return vim_timm_run(swiglu_task, &plan, swiglu_tasks(glu), glu->threads, 0);
}

EXPORT int ENTRY(swiglu_backward)(const SwiGlu *glu) {
    const int64_t tasks = swiglu_tasks(glu), both = 2 * glu->width;
    SwiGluPlan plan = {glu, NULL};
    if (glu->grad_bias) {
        plan.grad_bias = vim_timm_borrow(sizeof(float) * (size_t)(tasks * both));
        if (!plan.grad_bias) return -1;
    }
    int failed = vim_timm_run(swiglu_backward_task, &plan, tasks, glu->threads, 0);
    if (!failed && glu->grad_bias) add_up(glu->grad_bias, plan.grad_bias, tasks, both, both);
    if (plan.grad_bias) vim_timm_give_back(plan.grad_bias);
    return failed;
}
