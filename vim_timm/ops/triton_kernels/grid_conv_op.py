"""The depthwise 3x3 convolution of a grid of tokens, with SiLU, as a dispatcher op (opaque as in `scan_op`)."""

import math
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, grid_conv_flops, in_dtypes_of, register
from .launch import INTERPRET, aligned_strides, or_else
from .ssd_launch import Grid


class ConvLaunch(NamedTuple):
    """Columns and channels of a program, its warps, the rows of the grid that it walks down (0 for all), how many parts
    of the work it takes one after the other, and at most how many registers a thread."""

    columns: int
    channels: int
    warps: int
    span: int
    repeats: int
    registers: Optional[int] = None


CONV_FORWARD = ConvLaunch(16, 32, 4, 0, 1, 96)
CONV_BACKWARD = ConvLaunch(8, 16, 2, 0, 3)
CONV_INPUT = ConvLaunch(8, 128, 4, 0, 2)


def fitting(channels: int, weight: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """Taps (D, 9) and bias (D), contiguous; raises ValueError where they are not of so many channels."""
    if weight.shape != (channels, 9) or (bias is not None and bias.shape != (channels,)):
        raise ValueError(f'taps {list(weight.shape)} and their bias do not fit {channels} channels')
    return weight.contiguous(), None if bias is None else bias.contiguous()


class Conv:
    """The convolution of a grid behind prefix tokens, with SiLU: launches of one call."""

    def __init__(self, kernels: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], grid: Grid) -> None:
        self.kernels, self.x = kernels, x
        self.batch, length, self.channels = x.shape
        self.prefix, self.height, self.width = grid
        grid.check(length)
        self.weight, self.bias = fitting(self.channels, weight, bias)

    def launch(
        self, kernel: Any, launch: ConvLaunch, tensors: Sequence[Tensor], rows: Sequence[Tensor], **constants: Any
    ) -> None:
        """Runs a kernel on tensors, of which `rows` have the strides of its arguments."""
        cut, grid = self.cut(launch)
        align, strides = aligned_strides(*rows)
        kernel[grid](
            *tensors, self.batch, self.prefix, self.height, self.width, *cut, *strides,
            CHANNELS=self.channels, BW=launch.columns, BC=launch.channels, ALIGN=align, FAST=not INTERPRET,
            num_warps=launch.warps, maxnreg=launch.registers, **constants,
        )  # fmt: skip

    def cut(self, launch: ConvLaunch) -> Tuple[Tuple[int, int, int], Tuple[int, int]]:
        """The rows that a program walks down, how often they go into a grid, and all parts of the work; programs for
        channels and for parts."""
        span = launch.span or self.height
        spans = math.ceil(self.height / span)
        parts = spans * math.ceil(self.batch * self.width / launch.columns)
        programs = min(65535, math.ceil(parts / launch.repeats))  # the most of a second axis; each walks over its parts
        return (span, spans, parts), (math.ceil(self.channels / launch.channels), programs)

    def forward(self, y: Tensor, launch: ConvLaunch = CONV_FORWARD) -> None:
        """Fills y (B, L, D), of any row stride."""
        self.launch(
            self.kernels.grid_conv, launch, (self.x, self.weight, or_else(self.bias, self.weight), y), (self.x, y),
            HAS_BIAS=self.bias is not None, FLIP=False, SILU=True,
        )  # fmt: skip

    def before_silu(self, grad_y: Tensor, launch: ConvLaunch = CONV_BACKWARD) -> Tuple[Tensor, Tensor]:
        """The gradient before the activation (B, L, D), and float32 gradients of taps and bias (10, D), as parts to add
        over their first axis."""
        grad = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        programs = self.cut(launch)[1][1]
        parts = torch.empty((programs, 10, self.channels), dtype=torch.float32, device=self.x.device)
        self.launch(
            self.kernels.grid_conv_gradients, launch,
            (self.x, self.weight, or_else(self.bias, self.weight), grad_y, grad, parts), (self.x, grad_y, grad),
            HAS_BIAS=self.bias is not None,
        )  # fmt: skip
        return grad, parts

    def of_input(self, grad: Tensor, grad_x: Tensor, launch: ConvLaunch = CONV_INPUT) -> None:
        """Fills grad_x (B, L, D), of any row stride, from the gradient before the activation."""
        self.launch(
            self.kernels.grid_conv, launch, (grad, self.weight, self.weight, grad_x), (grad, grad_x),
            HAS_BIAS=False, FLIP=True, SILU=False,
        )  # fmt: skip


def weight_and_bias(taps: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients (D, 9) and (D) from those of the kernels, (10, D)."""
    return taps[:9].t().contiguous(), taps[9].clone()


def conv_of(given: operands.GridConv) -> Conv:
    from . import grid_conv_kernels

    x = given.x if given.x.stride(-1) == 1 else given.x.contiguous()
    grid = Grid(given.prefix, given.height, given.width)
    return Conv(grid_conv_kernels, x, given.weight, given.bias, grid)


def run(*flat: Any) -> Tensor:
    conv = conv_of(operands.GridConv(*flat))
    with torch.cuda.device_of(conv.x):
        y = torch.empty(conv.x.shape, dtype=conv.x.dtype, device=conv.x.device)
        conv.forward(y)
        return y


def fake(x: Tensor, *others: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def run_backward(grad: Tensor, *flat: Any) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and float32 ones of weight (D, 9) and bias (D)."""
    conv = conv_of(operands.GridConv(*flat))
    with torch.cuda.device_of(conv.x):
        before, parts = conv.before_silu(grad.contiguous())
        grad_x = torch.empty(conv.x.shape, dtype=conv.x.dtype, device=conv.x.device)
        conv.of_input(before, grad_x)
        return grad_x, *weight_and_bias(parts.sum(0))


def fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *others: Any) -> Tuple[Tensor, Tensor, Tensor]:
    floats = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), floats, torch.empty_like(floats[:, 0])


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def differentiate(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.vim_timm.triton_grid_conv_backward.default(grad, *tensors, *ctx.settings)
    return (*in_dtypes_of(tensors, grads), *[None] * len(ctx.settings))


register(
    'triton_grid_conv',
    f'({schema(operands.GridConv)}) -> Tensor',
    f'(Tensor grad, {schema(operands.GridConv)}) -> (Tensor, Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    grid_conv_flops,
)
