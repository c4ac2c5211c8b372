/* Selective scan and depthwise causal convolution of Vision Mamba in float32, alone and as the inside of a block, the
   convolution, decays and state space dual of Vision Mamba 2, the gate of SwiGLU, and the root mean square norm: both
   directions, forward and, but for the dual, backward.

   One compilation unit of the parts below, compiled once per instruction set, with LANES floats to a vector and ISA in the
   name of each entry point.

   Layout: channels-last. Vectors run over channels, so nothing is transposed or summed across lanes, and the matrix
   products of the block feed the kernel directly through their strides. The backward direction walks the same rows with
   a negative step, and adds its result to the forward direction's.

   Letters: b batch entry, t token, c channel, n state, g channel group. A task is one (b, g). Groups and the order of every
   sum depend on the shape only, never on the number of threads: results are bit-equal for any number. */
#include "convolution.h"
#include "decayed.h"
#include "dual.h"
#include "grid_convolution.h"
#include "linear.h"
#include "mixer.h"
#include "norm.h"
#include "scan.h"
#include "scan_backward.h"
#include "swiglu.h"

/* What Python knows of the memory that it hands over; library.py compares it with its own when it opens the library. */
typedef struct {
    const char *name; /* NULL ends the list */
    int64_t value;
} Number;

EXPORT const Number ENTRY(numbers)[] = {
    {"Scan", sizeof(Scan)},
    {"Convolution", sizeof(Convolution)},
    {"Mixer", sizeof(Mixer)},
    {"Norm", sizeof(Norm)},
    {"GatedNorm", sizeof(GatedNorm)},
    {"GridConvolution", sizeof(GridConvolution)},
    {"Decayed", sizeof(Decayed)},
    {"Dual", sizeof(Dual)},
    {"SwiGlu", sizeof(SwiGlu)},
    {"Linear", sizeof(Linear)},
    {"LinearBackward", sizeof(LinearBackward)},
    {"GatedLinear", sizeof(GatedLinear)},
    {"CHUNK", CHUNK},
    {"PADDING", PADDING},
    {"FASTEST / 2^64", (int64_t)(FASTEST / 0x1p64f)}, /* whole, as a float32 of its size is */
    {NULL, 0},
};
