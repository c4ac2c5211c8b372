/* Products with the weights of linear layers: of one, and of both of a SwiGLU with the gate between them. */
#pragma once

#include "product.h"

/* Rows of a block, so that its hidden layer stays in the second-level cache; rows of a gated tile of two vectors. */
enum { LINEAR_BLOCK = 96, GATED_ROWS = LANES == 16 ? 12 : 6 };

/* y = x weight^T + bias */
typedef struct {
    const float *x, *weight, *bias; /* (rows, depth), (columns, depth), (columns) or NULL */
    float *y;                       /* (rows, columns) */
    int64_t rows, depth, columns, threads;
} Linear;

/* y = (SiLU(a) b) out^T + out_bias for [a, b] = x weight^T + bias */
typedef struct {
    const float *x, *weight, *bias; /* (rows, depth), (2 width, depth), (2 width) or NULL */
    const float *out, *out_bias;    /* (columns, width), (columns) or NULL */
    float *y;                       /* (rows, columns) */
    int64_t rows, depth, width, columns, threads;
} GatedLinear;

/* A weight as the products read it: panels (depth, vectors LANES) of its rows as columns, zeros behind the last one. The
   vectors of a panel are neighbours, or where `apart` is not 0 begin as many rows apart. */
typedef struct {
    const float *weight; /* (columns, depth) */
    float *panels;
    int64_t columns, depth, vectors, apart;
} Panels;

static int64_t panel_count(const Panels *p) {
    const int64_t width = p->vectors * LANES;
    return p->apart ? (p->apart + LANES - 1) / LANES : (p->columns + width - 1) / width;
}
static int64_t panel_floats(const Panels *p) { return panel_count(p) * p->depth * p->vectors * LANES; }

/* Fills one vector of a panel. */
static void panel_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
    const Panels *p = arguments;
    const int64_t depth = p->depth, panel = index / p->vectors, v = index % p->vectors, width = p->vectors * LANES;
    const int64_t first = p->apart ? v * p->apart + panel * LANES : index * LANES;
    const int64_t rows = most(0, least(LANES, (p->apart ? (v + 1) * p->apart : p->columns) - first));
    float *to = p->panels + panel * depth * width + v * LANES;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *from = p->weight + (first + r) * depth;
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4) {
            four in[4];
            UNROLL for (int i = 0; i < 4; i++) in[i] = *(const four *)(from + i * depth + k);
            UNROLL for (int i = 0; i < 4; i++)
                *(four *)(to + (k + i) * width + r) = (four){in[0][i], in[1][i], in[2][i], in[3][i]};
        }
        for (; k < depth; k++)
            for (int i = 0; i < 4; i++) to[k * width + r + i] = from[i * depth + k];
    }
    for (; r < LANES; r++)
        for (int64_t k = 0; k < depth; k++) to[k * width + r] = r < rows ? p->weight[(first + r) * depth + k] : 0;
}
static int fill_panels(const Panels *p, int64_t threads) {
    return vim_timm_run(panel_task, p, panel_count(p) * p->vectors, threads, 0);
}

/* Rows of a block: as many as leave every thread one. */
static int64_t linear_block(int64_t rows, int64_t threads) {
    return least(LINEAR_BLOCK, round_up((rows + threads - 1) / threads, GATED_ROWS));
}

/* y = x times all panels + bias */
static void multiply_panels(const Panels *p, const float *x, const float *bias, float *y, int64_t rows) {
    const int64_t width = p->vectors * LANES;
    Product product = {.a = x, .entries = 1, .rows = rows, .depth = p->depth, .a_row = p->depth, .a_column = 1, .b_row = width,
                       .b_columns = width, .out_row = p->columns};
    for (int64_t first = 0; first < p->columns; first += width) {
        product.b = p->panels + first * p->depth;
        product.bias = bias ? bias + first : NULL;
        product.out = y + first;
        product.columns = p->columns - first;
        if (product.columns > (PRODUCT_VECTORS - 1) * LANES)
            product_rows(PRODUCT_ROWS, PRODUCT_VECTORS, 0, &product, 0, 0, rows, 0);
        else /* some vectors of the last panel hold nothing */
            for (int64_t j = 0; j < product.columns; j += LANES) product_rows(PRODUCT_ROWS, 1, 0, &product, 0, 0, rows, j);
    }
}

typedef struct {
    const Linear *linear;
    int64_t block;
    Panels panels;
} LinearPlan;

static void linear_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const LinearPlan *plan = arguments;
    const Linear *linear = plan->linear;
    const int64_t first = index * plan->block;
    multiply_panels(&plan->panels, linear->x + first * linear->depth, linear->bias, linear->y + first * linear->columns,
                    least(plan->block, linear->rows - first));
}

