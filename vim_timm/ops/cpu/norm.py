"""The root mean square norm as a torch operator, `vim_timm::cpu_rms_norm`: one pass over memory where aten takes five.

Shapes: (..., C) with weight (C).
"""

import struct

import torch
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, threads
from vim_timm.ops.operands import schema
from vim_timm.ops.registration import Kernel, register, uncounted

# The C structure Norm: five pointers, three integers, one double.
_STRUCT = struct.Struct('@8qd')
library.expect('Norm', _STRUCT.size)


def _call(function, x, weight, grad, y, grad_weight, eps) -> None:
    x, weight = checked('x', x.contiguous(), x.shape), checked('weight', weight.contiguous(), x.shape[-1:])
    rows, width = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    if rows:
        tensors = (address(t) for t in (x, weight, grad, y, grad_weight))
        library.call(function, _STRUCT.pack(*tensors, rows, width, threads(x.numel()), eps))


def _run(x, weight, eps):
    y = new(x.shape)
    _call('norm_forward', x, weight, None, y, None, eps)
    return y.to(x.dtype)


def _run_backward(grad, x, weight, eps):
    grad_x, grad_weight = new(x.shape), new(weight.shape).zero_()
    _call('norm_backward', x, weight, gradient(grad.contiguous(), x.shape), grad_x, grad_weight, eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _save(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    return *torch.ops.vim_timm.cpu_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


register(
    'cpu_rms_norm',
    f'({schema(operands.Norm)}) -> Tensor',
    f'(Tensor grad, {schema(operands.Norm)}) -> (Tensor, Tensor)',
    Kernel(
        _run,
        lambda x, weight, eps: x.new_empty(x.shape),
        _save,
        _differentiate,
        _run_backward,
        lambda grad, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    ),
    uncounted,
)


def rms_norm_limit(norm: operands.Norm) -> str:
    return limit(norm.x, norm.weight)


def rms_norm(norm: operands.Norm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), in x's dtype, computed in float32."""
    return torch.ops.vim_timm.cpu_rms_norm.default(*norm)
