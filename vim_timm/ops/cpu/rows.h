/* Tensors as the kernel sees them, and what every operator does with their rows. */
#pragma once

#include "vectors.h"

/* A (batch, length, channels or states) tensor with unit last stride; strides in floats. data is NULL when absent. */
typedef struct {
    float *data;
    int64_t batch, token;
} Rows;

/* The rows of one batch entry in the order in which a direction meets them. */
typedef struct {
    float *first;
    int64_t step;
} Walk;

INLINE Walk walk(const Rows *rows, int64_t b, int64_t length, int backward) {
    if (!rows->data) return (Walk){NULL, 0};
    float *data = rows->data + b * rows->batch;
    return backward ? (Walk){data + (length - 1) * rows->token, -rows->token} : (Walk){data, rows->token};
}
INLINE float *row(Walk w, int64_t t) { return w.first + t * w.step; }

/* Tasks of a backward pass, whatever the number of threads: they group its channels, and a group orders its sums. */
enum { TASKS = 8 };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* out[j][c] = in[c][j], rows of out padded with zeros. */
static void transpose(const float *in, float *out, int64_t channels, int64_t padded, int64_t count) {
    for (int64_t j = 0; j < count; j++) {
        for (int64_t c = 0; c < channels; c++) out[j * padded + c] = in[c * count + j];
        for (int64_t c = channels; c < padded; c++) out[j * padded + c] = 0;
    }
}
static void copy_padded(const float *in, float *out, int64_t channels, int64_t padded) {
    memset(out, 0, sizeof(float) * (size_t)padded);
    if (in) memcpy(out, in, sizeof(float) * (size_t)channels);
}

/* to[i] = sum over `count` partial sums that lie `step` apart, in their order. */
static void add_up(float *to, const float *partial, int64_t count, int64_t step, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        int64_t left = size - i;
        vec sum = load_some(partial + i, left);
        for (int64_t k = 1; k < count; k++) sum += load_some(partial + k * step + i, left);
        store_some(to + i, sum, left);
    }
}
