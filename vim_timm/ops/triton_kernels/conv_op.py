"""The bidirectional causal convolution as dispatcher ops over the Triton kernels (opaque as in `scan_op`)."""

import math
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, conv_flops, register
from .launch import INTERPRET, common_rows, multiprocessors, or_else

MAX_WIDTH = 4
BLOCK = 128  # channels of a program, four to a lane of its one warp
FORWARD_WARPS, BACKWARD_WARPS = 20, 12  # on each multiprocessor, as many as registers allow


class Conv:
    """The operands as the kernels take them, and the launches of one call."""

    def __init__(self, given: operands.Conv) -> None:
        from . import conv_kernels

        x, (weight, bias), backward, silu = given
        weight_b, bias_b = backward or (None, None)
        self.kernels = conv_kernels
        (self.x,) = common_rows(x)
        self.directions = 1 if backward is None else 2
        self.width = weight.shape[1]
        weights = common_rows(weight.contiguous(), or_else(weight_b, weight))
        first = or_else(bias, weight).contiguous()
        self.operands = (self.x, *weights, *common_rows(first, or_else(bias_b, first)))
        self.constants = {
            'DIM': x.shape[2],
            'W': self.width,
            'BD': BLOCK,
            'TWO': self.directions == 2,
            'HAS_BIAS': bias is not None,
            'SILU': silu,
            'FAST': not INTERPRET,
            'num_warps': 1,
        }

    def cut(self, warps_per_sm: int) -> Tuple[Tuple[int, int, int], int]:
        """The grid and the tokens of a program."""
        batch, length, dim = self.x.shape
        blocks = math.ceil(dim / BLOCK)
        chunks = max(1, warps_per_sm * multiprocessors(self.x.device) // (batch * blocks))
        chunk = max(16, math.ceil(length / chunks))  # shorter ones would mostly load their neighbours' rows
        return (blocks, math.ceil(length / chunk), batch), chunk

    def forward(self) -> Tuple[Tensor, Tensor]:
        x = self.x
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        y_b = torch.empty(x.shape if self.directions == 2 else (0,), dtype=x.dtype, device=x.device)
        grid, chunk = self.cut(FORWARD_WARPS)
        self.kernels.conv_forward[grid](
            *self.operands, y, y_b, x.shape[1], chunk, *x.stride()[:2], **self.constants
        )  # fmt: skip
        return y, y_b

    def backward(self, grad: Tensor, grad_b: Tensor) -> Tuple[Tensor, Tensor]:
        x = self.x
        grid, chunk = self.cut(BACKWARD_WARPS)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        shape = (grid[1] * grid[2], self.directions, self.width + 1, x.shape[2])
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        self.kernels.conv_backward[grid](
            *self.operands, grad, grad_b, grad_x, parts, x.shape[1], chunk, *x.stride()[:2], *grad.stride()[:2],
            **self.constants,
        )  # fmt: skip
        return grad_x, parts.sum(0)


def run(*flat: Any) -> Tuple[Tensor, Tensor]:
    """Both directions' outputs (the second empty for one direction)."""
    conv = Conv(operands.Conv.of(*flat))
    with torch.cuda.device_of(conv.x):
        return conv.forward()


def fake(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], weight_b: Optional[Tensor], bias_b: Optional[Tensor], silu: bool
) -> Tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if weight_b is not None else (0,))


def run_backward(grad: Tensor, grad_b: Optional[Tensor], *flat: Any) -> Tuple[Tensor, Tensor]:
    """The gradients of x and of every tap and bias: (directions, W + 1, D) float32."""
    conv = Conv(operands.Conv.of(*flat))
    grad, grad_b = common_rows(grad, or_else(grad_b, grad))
    with torch.cuda.device_of(conv.x):
        return conv.backward(grad, grad_b)


def fake_backward(grad: Tensor, grad_b: Optional[Tensor], *flat: Any) -> Tuple[Tensor, Tensor]:
    x, (weight, _), backward, _ = operands.Conv.of(*flat)
    shape = (1 if backward is None else 2, weight.shape[1] + 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx: Any, grad: Tensor, grad_b: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, weight, bias, weight_b, bias_b = ctx.saved_tensors
    grad_x, sums = torch.ops.vim_timm.triton_conv_backward.default(
        grad, None if weight_b is None else grad_b, *ctx.saved_tensors, ctx.silu
    )
    grads = [grad_x, sums[0, :-1].t(), sums[0, -1], sums[-1, :-1].t(), sums[-1, -1]]
    return (*(None if t is None else g.to(t.dtype) for t, g in zip(ctx.saved_tensors, grads)), None)


register(
    'triton_conv',
    f'({schema(operands.Conv)}) -> (Tensor, Tensor)',
    f'(Tensor grad, Tensor? grad_b, {schema(operands.Conv)}) -> (Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    conv_flops,
)
