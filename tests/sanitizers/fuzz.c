/* Calls every entry point of kernel.c with random sizes and strides on buffers that end exactly where a tensor does, so
   that AddressSanitizer sees a read or write one float too far. Compiled and run by run.sh. */
#include <stdio.h>
#include <stdlib.h>

#include "../../vim_timm/ops/cpu/kernel.c"

#define NAME_(x) #x
#define NAME(x) NAME_(x)

static uint64_t random_state = 1;
static uint64_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}
static int64_t pick(int64_t low, int64_t high) { return low + (int64_t)(random_bits() % (uint64_t)(high - low + 1)); }
static float draw(void) { return (float)(random_bits() % 20001) / 10000.0f - 1.0f; }

static void *buffers[64];
static int used;

static float *fresh(int64_t floats) {
    float *p = malloc(sizeof(float) * (size_t)most(floats, 1));
    for (int64_t i = 0; i < floats; i++) p[i] = draw();
    return buffers[used++] = p;
}
static void release(void) {
    while (used) free(buffers[--used]);
}

/* (batch, length, width) with gaps between rows and entries, and none after the last element. */
static Rows rows(int64_t batch, int64_t length, int64_t width) {
    int64_t token = width + pick(0, 1) * pick(0, 20), entry = length * token + pick(0, 1) * pick(0, 50);
    return (Rows){fresh((batch - 1) * entry + (length - 1) * token + width), entry, token};
}

static void fuzz_scan(void) {
    int64_t batch = pick(1, 3), length = pick(1, 3 * CHUNK), channels = pick(1, 70), state = pick(1, 40);
    int64_t chunks = (length + CHUNK - 1) / CHUNK;
    Scan scan = {.directions = pick(1, 2), .batch = batch, .length = length, .channels = channels, .state = state};
    scan.softplus = pick(0, 1);
    scan.log_A = pick(0, 1);
    scan.threads = pick(1, 3);
    scan.scale = 0.5;
    for (int i = 0; i < scan.directions; i++) {
        Direction *d = &scan.direction[i];
        d->u = rows(batch, length, channels);
        d->delta = rows(batch, length, channels);
        d->B = rows(batch, length, state);
        d->C = rows(batch, length, state);
        d->A = fresh(channels * state);
        d->D = pick(0, 1) ? fresh(channels) : NULL;
        d->bias = pick(0, 1) ? fresh(channels) : NULL;
        d->states = fresh(batch * (chunks - 1) * state * round_up(channels, PADDING));
        d->grad_u = rows(batch, length, channels);
        d->grad_delta = rows(batch, length, channels);
        d->grad_B = rows(batch, length, state);
        d->grad_C = rows(batch, length, state);
        d->grad_A = fresh(channels * state);
        d->grad_D = d->D ? fresh(channels) : NULL;
        d->grad_bias = d->bias ? fresh(channels) : NULL;
    }
    if (pick(0, 1)) {
        scan.z = rows(batch, length, channels);
        scan.grad_z = rows(batch, length, channels);
    }
    scan.out = rows(batch, length, channels);
    if (ENTRY(scan_forward)(&scan) || ENTRY(scan_backward)(&scan)) abort();
    release();
}

static void fuzz_conv(void) {
    int64_t batch = pick(1, 3), length = pick(1, 3 * TILE), channels = pick(1, 70), width = pick(0, 1) ? 4 : pick(1, 10);
    Convolution conv = {.directions = pick(1, 2), .batch = batch, .length = length, .channels = channels, .width = width};
    conv.silu = pick(0, 1);
    conv.threads = pick(1, 3);
    conv.x = rows(batch, length, channels);
    conv.grad_x = rows(batch, length, channels);
    for (int i = 0; i < conv.directions; i++) {
        conv.y[i] = rows(batch, length, channels);
        conv.weight[i] = fresh(channels * width);
        conv.bias[i] = pick(0, 1) ? fresh(channels) : NULL;
        conv.grad_weight[i] = fresh(channels * width);
        conv.grad_bias[i] = conv.bias[i] ? fresh(channels) : NULL;
    }
    if (ENTRY(conv_forward)(&conv) || ENTRY(conv_backward)(&conv)) abort();
    release();
}

