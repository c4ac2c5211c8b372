"""A SwiGLU as one dispatcher op (opaque as in `scan_op`): torch's products, and a kernel for what is between them.

In two-byte types the first product has its gate in its own kernel, so that [a, b] is not in memory, or the forward pass
is one kernel; biases come as they are, to be added to float32 sums, and so may the second weight, which the first
product casts. The backward pass keeps the tokens and computes the first product again, inside the kernel of [a, b]'s
gradients or before it, where they take its place. The hidden layer, for the gradient of the second product's weight,
takes that of its own gradient.
"""

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, autocast_off, in_dtypes_of, register, swiglu_flops
from .launch import INTERPRET, major_capability, multiprocessors, or_else
from .sums import Launch, new_parts, sum_of_parts, sum_of_rows

FORWARD = Launch(4, 512, 4, 0)
BACKWARD = Launch(4, 512, 4, 4)
GATED_DTYPES = (torch.bfloat16, torch.float16)  # of products that have their gate in one kernel


class Tile(NamedTuple):
    """Rows and hidden units of a program of `gated_product`, channels of a step, tiles of rows side by side."""

    rows: int
    hidden: int
    channels: int
    group: int
    warps: int
    stages: int


PRODUCT = Tile(128, 64, 64, 8, 8, 3)
NARROW = PRODUCT._replace(warps=4)
NARROW_CHANNELS = 384  # up to which it is faster on an H200
CAST_NUMBERS = 1024  # of the next product's weight that a program casts at a time


def product_tile(channels: int, major: int) -> Tile:
    """The faster tile on a major compute capability where both were timed; the other spills elsewhere."""
    return NARROW if channels <= NARROW_CHANNELS and major == 9 else PRODUCT


