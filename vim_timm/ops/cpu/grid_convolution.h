/* The depthwise 3 x 3 convolution of a grid of tokens behind prefix tokens, with SiLU, forward and backward. Of a masked
   image it sees the tokens that are there, zeros elsewhere. */
#pragma once

#include "rows.h"
#include "runtime.h"

/* y = act(bias + sum of taps and neighbours); a prefix token meets the middle tap alone. */
typedef struct {
    Rows x, y, grad;         /* (batch, prefix + tokens of the grid, channels); grad is that of y, and in the backward
                                pass y receives the gradient before the activation */
    const float *taps, *bias; /* (9, channels), (channels) or NULL */
    float *grad_taps;        /* (10, channels): of the taps and the bias */
    const int64_t *keep;     /* (batch, kept): row-major places of the grid's tokens; kept is -1 where all are there */
    int64_t kept, batch, prefix, height, width, channels, silu, threads;
} GridConvolution;

typedef struct {
    const GridConvolution *conv;
    int64_t *tokens; /* (batch, height width): the token at a place, -1 where none is; NULL where all are there */
    float *parts;    /* (tasks, 10, channels) */
} GridConvolutionPlan;

/* The token of an entry at a place of its grid, or -1. */
INLINE int64_t token_at(const GridConvolutionPlan *plan, int64_t b, int64_t place) {
    const GridConvolution *conv = plan->conv;
    return plan->tokens ? plan->tokens[b * conv->height * conv->width + place] : conv->prefix + place;
}

/* A task is one row of one entry's grid, or its prefix tokens: the row before the first. */
static int64_t grid_tasks(const GridConvolution *conv) { return conv->batch * (conv->height + 1); }

/* Where a token's neighbours are: offsets from its row in x, and whether they exist. */
typedef struct {
    int64_t offset[9];
    int there[9];
} Neighbours;

/* Of the token `own` in row r and column w of entry b, or of a prefix token, whose r is -1. */
static Neighbours neighbours_of(const GridConvolutionPlan *plan, int64_t b, int64_t r, int64_t w, int64_t own) {
    const GridConvolution *conv = plan->conv;
    Neighbours n;
    for (int k = 0; k < 9; k++) {
        const int64_t y = r + k / 3 - 1, x = w + k % 3 - 1;
        const int inside = r >= 0 && y >= 0 && y < conv->height && x >= 0 && x < conv->width;
        const int64_t other = k == 4 ? own : inside ? token_at(plan, b, y * conv->width + x) : -1;
        n.there[k] = other >= 0;
        n.offset[k] = n.there[k] ? (other - own) * conv->x.token : 0;
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

INLINE void grid_rows(const GridConvolutionPlan *plan, int64_t index, const int backward, float *parts) {
    const GridConvolution *conv = plan->conv;
    const int64_t b = index / (conv->height + 1), r = index % (conv->height + 1) - 1, channels = conv->channels;
    const int64_t count = r < 0 ? conv->prefix : conv->width;
    if (backward) memset(parts, 0, sizeof(float) * (size_t)(10 * channels));
    for (int64_t w = 0; w < count; w++) {
        const int64_t own = r < 0 ? w : token_at(plan, b, r * conv->width + w);
        if (own < 0) continue;
        const float *x = conv->x.data + b * conv->x.batch + own * conv->x.token;
        float *y = conv->y.data + b * conv->y.batch + own * conv->y.token;
        const float *grad = backward ? conv->grad.data + b * conv->grad.batch + own * conv->grad.token : NULL;
        const Neighbours n = neighbours_of(plan, b, r, w, own);
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
    grid_rows(arguments, index, 0, NULL);
}
static void grid_backward_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const GridConvolutionPlan *plan = arguments;
    grid_rows(plan, index, 1, plan->parts + index * 10 * plan->conv->channels);
}

/* Fills plan->tokens; returns 1 where a place is not on the grid or is another token's too. */
static int find_tokens(GridConvolutionPlan *plan, int64_t *tokens) {
    const GridConvolution *conv = plan->conv;
    const int64_t places = conv->height * conv->width;
    plan->tokens = tokens;
    for (int64_t i = 0; i < conv->batch * places; i++) tokens[i] = -1;
    for (int64_t i = 0; i < conv->batch * conv->kept; i++) {
        const int64_t place = conv->keep[i];
        const int64_t before = i % conv->kept ? conv->keep[i - 1] : -1;
        if (place <= before || place >= places) return 1;
        tokens[i / conv->kept * places + place] = conv->prefix + i % conv->kept;
    }
    return 0;
}

/* Returns 1, and computes nothing, where `keep` does not give each token a place of its own. */
static int grid_run(const GridConvolution *conv, const int backward) {
    const int64_t tasks = grid_tasks(conv), size = 10 * conv->channels;
    const size_t parts = backward ? sizeof(float) * (size_t)(tasks * size) : 0;
    const size_t places = conv->kept < 0 ? 0 : sizeof(int64_t) * (size_t)(conv->batch * conv->height * conv->width);
    char *memory = vim_timm_borrow(places + parts);
    if (!memory) return -1;
    GridConvolutionPlan plan = {.conv = conv, .parts = (float *)(void *)(memory + places)};
    int failed = conv->kept < 0 ? 0 : find_tokens(&plan, (int64_t *)(void *)memory);
    if (!failed) failed = vim_timm_run(backward ? grid_backward_task : grid_task, &plan, tasks, conv->threads, 0);
    if (!failed && backward) add_up(conv->grad_taps, plan.parts, tasks, size, size);
    vim_timm_give_back(memory);
    return failed;
}

EXPORT int ENTRY(grid_conv_forward)(const GridConvolution *conv) { return grid_run(conv, 0); }
EXPORT int ENTRY(grid_conv_backward)(const GridConvolution *conv) { return grid_run(conv, 1); }
