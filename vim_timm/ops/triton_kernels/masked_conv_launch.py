"""Launches of the convolution at the visible patches of masked images, and of what it has to know of their places."""

import math
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import operands
from .grid_conv_op import fitting
from .launch import INTERPRET, aligned_strides, or_else


class PlacesLaunch(NamedTuple):
    """Tokens of a program, tokens with which it compares them at once, and its warps."""

    tokens: int
    others: int
    warps: int


class MaskedConvLaunch(NamedTuple):
    """Tokens and channels of a program, its warps, how many blocks of tokens it takes one after the other, and at most
    how many registers a thread."""

    tokens: int
    channels: int
    warps: int
    repeats: int
    registers: Optional[int] = None


PLACES = PlacesLaunch(64, 8, 2)
CONV_FORWARD = MaskedConvLaunch(16, 128, 4, 1)
CONV_BACKWARD = MaskedConvLaunch(8, 32, 2, 4)
CONV_INPUT = MaskedConvLaunch(16, 32, 2, 1)


def empty_neighbours(keep: Tensor, prefix: int) -> Tensor:
    return keep.new_empty((10, keep.shape[0], prefix + keep.shape[1]), dtype=torch.int32)


def find_neighbours(kernels: Any, given: operands.Visible, launch: PlacesLaunch = PLACES) -> Tensor:
    """`ops.visible_neighbours`.

    What `keep` holds is not looked at here, as the device would be waited for: an image that has a cell outside the
    grid, or one twice, becomes NaN.
    """
    keep, prefix, height, width = given
    neighbours = empty_neighbours(keep, prefix)
    _, batch, length = neighbours.shape
    kernels.masked_places[math.ceil(length / launch.tokens), 10, batch](
        keep, neighbours, length, prefix, height, width, *keep.stride(),
        BT=launch.tokens, BU=launch.others, num_warps=launch.warps,
    )  # fmt: skip
    return neighbours


class MaskedConv:
    """The convolution at visible patches, with SiLU: launches of one call, as of `grid_conv_op.Conv`."""

    def __init__(self, kernels: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], neighbours: Tensor) -> None:
        self.kernels, self.x, self.neighbours = kernels, x, neighbours
        self.batch, self.length, self.channels = x.shape
        self.weight, self.bias = fitting(self.channels, weight, bias)

    def launch(
        self, kernel: Any, launch: MaskedConvLaunch, tensors: Sequence[Tensor], rows: Sequence[Tensor], **constants: Any
    ) -> None:
        """Runs a kernel on tensors, of which `rows` have the strides of its arguments."""
        align, strides = aligned_strides(*rows)
        kernel[self.programs(launch), math.ceil(self.channels / launch.channels)](
            *tensors, self.batch * self.length, self.length, *strides,
            CHANNELS=self.channels, BT=launch.tokens, BC=launch.channels, ALIGN=align, FAST=not INTERPRET,
            num_warps=launch.warps, maxnreg=launch.registers, **constants,
        )  # fmt: skip

    def programs(self, launch: MaskedConvLaunch) -> int:
        """Programs over which the tokens are spread."""
        return math.ceil(math.ceil(self.batch * self.length / launch.tokens) / launch.repeats)

    def forward(self, y: Tensor, launch: MaskedConvLaunch = CONV_FORWARD) -> None:
        """Fills y (B, L, D), of any row stride."""
        self.launch(
            self.kernels.masked_conv, launch,
            (self.x, self.weight, or_else(self.bias, self.weight), self.neighbours, y), (self.x, y),
            HAS_BIAS=self.bias is not None, FLIP=False, SILU=True,
        )  # fmt: skip

    def before_silu(self, grad_y: Tensor, launch: MaskedConvLaunch = CONV_BACKWARD) -> Tuple[Tensor, Tensor]:
        """The gradient before the activation (B, L, D), and float32 gradients of taps and bias (10, D), as parts to add
        over their first axis."""
        grad = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        parts = torch.empty((self.programs(launch), 10, self.channels), dtype=torch.float32, device=self.x.device)
        self.launch(
            self.kernels.masked_conv_gradients, launch,
            (self.x, self.weight, or_else(self.bias, self.weight), self.neighbours, grad_y, grad, parts),
            (self.x, grad_y, grad), HAS_BIAS=self.bias is not None,
        )  # fmt: skip
        return grad, parts

    def of_input(self, grad: Tensor, grad_x: Tensor, launch: MaskedConvLaunch = CONV_INPUT) -> None:
        """Fills grad_x (B, L, D), of any row stride, from the gradient before the activation."""
        self.launch(
            self.kernels.masked_conv, launch, (grad, self.weight, self.weight, self.neighbours, grad_x), (grad, grad_x),
            HAS_BIAS=False, FLIP=True, SILU=False,
        )  # fmt: skip
