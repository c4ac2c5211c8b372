"""Launches of the convolution at the visible patches of masked images."""

import math
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .launch import INTERPRET, alignment, or_else


class MaskedConvLaunch(NamedTuple):
    """Tokens and channels of a program, its warps, how many blocks of tokens it takes one after the other, and at most
    how many registers a thread."""

    tokens: int
    channels: int
    warps: int
    repeats: int
    registers: Optional[int] = None


CONV_FORWARD = MaskedConvLaunch(16, 64, 4, 1)
CONV_BACKWARD = MaskedConvLaunch(16, 32, 4, 2)
CONV_INPUT = MaskedConvLaunch(16, 64, 4, 1)


class MaskedConv:
    """The convolution at visible patches, with SiLU: launches of one call, as of `grid_conv_op.Conv`."""

    def __init__(self, kernels: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], neighbours: Tensor) -> None:
        self.kernels, self.neighbours = kernels, neighbours
        self.x, self.weight, self.bias = x, weight.contiguous(), None if bias is None else bias.contiguous()
        self.batch, self.length, self.channels = x.shape
        if weight.shape != (self.channels, 9) or (bias is not None and bias.shape != (self.channels,)):
            raise ValueError(f'taps {list(weight.shape)} and their bias do not fit {self.channels} channels')

    def launch(
        self, kernel: Any, launch: MaskedConvLaunch, tensors: Sequence[Tensor], rows: Sequence[Tensor], **constants: Any
    ) -> None:
        """Runs a kernel on tensors, of which `rows` have the strides of its arguments."""
        align = math.gcd(*(alignment(t) // t.element_size() for t in rows))
        kernel[self.programs(launch), math.ceil(self.channels / launch.channels)](
            *tensors, self.batch * self.length, self.length,
            *(stride // align for t in rows for stride in t.stride()[:2]),
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
