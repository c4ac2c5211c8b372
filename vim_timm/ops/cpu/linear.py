"""The product of a linear layer as a torch operator, `vim_timm::cpu_linear`.

On a processor with AVX-512 that is not Intel's, torch's own (MKL) computes in registers of half the width.

Shapes: x (..., K), weight (N, K), bias (N).
"""

import math
import struct
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, threads
from vim_timm.ops.registration import Kernel, Shapes, register

# C structures: pointers, integers
_LINEAR = struct.Struct('@8q')
_BACKWARD = struct.Struct('@9q')
library.expect('Linear', _LINEAR.size)
library.expect('LinearBackward', _BACKWARD.size)


def multiplies(*tensors: Optional[Tensor]) -> bool:
    """Whether products of these are the kernel's: torch has those of two-byte types, and where they are as fast."""
    if not library.outruns_torch() or torch.is_autocast_enabled('cpu'):
        return False
    return all(x is None or x.dtype == torch.float32 for x in tensors)


def _sizes(x: Tensor, weight: Tensor) -> Tuple[int, int, int, int]:
    """Rows, K, N and threads of a product."""
    rows, depth, columns = math.prod(x.shape[:-1]), x.shape[-1], weight.shape[0]
    return rows, depth, columns, threads(rows * depth * columns)


def _weight(weight: Tensor, x: Tensor) -> Optional[Tensor]:
    return parameter('weight', weight, (weight.shape[0], x.shape[-1]))


def _run(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    y = new((*x.shape[:-1], weight.shape[0]))
    weights = _weight(weight, x), parameter('bias', bias, weight.shape[:1])
    if y.numel():
        tensors = checked('x', x.contiguous(), x.shape), *weights, y
        library.call('linear_forward', _LINEAR.pack(*map(address, tensors), *_sizes(x, weight)))
    return y.to(x.dtype)


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> Tuple[Tensor, Tensor]:
    """Gradients of x and of weight, each empty where it is not asked for."""
    grad_x, grad_weight = new(x.shape if of_x else (0,)), new(weight.shape if of_weight else (0,))
    grad = gradient(grad.contiguous(), (*x.shape[:-1], weight.shape[0]))
    if grad.numel() and x.numel():
        given = grad, checked('x', x.contiguous(), x.shape), _weight(weight, x)
        asked = grad_x if of_x else None, grad_weight if of_weight else None
        library.call('linear_backward', _BACKWARD.pack(*map(address, (*given, *asked)), *_sizes(x, weight)))
    else:
        grad_x.zero_(), grad_weight.zero_()
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> Tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, weight, bias = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.vim_timm.cpu_linear_backward.default(grad, x, weight, of_x, of_weight)
    grad_bias = grad.sum_to_size(bias.shape).to(bias.dtype) if of_bias else None
    return grad_x if of_x else None, grad_weight if of_weight else None, grad_bias


def linear_flops(shapes: Shapes) -> int:
    x, weight = shapes['x'], shapes['weight']
    assert x is not None and weight is not None
    return 2 * math.prod(x) * weight[0]


register(
    'cpu_linear',
    '(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    '(Tensor grad, Tensor x, Tensor weight, bool of_x, bool of_weight) -> (Tensor, Tensor)',
    Kernel(
        _run,
        lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
        _save,
        _differentiate,
        _run_backward,
        _fake_backward,
    ),
    linear_flops,
)


def linear_limit(given: operands.Linear) -> str:
    return limit(given.x, given.weight)


def linear(given: operands.Linear) -> Tensor:
    """x weight^T + bias, (..., N), as torch's linear layer."""
    product = torch.ops.vim_timm.cpu_linear.default if multiplies(*given) else F.linear
    return product(*given)
