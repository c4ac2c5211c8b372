/* The root mean square norm, forward and backward. */
#pragma once

#include "rows.h"
#include "runtime.h"

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

/* out = norm(y) * SiLU(z) for y and out (rows, width) and z of any stride. */
typedef struct {
    Norm norm; /* of y; its y is out, or in the backward pass the gradient of y, and its grad that of out */
    Rows z, grad_z;
    int64_t length; /* rows of a batch entry */
} GatedNorm;

typedef struct {
    const GatedNorm *gated;
    float *grad_weight; /* (tasks, width): partial sums */
} GatedNormPlan;

INLINE const float *gate_row(const Rows *z, int64_t length, int64_t r) {
    return z->data + r / length * z->batch + r % length * z->token;
}

static void gated_norm_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const GatedNorm *gated = ((const GatedNormPlan *)arguments)->gated;
    const Norm *norm = &gated->norm;
    const int64_t width = norm->width;
    for (int64_t r = index * NORM_ROWS; r < least((index + 1) * NORM_ROWS, norm->rows); r++) {
        const float *x = norm->x + r * width, *z = gate_row(&gated->z, gated->length, r);
        const vec inverse = splat(inverse_root(norm, x));
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            vec v = load_some(z + c, left);
            v *= sigmoid(v) * inverse;
            store_some(norm->y + r * width + c, load_some(x + c, left) * load_some(norm->weight + c, left) * v, left);
        }
    }
}

/* As norm_backward_task with grad SiLU(z) in the place of grad; gz = grad norm(y) SiLU'(z). */
static void gated_norm_backward_task(const void *arguments, int64_t index, void *scratch) {
    const GatedNormPlan *plan = arguments;
    const GatedNorm *gated = plan->gated;
    const Norm *norm = &gated->norm;
    const int64_t width = norm->width;
    float *sums = plan->grad_weight + index * width, *pulls = scratch;
    memset(sums, 0, sizeof(float) * (size_t)width);
    for (int64_t r = index * NORM_ROWS; r < least((index + 1) * NORM_ROWS, norm->rows); r++) {
        const float *x = norm->x + r * width, *grad = norm->grad + r * width;
        const float *z = gate_row(&gated->z, gated->length, r);
        float *grad_z = (float *)gate_row(&gated->grad_z, gated->length, r);
        const float inverse = inverse_root(norm, x);
        vec dot = splat(0);
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            const vec v = load_some(z + c, left), open = sigmoid(v), g = load_some(grad + c, left);
            const vec own = load_some(x + c, left) * inverse, weight = load_some(norm->weight + c, left);
            store_some(grad_z + c, g * own * weight * (open + v * open * (1.0f - open)), left);
            const vec inner = g * v * open;
            store_some(sums + c, load_some(sums + c, left) + inner * own, left);
            store_some(pulls + c, inner * weight, left);
            dot += inner * weight * own;
        }
        const float pull = lane_sum(&dot) / (float)width * inverse;
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t left = width - c;
            vec own = load_some(x + c, left) * inverse;
            store_some(norm->y + r * width + c, load_some(pulls + c, left) * inverse - own * pull, left);
        }
    }
}

EXPORT int ENTRY(gated_norm_forward)(const GatedNorm *gated) {
    const Norm *norm = &gated->norm;
    GatedNormPlan plan = {gated, NULL};
    return vim_timm_run(gated_norm_task, &plan, (norm->rows + NORM_ROWS - 1) / NORM_ROWS, norm->threads, 0);
}

EXPORT int ENTRY(gated_norm_backward)(const GatedNorm *gated) {
    const Norm *norm = &gated->norm;
    int64_t tasks = (norm->rows + NORM_ROWS - 1) / NORM_ROWS;
    GatedNormPlan plan = {gated, vim_timm_borrow(sizeof(float) * (size_t)(tasks * norm->width))};
    if (!plan.grad_weight) return -1;
    const size_t scratch = sizeof(float) * (size_t)norm->width;
    int failed = vim_timm_run(gated_norm_backward_task, &plan, tasks, norm->threads, scratch);
    if (!failed) add_up(norm->grad_weight, plan.grad_weight, tasks, norm->width, norm->width);
    vim_timm_give_back(plan.grad_weight);
    return failed;
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
