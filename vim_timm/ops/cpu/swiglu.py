"""SwiGLU on the CPU kernel.

For inference it is one operator, `vim_timm::cpu_gated_linear`, whose hidden layer stays in the cache. Where gradients
are wanted its products are `vim_timm::cpu_linear`, and between them `vim_timm::cpu_swiglu` takes bias, SiLU and product
in one pass over memory where aten takes four: x (..., 2 H), bias (2 H).
"""

import struct
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.linear import linear, multiplies
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, threads
from vim_timm.ops.operands import Linear, schema
from vim_timm.ops.registration import Kernel, register, register_inference, swiglu_flops, uncounted, wants_gradient

# C structures: pointers, integers
_STRUCT = struct.Struct('@8q')
_WHOLE = struct.Struct('@11q')
library.expect('SwiGlu', _STRUCT.size)
library.expect('GatedLinear', _WHOLE.size)


# --- the gate, which autograd differentiates


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


# --- as one operator, which keeps nothing for a backward pass


def _run_whole(x: Tensor, weight: Tensor, bias: Optional[Tensor], out: Tensor, out_bias: Optional[Tensor]) -> Tensor:
    """`ops.swiglu`."""
    depth, (columns, width) = x.shape[-1], out.shape
    y, dtype = new((*x.shape[:-1], columns)), x.dtype
    x = checked('x', x.contiguous(), x.shape)
    shapes = {'weight': (2 * width, depth), 'bias': (2 * width,), 'out': (columns, width), 'out_bias': (columns,)}
    weights = [parameter(name, t, shapes[name]) for name, t in zip(shapes, (weight, bias, out, out_bias))]
    if y.numel():
        rows = y.numel() // columns
        sizes = rows, depth, width, columns, threads(rows * width * (2 * depth + columns))
        library.call('gated_linear_forward', _WHOLE.pack(*map(address, (x, *weights, y)), *sizes))
    return y.to(dtype)


register_inference(
    'cpu_gated_linear',
    f'({schema(operands.SwiGlu)}) -> Tensor',
    _run_whole,
    lambda x, weight, bias, out, out_bias: x.new_empty((*x.shape[:-1], out.shape[0])),
    swiglu_flops,
)


# --- what is chosen


def swiglu_limit(given: operands.SwiGlu) -> str:
    return limit(given.x, given.weight)


def swiglu(given: operands.SwiGlu) -> Tensor:
    """The SwiGLU (..., C) in the products' dtype; between them it is float32."""
    if multiplies(*given) and not wants_gradient(given):
        return torch.ops.vim_timm.cpu_gated_linear.default(*given)
    hidden = torch.ops.vim_timm.cpu_swiglu.default(linear(Linear(given.x, given.weight, None)), given.bias)
    return linear(Linear(hidden, given.out, given.out_bias))
