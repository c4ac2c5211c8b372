/* The depthwise causal convolution, forward and backward. */
#pragma once

#include "rows.h"
#include "runtime.h"

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