EXPORT int ENTRY(linear_forward)(const Linear *linear) {
    LinearPlan plan = {linear, linear_block(linear->rows, linear->threads),
                       {linear->weight, NULL, linear->columns, linear->depth, PRODUCT_VECTORS, 0}};
    plan.panels.panels = vim_timm_borrow(sizeof(float) * (size_t)panel_floats(&plan.panels));
    if (!plan.panels.panels) return -1;
    int failed = fill_panels(&plan.panels, linear->threads);
    const int64_t blocks = (linear->rows + plan.block - 1) / plan.block;
    if (!failed) failed = vim_timm_run(linear_task, &plan, blocks, linear->threads, 0);
    vim_timm_give_back(plan.panels.panels);
    return failed;
}

typedef struct {
    const GatedLinear *gated;
    int64_t block;
    Panels in, out;
} GatedPlan;

/* SiLU(a) b of a tile of rows from row i on, one vector of columns. */
INLINE void gated_tile(const int rows, const Product *p, const float *bias_a, const float *bias_b, int64_t i) {
    vec sum[PRODUCT_TALLEST][4];
    product_sums(rows, 2, 0, p, 0, i, 0, sum);
    const vec more_a = bias_a ? load_some(bias_a, p->columns) : splat(0);
    const vec more_b = bias_b ? load_some(bias_b, p->columns) : splat(0);
    UNROLL for (int r = 0; r < rows; r++) {
        const vec a = sum[r][0] + more_a;
        store_some(p->out + (i + r) * p->out_row, a * sigmoid(a) * (sum[r][1] + more_b), p->columns);
    }
}

static void gated_linear_task(const void *arguments, int64_t index, void *scratch) {
    const GatedPlan *plan = arguments;
    const GatedLinear *gated = plan->gated;
    const int64_t first = index * plan->block, rows = least(plan->block, gated->rows - first);
    Product product = {.a = gated->x + first * gated->depth, .b = plan->in.panels, .depth = gated->depth, .a_row = gated->depth,
                       .a_column = 1, .b_row = 2 * LANES, .b_columns = 2 * LANES, .out_row = gated->width};
    for (int64_t c = 0; c < gated->width; c += LANES, product.b += gated->depth * 2 * LANES) {
        const float *bias_a = gated->bias ? gated->bias + c : NULL, *bias_b = bias_a ? bias_a + gated->width : NULL;
        product.out = (float *)scratch + c;
        product.columns = gated->width - c;
        int64_t i = 0;
        for (; i + GATED_ROWS <= rows; i += GATED_ROWS) gated_tile(GATED_ROWS, &product, bias_a, bias_b, i);
        for (; i + 4 <= rows; i += 4) gated_tile(4, &product, bias_a, bias_b, i);
        for (; i < rows; i++) gated_tile(1, &product, bias_a, bias_b, i);
    }
    multiply_panels(&plan->out, scratch, gated->out_bias, gated->y + first * gated->columns, rows);
}

EXPORT int ENTRY(gated_linear_forward)(const GatedLinear *gated) {
    GatedPlan plan = {gated, linear_block(gated->rows, gated->threads),
                      {gated->weight, NULL, 2 * gated->width, gated->depth, 2, gated->width},
                      {gated->out, NULL, gated->columns, gated->width, PRODUCT_VECTORS, 0}};
    const int64_t inner = panel_floats(&plan.in);
    plan.in.panels = vim_timm_borrow(sizeof(float) * (size_t)(inner + panel_floats(&plan.out)));
    if (!plan.in.panels) return -1;
    plan.out.panels = plan.in.panels + inner;
    int failed = fill_panels(&plan.in, gated->threads);
    if (!failed) failed = fill_panels(&plan.out, gated->threads);
    const int64_t blocks = (gated->rows + plan.block - 1) / plan.block;
    const size_t hidden = sizeof(float) * (size_t)(plan.block * gated->width);
    if (!failed) failed = vim_timm_run(gated_linear_task, &plan, blocks, gated->threads, hidden);
    vim_timm_give_back(plan.in.panels);
    return failed;
}

/* Gradients of x and weight, each NULL where it is not wanted, from that of y. */
typedef struct {
    const float *grad, *x, *weight;
    float *grad_x, *grad_weight;
    int64_t rows, depth, columns, threads;
} LinearBackward;

EXPORT int ENTRY(linear_backward)(const LinearBackward *given) {
    const int64_t rows = given->rows, depth = given->depth, columns = given->columns;
    const Product of_x = {.a = given->grad, .b = given->weight, .out = given->grad_x, .entries = 1, .rows = rows,
                          .columns = depth, .depth = columns, .a_row = columns, .a_column = 1, .b_row = depth,
                          .b_columns = depth, .out_row = depth};
    const Product of_weight = {.a = given->grad, .b = given->x, .out = given->grad_weight, .entries = 1, .rows = columns,
                               .columns = depth, .depth = rows, .a_row = 1, .a_column = columns, .b_row = depth,
                               .b_columns = depth, .out_row = depth};
    int failed = given->grad_x ? multiply(of_x, given->threads) : 0;
    if (!failed && given->grad_weight) failed = multiply(of_weight, given->threads);
    return failed;
}