class GatedProduct:
    """SiLU(a) b for [a, b] = x weight^T + bias in one launch, of rows x in a two-byte type, and the casts for a product
    of it."""

    def __init__(self, kernels: Any, given: operands.SwiGlu) -> None:
        self.kernels, self.x, self.weight = kernels, given.x.contiguous(), given.weight.contiguous()
        self.bias, self.out_bias = (None if b is None else b.contiguous() for b in (given.bias, given.out_bias))
        self.out = given.out.contiguous()

    def cast(self, other: Optional[Tensor]) -> Tuple[Optional[Tensor], int]:
        """What is to hold a tensor in x's dtype, and of how many numbers the kernel has to fill it."""
        if other is None or other.dtype == self.x.dtype:
            return other, 0
        return torch.empty_like(other, dtype=self.x.dtype), other.numel()

    def forward(self, tile: Tile) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """The hidden layer, and the next weight and bias in x's dtype, as torch's product wants them."""
        x, (rows, channels), hidden = self.x, self.x.shape, self.weight.shape[0] // 2
        y = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
        (weight, weights), (bias, biases) = self.cast(self.out), self.cast(self.out_bias)
        assert weight is not None
        step = min(tile.channels, max(16, 1 << (channels - 1).bit_length()))
        grid = (math.ceil(rows / tile.rows) * math.ceil(hidden / tile.hidden),)
        self.kernels.gated_product[grid](
            x, self.weight, or_else(self.bias, x), y, self.out, or_else(self.out_bias, x), weight, or_else(bias, x),
            rows, C=channels, H=hidden, WEIGHTS=weights, BIASES=biases, BM=tile.rows, BH=tile.hidden, BC=step,
            BN=CAST_NUMBERS, GROUP=tile.group, HAS_BIAS=self.bias is not None,
            EXACT=channels % step == 0 and hidden % tile.hidden == 0, FAST=not INTERPRET,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y, weight, bias


class WholeTile(NamedTuple):
    """Rows of a program of `whole_swiglu`, hidden units of a step, and its launch; programs that a multiprocessor runs
    side by side, and the rows that two products (`PRODUCT` and the second) take in the same time."""

    rows: int
    hidden: int
    warps: int
    stages: int
    registers: Optional[int]
    programs: int
    cost: int


WHOLE = (WholeTile(128, 32, 8, 3, None, 1, 103), WholeTile(64, 16, 4, 2, 168, 3, 162))
WHOLE_CHANNELS = range(144, 193, 16)  # of x and of the output: two pieces, the sums of which fit into registers


def whole_tile(rows: int, device: torch.device) -> Optional[WholeTile]:
    """The fastest tile by whole waves of programs on an H200 (C 192, 768 hidden units); None where two products are."""

    def cost(tile: WholeTile) -> int:
        return tile.cost * math.ceil(rows / (tile.rows * tile.programs * multiprocessors(device)))

    best = min(WHOLE, key=cost)
    return best if cost(best) * multiprocessors(device) < rows else None


def pieces(channels: int) -> Tuple[int, int]:
    """Two powers of two, from 16, that cover a number of channels; the second may be 0."""
    first = max(16, 1 << (channels.bit_length() - 1))
    rest = channels - first
    return first, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


class WholeSwiGlu:
    """A SwiGLU of rows x in one launch, whose hidden layer stays in registers."""

    def __init__(self, kernels: Any, given: operands.SwiGlu) -> None:
        self.kernels = kernels
        self.x, self.weight, self.out = given.x.contiguous(), given.weight.contiguous(), given.out.contiguous()
        self.biases = [None if bias is None else bias.contiguous() for bias in (given.bias, given.out_bias)]

    def forward(self, tile: WholeTile) -> Tensor:
        x, out_weight, (bias, out_bias) = self.x, self.out, self.biases
        (rows, channels), (outputs, hidden) = x.shape, out_weight.shape
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
        (C0, C1), (N0, N1), even = pieces(channels), pieces(outputs), hidden % tile.hidden == 0
        self.kernels.whole_swiglu[math.ceil(rows / tile.rows),](
            x, self.weight, or_else(bias, x), out_weight, or_else(out_bias, x), out, rows,
            C=channels, H=hidden, N=outputs, C0=C0, C1=C1, N0=N0, N1=N1, BM=tile.rows, BH=tile.hidden,
            HAS_BIAS=bias is not None, HAS_OUT_BIAS=out_bias is not None, EXACT=C0 + C1 == channels and even,
            EXACT_OUT=N0 + N1 == outputs and even, FAST=not INTERPRET,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        return out


class GradientTile(NamedTuple):
    """Rows and hidden units, multiples of 16 and 32, of a step of `swiglu_gradients`, and its launch; programs on each
    multiprocessor that walk over all rows."""

    rows: int
    hidden: int
    warps: int
    stages: int
    registers: Optional[int]
    programs: int


GRADIENTS = GradientTile(64, 64, 4, 2, None, 2)
GRADIENT_CHANNELS = 192  # up to which a kernel with the product is faster than one after it


@torch.compiler.assume_constant_result
def _timed(device: torch.device) -> bool:
    return major_capability(device) == 9


def gradient_tile(channels: int, device: torch.device) -> Optional[GradientTile]:
    """The fastest tile on an H200; None where another kernel follows the product, or nothing was timed."""
    return GRADIENTS if channels <= GRADIENT_CHANNELS and _timed(device) else None


class SwiGluGradients:
    """Gradients of [a, b] = x weight^T + bias for that of SiLU(a) b, rows x in a two-byte type, with the product."""

    def __init__(self, kernels: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
        self.kernels, self.x, self.weight = kernels, x.contiguous(), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()

    def backward(self, grad: Tensor, tile: GradientTile) -> Tuple[Tensor, Tensor]:
        """The gradient, and parts of its sum over the rows, float32; puts SiLU(a) b in the place of its gradient."""
        x, (rows, channels), hidden = self.x, self.x.shape, self.weight.shape[0] // 2
        grad_ab = torch.empty((rows, 2 * hidden), dtype=x.dtype, device=x.device)
        columns = math.ceil(hidden / tile.hidden)
        parts, span = new_parts(x, rows, 2 * hidden, tile.rows, tile.programs, columns)
        C0, C1 = pieces(channels)
        self.kernels.swiglu_gradients[len(parts), columns](
            x, self.weight, or_else(self.bias, x), grad, grad_ab, parts, rows, span,
            C=channels, H=hidden, C0=C0, C1=C1, BM=tile.rows, BH=tile.hidden, HAS_BIAS=self.bias is not None,
            EXACT=C0 + C1 == channels and hidden % tile.hidden == 0, FAST=not INTERPRET,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
        return grad_ab, parts


class Gate:
    """SiLU(a) b for rows [a, b]: launches of one call."""

    def __init__(self, kernels: Any, ab: Tensor) -> None:
        self.kernels, self.ab = kernels, ab
        self.rows, self.dim = ab.shape[0], ab.shape[1] // 2

    def constants(self, launch: Launch) -> dict:
        channels = min(launch.columns, 1 << (self.dim - 1).bit_length())
        # a second warp with the same elements might read what the first has put in their place
        warps = min(launch.warps, max(1, launch.rows * channels // 32))
        return {'DIM': self.dim, 'BR': launch.rows, 'BD': channels, 'FAST': not INTERPRET, 'num_warps': warps}

    def forward(self, launch: Launch = FORWARD) -> Tensor:
        out = torch.empty((self.rows, self.dim), dtype=self.ab.dtype, device=self.ab.device)
        constants = self.constants(launch)
        grid = (math.ceil(self.rows / launch.rows), math.ceil(self.dim / constants['BD']))
        self.kernels.swiglu[grid](self.ab, out, self.rows, **constants)
        return out

    def backward(self, grad: Tensor, launch: Launch = BACKWARD) -> Tensor:
        """Puts the gradient of [a, b] in their place, and the output in that of its gradient; returns parts of the
        former's sum over the rows, float32."""
        constants = self.constants(launch)
        columns = math.ceil(self.dim / constants['BD'])
        parts, span = new_parts(self.ab, self.rows, 2 * self.dim, launch.rows, launch.programs, columns)
        self.kernels.swiglu_backward[len(parts), columns](self.ab, grad, parts, self.rows, span, **constants)
        return parts


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """torch's product, for which a bias that kernels take as it is must be of x's dtype."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def gate_of(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Gate:
    """The hidden layer of rows x."""
    from . import swiglu_kernels

    return Gate(swiglu_kernels, linear(x, weight, bias))


def takes_product(given: operands.SwiGlu) -> bool:
    """Whether a kernel may make the first product of rows x: torch's says what does not fit."""
    x, weight, bias, out, out_bias = given
    if x.dtype not in GATED_DTYPES or x.dtype != weight.dtype:
        return False
    wanted = (2 * out.shape[1], x.shape[1]), (2 * out.shape[1],), tuple(out.shape), (out.shape[0],)
    return all(tensor is None or tensor.shape == shape for tensor, shape in zip(given[1:], wanted))


def tile_of(given: operands.SwiGlu) -> Optional[WholeTile]:
    """The tile of rows x with which the SwiGLU is one kernel; None where that is not the fastest."""
    x, out = given.x, given.out
    if x.shape[1] not in WHOLE_CHANNELS or out.shape[0] not in WHOLE_CHANNELS or major_capability(x.device) != 9:
        return None
    return whole_tile(x.shape[0], x.device)


def rows_of(given: operands.SwiGlu) -> Tensor:
    """The SwiGLU of rows x, in the fewest kernels."""
    x, weight, bias, out, out_bias = given
    if not takes_product(given):
        return linear(gate_of(x, weight, bias).forward(), out.to(x.dtype), out_bias)
    from . import gated_product_kernels

    whole = tile_of(given)
    if whole is not None:
        return WholeSwiGlu(gated_product_kernels, given._replace(out=out.to(x.dtype))).forward(whole)
    tile = product_tile(x.shape[1], major_capability(x.device))
    return F.linear(*GatedProduct(gated_product_kernels, given).forward(tile))


def run(x: Tensor, weight: Tensor, bias: Optional[Tensor], out: Tensor, out_bias: Optional[Tensor]) -> Tensor:
    with torch.cuda.device_of(x), autocast_off(x):
        y = rows_of(operands.SwiGlu(x.reshape(-1, x.shape[-1]), weight, bias, out, out_bias))
        return y.view(*x.shape[:-1], out.shape[0])


def gradients_of(given: operands.SwiGlu, grad: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradient of the first product of rows x for that of the hidden layer, which the hidden layer takes the place of,
    and parts of its sum over the rows, float32."""
    x, weight, bias, out, _ = given
    tile = gradient_tile(x.shape[1], x.device) if takes_product(given) else None
    if tile is None:
        gate = gate_of(x, weight, bias)
        parts = gate.backward(grad)
        return gate.ab, parts
    from . import gated_product_kernels

    return SwiGluGradients(gated_product_kernels, x, weight, bias).backward(grad, tile)


def run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], out: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (float32), out and out_bias (float32)."""
    from . import sum_kernels

    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).contiguous()
    with torch.cuda.device_of(x), autocast_off(x):
        hidden = torch.mm(grad, out)
        grad_ab, parts = gradients_of(operands.SwiGlu(rows, weight, bias, out, None), hidden)
        grad_x, grad_weight = torch.mm(grad_ab, weight).view(x.shape), torch.mm(grad_ab.t(), rows)
        biases = sum_of_parts(sum_kernels, parts), sum_of_rows(sum_kernels, grad)
        return grad_x, grad_weight, biases[0], torch.mm(grad.t(), hidden), biases[1]


def fake(x: Tensor, weight: Tensor, bias: Optional[Tensor], out: Tensor, out_bias: Optional[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], out.shape[0]))


def fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], out: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    biases = [x.new_empty(w.shape[0], dtype=torch.float32) for w in (weight, out)]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), biases[0], out.new_empty(out.shape), biases[1]


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def differentiate(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    tensors = ctx.saved_tensors
    return in_dtypes_of(tensors, torch.ops.vim_timm.triton_swiglu_backward.default(grad, *tensors[:4]))


register(
    'triton_swiglu',
    f'({schema(operands.SwiGlu)}) -> Tensor',
    f'(Tensor grad, {schema(operands.SwiGlu, "out_bias")}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    swiglu_flops,
)
