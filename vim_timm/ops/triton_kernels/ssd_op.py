"""The symmetric state space dual as a dispatcher op over the Triton kernels (opaque as in `scan_op`)."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, in_dtypes_of, keep_outputs, register, ssd_flops
from .ssd_chunks import ChunkedSsd
from .ssd_launch import MAX_LENGTH, Grid, Ssd


def ssd_of(given: operands.Ssd, grid: Optional[Grid] = None) -> Ssd:
    """The launches for operands: whole rows of scores for short sequences, chunks and states for long ones."""
    return (Ssd if given.x.shape[1] <= MAX_LENGTH else ChunkedSsd)(given, grid)


def run(*flat: Any) -> Tuple[Tensor, Tensor, Tensor]:
    """y, and for the backward pass dt and s."""
    ssd = ssd_of(operands.Ssd(*flat))
    with torch.cuda.device_of(ssd.x):
        dt, s = ssd.decays()
        return ssd.forward(dt, s, ssd.x.dtype), dt, s


def fake(x: Tensor, delta: Tensor, A_log: Tensor, *others: Any) -> Tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, _ = x.shape
    dt = x.new_empty((batch, heads, length), dtype=torch.float32)
    s = x.new_empty((batch, A_log.shape[0], heads, length), dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dt, s


def run_backward(grad: Tensor, dt: Tensor, s: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    """Gradients of x, delta, A_log, B, C, D and delta_bias; those of D and delta_bias also where there are none."""
    ssd = ssd_of(operands.Ssd(*flat))
    with torch.cuda.device_of(ssd.x):
        grad_x = ssd.empty(*ssd.x.shape, dtype=ssd.x.dtype)
        grad_delta = ssd.empty(*ssd.delta.shape, dtype=ssd.delta.dtype)
        grad_B, grad_C = ssd.empty(*ssd.B.shape), ssd.empty(*ssd.C.shape)
        parts = ssd.backward(grad.contiguous(), dt, s, grad_x, grad_delta, grad_B, grad_C)
        grad_A, grad_D, grad_bias = (part.sum(0) for part in parts)
        return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias


def fake_backward(grad: Tensor, dt: Tensor, s: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    x, delta, A_log, B = flat[:4]

    def empty(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=x.device)

    heads = x.new_empty((x.shape[2],), dtype=torch.float32)
    three = [empty(t, torch.float32) for t in (A_log, B, B)]
    return empty(x, x.dtype), empty(delta, delta.dtype), *three, heads, torch.empty_like(heads)


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.rows, columns, moves = inputs
    ctx.save_for_backward(*output[1:], *tensors, columns, moves)
    keep_outputs(ctx, *output[1:])


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    dt, s, *tensors, columns, moves = ctx.saved_tensors
    grads = torch.ops.vim_timm.triton_ssd_backward.default(grad, dt, s, *tensors, ctx.rows, columns, moves)
    return *in_dtypes_of(tensors, grads), None, None, None


register(
    'triton_ssd',
    f'({schema(operands.Ssd)}) -> (Tensor, Tensor, Tensor)',
    f'(Tensor grad, Tensor dt, Tensor s, {schema(operands.Ssd)})'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    ssd_flops,
)
