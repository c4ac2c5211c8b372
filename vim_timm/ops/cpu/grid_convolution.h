/* The depthwise 3 x 3 convolution of a grid of tokens behind prefix tokens, with SiLU, forward and backward. */
#pragma once

#include "rows.h"
#include "runtime.h"

/* y = act(bias + sum of taps and neighbours); a prefix token meets the middle tap alone. */
typedef struct {
    Rows x, y, grad;         /* (batch, prefix + height width, channels); grad is that of y, and in the backward pass y
                                receives the gradient before the activation */
    const float *taps, *bias; /* (9, channels), (channels) or NULL */
    float *grad_taps;        /* (10, channels): of the taps and the bias */
    int64_t batch, prefix, height, width, channels, silu, threads;
} GridConvolution;

typedef struct {
    const GridConvolution *conv;
    float *parts; /* (tasks, 10, channels) */
} GridConvolutionPlan;

/* A task is one row of one entry's grid, or its prefix tokens: the row before the first. */
static int64_t grid_tasks(const GridConvolution *conv) { return conv->batch * (conv->height + 1); }

/* Where a token's neighbours are: offsets from its row in x, and whether they exist. */
typedef struct {
    int64_t offset[9];
    int there[9];
} Neighbours;

static Neighbours neighbours_of(const GridConvolution *conv, int64_t r, int64_t w) {
    Neighbours n;
    for (int k = 0; k < 9; k++) {
        const int64_t y = r + k / 3 - 1, x = w + k % 3 - 1;
        n.there[k] = r < 0 ? k == 4 : y >= 0 && y < conv->height && x >= 0 && x < conv->width;
        n.offset[k] = n.there[k] ? ((k / 3 - 1) * conv->width + k % 3 - 1) * conv->x.token : 0;
    }
    return n;
}

/* A vector of a token's channels before the activation; `whole` where all neighbours exist. */
INLINE vec convolve_token(const int whole, const GridConvolution *conv, const Neighbours *n, const float *x, int64_t c,
                          int64_t left) {
    vec sum = conv->bias ? load_some(conv->bias + c, left) : splat(0);
    UNROLL for (int k = 0; k < 9; k++)
        if (whole || n->there[k])
            sum += load_some(x + n->offset[k] + c, left) * load_some(conv->taps + k * conv->channels + c, left);
    return sum;
}

/* One vector of a token's channels: the result, or the gradient before the activation and its part of the taps'. */
INLINE void grid_vector(const int whole, const int backward, const GridConvolution *conv, const Neighbours *n,
                        const float *x, float *y, const float *grad, float *parts, int64_t c, int64_t left) {
    const vec before = convolve_token(whole, conv, n, x, c, left);
    if (!backward) {
        store_some(y + c, conv->silu ? before * sigmoid(before) : before, left);
        return;
    }
    const vec gate = sigmoid(before);
    const vec g = load_some(grad + c, left) * (gate + before * gate * (1.0f - gate));
    store_some(y + c, g, left);
    UNROLL for (int k = 0; k < 9; k++)
        if (whole || n->there[k]) {
            float *to = parts + k * conv->channels + c;
            store_some(to, load_some(to, left) + g * load_some(x + n->offset[k] + c, left), left);
        }
    float *to = parts + 9 * conv->channels + c;
    store_some(to, load_some(to, left) + g, left);
}

INLINE void grid_rows(const GridConvolution *conv, int64_t index, const int backward, float *parts) {
    const int64_t b = index / (conv->height + 1), r = index % (conv->height + 1) - 1, channels = conv->channels;
    const int64_t count = r < 0 ? conv->prefix : conv->width, first = r < 0 ? 0 : conv->prefix + r * conv->width;
    if (backward) memset(parts, 0, sizeof(float) * (size_t)(10 * channels));
    for (int64_t w = 0; w < count; w++) {
        const float *x = conv->x.data + b * conv->x.batch + (first + w) * conv->x.token;
        float *y = conv->y.data + b * conv->y.batch + (first + w) * conv->y.token;
        const float *grad = backward ? conv->grad.data + b * conv->grad.batch + (first + w) * conv->grad.token : NULL;
        const Neighbours n = neighbours_of(conv, r, w);
        int whole = 1;
        for (int k = 0; k < 9; k++) whole &= n.there[k];
        int64_t c = 0;
        if (whole)
            for (; c + LANES <= channels; c += LANES)
                grid_vector(1, backward, conv, &n, x, y, grad, parts, c, LANES);
        for (; c < channels; c += LANES) grid_vector(0, backward, conv, &n, x, y, grad, parts, c, channels - c);
    }
}

static void grid_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    grid_rows(((const GridConvolutionPlan *)arguments)->conv, index, 0, NULL);
}
static void grid_backward_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const GridConvolutionPlan *plan = arguments;
    grid_rows(plan->conv, index, 1, plan->parts + index * 10 * plan->conv->channels);
}

EXPORT int ENTRY(grid_conv_forward)(const GridConvolution *conv) {
    GridConvolutionPlan plan = {conv, NULL};
    return vim_timm_run(grid_task, &plan, grid_tasks(conv), conv->threads, 0);
}

EXPORT int ENTRY(grid_conv_backward)(const GridConvolution *conv) {
    const int64_t tasks = grid_tasks(conv), size = 10 * conv->channels;
    GridConvolutionPlan plan = {conv, vim_timm_borrow(sizeof(float) * (size_t)(tasks * size))};
    if (!plan.parts) return -1;
    int failed = vim_timm_run(grid_backward_task, &plan, tasks, conv->threads, 0);
    if (!failed) add_up(conv->grad_taps, plan.parts, tasks, size, size);
    vim_timm_give_back(plan.parts);
    return failed;
}
