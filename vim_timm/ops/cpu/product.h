/* Products of matrices. */
#pragma once

#include "rows.h"
#include "runtime.h"

/* A tile of the result, held in registers: rows and vectors of columns; depth to which its operands stay in cache. */
enum { PRODUCT_ROWS = LANES == 16 ? 8 : 4, PRODUCT_VECTORS = LANES == 16 ? 3 : 2, PRODUCT_TALLEST = 12 };
enum { PRODUCT_BLOCK = 32, PRODUCT_DEPTH = 384 };

/* For each entry, out (rows, columns) = a (rows, depth) b (depth, columns) + bias (columns) where there is one, or `add`ed to
   it. a has any strides; b's rows can be read in whole vectors up to b_columns. */
typedef struct {
    const float *a, *b, *bias;
    float *out;
    int64_t entries, rows, columns, depth, a_entry, a_row, a_column, b_row, b_columns, out_entry, out_row, add;
} Product;

/* Sums of the tile of `rows` from row i on and vectors from column j on. */
INLINE void product_sums(const int rows, const int vectors, const int partial, const Product *p, int64_t entry, int64_t i,
                         int64_t j, vec (*sum)[4]) {
    const float *a = p->a + entry * p->a_entry + i * p->a_row, *b = p->b + j;
    const int64_t a_row = p->a_row, a_column = p->a_column, b_row = p->b_row, readable = p->b_columns - j;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = splat(0);
    for (int64_t k = p->depth; k > 0; k--, a += a_column, b += b_row) {
        vec right[4];
        UNROLL for (int v = 0; v < vectors; v++) right[v] = partial ? load_some(b, readable) : load(b + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec left = splat(a[r * a_row]);
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += left * right[v];
        }
    }
}

INLINE void product_tile(const int rows, const int vectors, const int partial, const Product *p, int64_t entry, int64_t i,
                         int64_t j) {
    vec sum[PRODUCT_TALLEST][4];
    product_sums(rows, vectors, partial, p, entry, i, j, sum);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *to = p->out + entry * p->out_entry + (i + r) * p->out_row + j + v * LANES;
            const int64_t count = p->columns - j - v * LANES;
            if (p->bias) sum[r][v] += load_some(p->bias + j + v * LANES, count);
            store_some(to, p->add ? sum[r][v] + load_some(to, count) : sum[r][v], count);
        }
}

INLINE void product_rows(const int tall, const int vectors, const int partial, const Product *p, int64_t entry, int64_t i,
                         int64_t last, int64_t j) {
    for (; i + tall <= last; i += tall) product_tile(tall, vectors, partial, p, entry, i, j);
    for (; i + 4 <= last; i += 4) product_tile(4, vectors, partial, p, entry, i, j);
    for (; i < last; i++) product_tile(1, vectors, partial, p, entry, i, j);
}

static int64_t product_blocks(const Product *p) {
    const int64_t width = PRODUCT_VECTORS * LANES;
    return (p->rows + PRODUCT_BLOCK - 1) / PRODUCT_BLOCK * ((p->columns + width - 1) / width);
}
static void product_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Product *p = arguments;
    const int64_t width = PRODUCT_VECTORS * LANES, each = product_blocks(p), across = (p->columns + width - 1) / width;
    const int64_t entry = index / each, block = index % each;
    const int64_t i = block / across * PRODUCT_BLOCK, last = least(i + PRODUCT_BLOCK, p->rows);
    int64_t j = block % across * width;
    if (j + width <= p->b_columns)
        product_rows(PRODUCT_ROWS, PRODUCT_VECTORS, 0, p, entry, i, last, j);
    else
        for (; j < p->columns; j += LANES)
            if (j + LANES <= p->b_columns)
                product_rows(PRODUCT_ROWS, 1, 0, p, entry, i, last, j);
            else
                product_rows(PRODUCT_ROWS, 1, 1, p, entry, i, last, j);
}
static int multiply(Product product, int64_t threads) {
    int failed = 0;
    int64_t left = product.depth;
    do {
        product.depth = least(left, PRODUCT_DEPTH);
        failed = vim_timm_run(product_task, &product, product.entries * product_blocks(&product), threads, 0);
        product.a += product.depth * product.a_column;
        product.b += product.depth * product.b_row;
        product.bias = NULL;
        product.add = 1;
        left -= product.depth;
    } while (left > 0 && !failed);
    return failed;
}

/* A product of one entry by the thread that asks. */
static void multiply_here(const Product *p) {
    int64_t j = 0;
#if LANES == 16
    for (; j + 4 * LANES <= p->b_columns && j < p->columns; j += 4 * LANES) product_rows(6, 4, 0, p, 0, 0, p->rows, j);
#endif
    for (; j + 2 * LANES <= p->b_columns && j < p->columns; j += 2 * LANES)
        product_rows(PRODUCT_ROWS, 2, 0, p, 0, 0, p->rows, j);
    for (; j < p->columns; j += LANES)
        if (j + LANES <= p->b_columns)
            product_rows(PRODUCT_ROWS, 1, 0, p, 0, 0, p->rows, j);
        else
            product_rows(PRODUCT_ROWS, 1, 1, p, 0, 0, p->rows, j);
}
