"""What is between the products of a SwiGLU as a torch operator, `vim_timm::cpu_swiglu`: bias, SiLU and product in one
pass over memory where aten takes four.

Shapes: x (..., 2 H), bias (2 H).
"""

import struct
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, threads
from vim_timm.ops.registration import Kernel, register, uncounted

# The C structure SwiGlu: five pointers, three integers.
_STRUCT = struct.Struct('@8q')
library.expect('SwiGlu', _STRUCT.size)


def _call(
    function: str, x: Tensor, bias: Optional[Tensor], grad: Optional[Tensor], to: Tensor, grad_bias: Optional[Tensor]
) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f'rows of {x.shape[-1]} have no two halves')
    x, bias = checked('x', x.contiguous(), x.shape), parameter('bias', bias, x.shape[-1:])
    if x.numel():
        tensors = (address(t) for t in (x, bias, grad, to, grad_bias))
        width = x.shape[-1] // 2
        library.call(function, _STRUCT.pack(*tensors, x.numel() // (2 * width), width, threads(4 * x.numel())))


def _run(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    y = new((*x.shape[:-1], x.shape[-1] // 2))
    _call('swiglu_forward', x, bias, None, y, None)
    return y.to(x.dtype)


def _run_backward(grad: Tensor, x: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    grad_x, grad_bias = new(x.shape), new(x.shape[-1:] if bias is not None else (0,)).zero_()
    grad = gradient(grad.contiguous(), (*x.shape[:-1], x.shape[-1] // 2))
    _call('swiglu_backward', x, bias, grad, grad_x, grad_bias if bias is not None else None)
    return grad_x.to(x.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


def _fake_backward(grad: Tensor, x: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    grad_bias = x.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), grad_bias


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.vim_timm.cpu_swiglu_backward.default(grad, x, bias)
    return grad_x, None if bias is None else grad_bias


register(
    'cpu_swiglu',
    '(Tensor x, Tensor? bias) -> Tensor',
    '(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)',
    Kernel(
        _run,
        lambda x, bias: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
        _save,
        _differentiate,
        _run_backward,
        _fake_backward,
    ),
    uncounted,
)


def swiglu_limit(given: operands.SwiGlu) -> str:
    return limit(given.x, given.weight)


def swiglu(given: operands.SwiGlu) -> Tensor:
    """The SwiGLU (..., C) in the products' dtype; between them it is float32."""
    hidden = torch.ops.vim_timm.cpu_swiglu.default(F.linear(given.x, given.weight), given.bias)
    return F.linear(hidden, given.out, given.out_bias)