static void fuzz_mixer(void) {
    int64_t batch = pick(1, 4), length = pick(1, pick(0, 1) ? 3 * SLICE : CHUNK), channels = pick(1, 70), state = pick(1, 20), width = pick(2, 5);
    int64_t rank = pick(1, 20), row = rank + 2 * state, chunks = (length + CHUNK - 1) / CHUNK;
    Mixer mixer = {.batch = batch, .length = length, .channels = channels, .state = state, .rank = rank, .width = width};
    mixer.threads = pick(1, 3);
    mixer.scale = 0.5;
    mixer.x = rows(batch, length, channels);
    mixer.z = rows(batch, length, channels);
    mixer.out = rows(batch, length, channels);
    for (int i = 0; i < 2; i++) {
        MixerDirection *d = &mixer.direction[i];
        d->conv = fresh(channels * width);
        d->conv_bias = pick(0, 1) ? fresh(channels) : NULL;
        d->x_proj = fresh(row * channels);
        d->dt = fresh(channels * rank);
        d->dt_bias = pick(0, 1) ? fresh(channels) : NULL;
        d->A_log = fresh(channels * state);
        d->D = fresh(channels);
    }
    if (ENTRY(mixer_forward)(&mixer)) abort();
    mixer.grad_x = rows(batch, length, channels);
    mixer.grad_z = rows(batch, length, channels);
    for (int i = 0; i < 2; i++) {
        MixerDirection *d = &mixer.direction[i];
        d->x = fresh(batch * length * row);
        d->states = fresh(batch * (chunks - 1) * state * round_up(channels, PADDING));
        d->grad_conv = fresh(channels * width);
        d->grad_conv_bias = d->conv_bias ? fresh(channels) : NULL;
        d->grad_x_proj = fresh(row * channels);
        d->grad_dt = fresh(channels * rank);
        d->grad_dt_bias = d->dt_bias ? fresh(channels) : NULL;
        d->grad_A_log = fresh(channels * state);
        d->grad_D = fresh(channels);
    }
    if (ENTRY(mixer_forward)(&mixer) || ENTRY(mixer_backward)(&mixer)) abort();
    release();
}

static void fuzz_norm(void) {
    int64_t count = pick(1, 100), width = pick(1, 70);
    Norm norm = {fresh(count * width), fresh(width), fresh(count * width), fresh(count * width), fresh(width), count, width};
    norm.threads = pick(1, 3);
    norm.eps = 1e-5;
    if (ENTRY(norm_forward)(&norm) || ENTRY(norm_backward)(&norm)) abort();
    release();
}

static void fuzz_gated_norm(void) {
    int64_t batch = pick(1, 3), length = pick(1, 40), width = pick(1, 70), size = batch * length * width;
    GatedNorm gated = {{fresh(size), fresh(width), fresh(size), fresh(size), fresh(width), batch * length, width}};
    gated.norm.threads = pick(1, 3);
    gated.norm.eps = 1e-5;
    gated.z = rows(batch, length, width);
    gated.grad_z = rows(batch, length, width);
    gated.length = length;
    if (ENTRY(gated_norm_forward)(&gated) || ENTRY(gated_norm_backward)(&gated)) abort();
    release();
}

static void fuzz_grid_conv(void) {
    GridConvolution conv = {.batch = pick(1, 3), .prefix = pick(0, 2), .height = pick(1, 6), .width = pick(1, 6)};
    int64_t places = conv.height * conv.width, channels = pick(1, 70), keep[3 * 36];
    conv.kept = pick(0, 1) ? -1 : pick(0, places);
    int64_t length = conv.prefix + (conv.kept < 0 ? places : conv.kept);
    conv.channels = channels;
    conv.silu = pick(0, 1);
    conv.threads = pick(1, 3);
    conv.x = rows(conv.batch, length, channels);
    conv.y = rows(conv.batch, length, channels);
    conv.grad = rows(conv.batch, length, channels);
    conv.taps = fresh(9 * channels);
    conv.bias = pick(0, 1) ? fresh(channels) : NULL;
    conv.grad_taps = fresh(10 * channels);
    conv.keep = keep;
    for (int64_t b = 0; b < conv.batch; b++)  /* kept of `places` in order, each as likely */
        for (int64_t place = 0, k = 0; k < conv.kept; place++)
            if (pick(1, places - place) <= conv.kept - k) keep[b * conv.kept + k++] = place;
    if (ENTRY(grid_conv_forward)(&conv) || ENTRY(grid_conv_backward)(&conv)) abort();
    if (conv.kept > 0) {
        keep[pick(0, conv.batch * conv.kept - 1)] = pick(0, 1) ? places : -1;
        if (ENTRY(grid_conv_forward)(&conv) != 1 || ENTRY(grid_conv_backward)(&conv) != 1) abort();
    }
    release();
}

