/* The inside of a block: convolution, projections, scan and gate of a few batch entries at a time. */
#pragma once

#include "convolution.h"
#include "product.h"
#include "scan_backward.h"

/* Tokens of a slice of the batch, unless one entry is longer, and of a tile of the forward pass: what lies between
   convolution and gate should stay in cache. */
#ifndef SLICE
#define SLICE 256
#endif
_Static_assert(SLICE % CHUNK == 0, "states are kept where tiles meet");

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