static void fuzz_decayed(void) {
    Decayed d = {.batch = pick(1, 3), .orders = pick(1, 2), .heads = pick(1, 3), .length = pick(1, 50)};
    int64_t steps = d.batch * d.heads * d.length, scores = d.batch * d.length * d.length;
    d.threads = pick(1, 3);
    d.scores = fresh(scores);
    d.s = fresh(d.orders * steps);
    d.dt = fresh(steps);
    d.grad = fresh(steps * d.length);
    d.out = fresh(steps * d.length);
    d.grad_scores = fresh(scores);
    d.grad_s = fresh(d.orders * steps);
    d.grad_dt = fresh(steps);
    if (ENTRY(decayed_forward)(&d) || ENTRY(decayed_backward)(&d)) abort();
    release();
}

static void fuzz_dual(void) {
    int64_t batch = pick(1, 3), length = pick(1, 90), heads = pick(1, 4), headdim = pick(1, 70), state = pick(1, 40);
    Dual d = {.batch = batch, .length = length, .heads = heads, .headdim = headdim, .state = state, .orders = pick(1, 2)};
    d.threads = pick(1, 3);
    d.chunk = pick(0, 1) ? length : pick(1, 70);
    d.x = rows(batch, length, heads * headdim);
    d.B = rows(batch, length, state);
    d.C = rows(batch, length, state);
    d.y = rows(batch, length, heads * headdim);
    d.dt = fresh(batch * length * heads);
    d.growth = fresh(batch * d.orders * length * heads);
    d.D = pick(0, 1) ? fresh(heads) : NULL;
    int64_t places[2][3 * 90];
    for (int64_t o = 0; o < d.orders; o++) {
        d.visits_batch[o] = pick(0, 1) * length;
        for (int64_t t = 0; t < batch * length; t++) {
            int64_t first = t / length * length, other = pick(first, t);
            places[o][t] = places[o][other];
            places[o][other] = t - first;
        }
        d.visits[o] = pick(0, 1) ? places[o] : NULL;
    }
    if (ENTRY(dual_forward)(&d)) abort();
    places[0][pick(0, length - 1)] = pick(0, 1) ? length + 1000 : -1000;
    if (ENTRY(dual_forward)(&d) != (d.visits[0] != NULL)) abort();
    release();
}

static void fuzz_swiglu(void) {
    int64_t count = pick(1, 100), width = pick(1, 70);
    SwiGlu glu = {.x = fresh(count * 2 * width), .y = fresh(count * width), .rows = count, .width = width};
    glu.bias = pick(0, 1) ? fresh(2 * width) : NULL;
    glu.threads = pick(1, 3);
    if (ENTRY(swiglu_forward)(&glu)) abort();
    glu.grad = fresh(count * width);
    glu.y = fresh(count * 2 * width);
    glu.grad_bias = pick(0, 1) ? fresh(2 * width) : NULL;
    if (ENTRY(swiglu_backward)(&glu)) abort();
    release();
}

static void fuzz_linear(void) {
    int64_t count = pick(1, pick(0, 1) ? 900 : 30), depth = pick(1, 70), columns = pick(1, 70), width = pick(1, 70);
    Linear linear = {.x = fresh(count * depth), .weight = fresh(columns * depth), .y = fresh(count * columns), .rows = count};
    linear.depth = depth;
    linear.columns = columns;
    linear.bias = pick(0, 1) ? fresh(columns) : NULL;
    linear.threads = pick(1, 3);
    if (ENTRY(linear_forward)(&linear)) abort();
    LinearBackward back = {.grad = linear.y, .x = linear.x, .weight = linear.weight, .rows = count, .depth = depth};
    back.columns = columns;
    back.grad_x = pick(0, 1) ? fresh(count * depth) : NULL;
    back.grad_weight = pick(0, 1) ? fresh(columns * depth) : NULL;
    back.threads = pick(1, 3);
    if (ENTRY(linear_backward)(&back)) abort();
    GatedLinear gated = {.x = linear.x, .weight = fresh(2 * width * depth), .out = fresh(columns * width), .y = linear.y};
    gated.bias = pick(0, 1) ? fresh(2 * width) : NULL;
    gated.out_bias = linear.bias;
    gated.rows = count;
    gated.depth = depth;
    gated.width = width;
    gated.columns = columns;
    gated.threads = pick(1, 3);
    if (ENTRY(gated_linear_forward)(&gated)) abort();
    release();
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 200;
    for (int i = 0; i < rounds; i++) {
        fuzz_scan();
        fuzz_conv();
        fuzz_mixer();
        fuzz_norm();
        fuzz_gated_norm();
        fuzz_grid_conv();
        fuzz_decayed();
        fuzz_dual();
        fuzz_swiglu();
        fuzz_linear();
    }
    printf("%d rounds of " NAME(ISA) " without a finding\n", rounds);
    return 0;
}
