"""The bidirectional causal convolution with SiLU as a torch operator, `vim_timm::cpu_conv`, with its backward pass.

Shapes: B batch, L tokens, D channels (d_inner), W convolution width.
"""

import struct
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import (
    address,
    checked,
    gradient,
    parameter,
    present,
    refuse_second_derivative,
    rows,
    threads,
)
from vim_timm.ops.operators import register

# The C structure Convolution: four Rows, two weights, biases and their gradients each, seven integers.
_STRUCT = struct.Struct('@27q')
library.expect('Convolution', _STRUCT.size)

_INPUTS = 'Tensor x, Tensor weight, Tensor? bias, Tensor? weight_b, Tensor? bias_b'
_definitions = torch.library.Library('vim_timm', 'FRAGMENT')
_definitions.define(f'cpu_conv({_INPUTS}, bool silu) -> (Tensor, Tensor)')
_definitions.define(f'cpu_conv_backward(Tensor? grad, Tensor? grad_b, {_INPUTS}, bool silu) -> Tensor[]')


def _checked(x, weight, bias, weight_b, bias_b) -> list[Optional[Tensor]]:
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(f'x must be (B, L, D) and weight (D, W), not {tuple(x.shape)} and {tuple(weight.shape)}')
    channels, taps = x.shape[2], (x.shape[2], weight.shape[1])
    return [
        checked('x', x, x.shape),
        parameter('weight', weight, taps),
        parameter('bias', bias, (channels,)),
        parameter('weight_b', weight_b, taps),
        parameter('bias_b', bias_b, (channels,)),
    ]


def _pack(inputs, ys, grad_x, weight_gradients, silu) -> bytes:
    x, weight, bias, weight_b, bias_b = inputs
    directions, width = 1 + (weight_b is not None), weight.shape[1]
    parameters = (weight, weight_b, bias, bias_b, *weight_gradients)
    team = threads(x.numel() * width * directions)
    return _STRUCT.pack(
        *rows(x), *rows(ys[0]), *rows(ys[1]), *rows(grad_x), *(address(p) for p in parameters),
        directions, *x.shape, width, silu, team,
    )  # fmt: skip


def _fake(x, weight, bias, weight_b, bias_b, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape if weight_b is not None else (0,))


def _run(x, weight, bias, weight_b, bias_b, silu):
    """Both directions' results (B, L, D) in x's dtype, the second empty without weight_b."""
    inputs = _checked(x, weight, bias, weight_b, bias_b)
    y, y_b = torch.empty(x.shape), torch.empty(x.shape if weight_b is not None else (0,))
    if y.numel():
        library.call('conv_forward', _pack(inputs, (y, None if weight_b is None else y_b), None, (None,) * 4, silu))
    return y.to(x.dtype), y_b.to(x.dtype)


def _backward_fake(grad, grad_b, *arguments):
    return [x.new_empty(x.shape) for x in present(*arguments[:5])]


def _run_backward(grad, grad_b, x, weight, bias, weight_b, bias_b, silu):
    """Gradients of the tensors that are there, in their order and dtypes."""
    originals = (x, weight, bias, weight_b, bias_b)
    if not x.numel():
        return [torch.zeros_like(t) for t in present(*originals)]
    inputs = _checked(*originals)
    ys = [torch.zeros(x.shape) if g is None else gradient(g) for g in (grad, grad_b)[: 1 + (weight_b is not None)]]
    gradients = [None if t is None else torch.empty(t.shape) for t in originals]
    grad_x, grad_weight, grad_bias, grad_weight_b, grad_bias_b = gradients
    weight_gradients = (grad_weight, grad_weight_b, grad_bias, grad_bias_b)
    library.call('conv_backward', _pack(inputs, (*ys, None)[:2], grad_x, weight_gradients, silu))
    return [g.to(t.dtype) for g, t in zip(gradients, originals) if t is not None]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_b):
    inputs = ctx.saved_tensors
    if grad is None and grad_b is None:
        return (None,) * 6
    both = inputs[3] is not None
    found = iter(torch.ops.vim_timm.cpu_conv_backward(grad, grad_b if both else None, *inputs, ctx.silu))
    return *(None if x is None else next(found) for x in inputs), None


register(
    _definitions, 'cpu_conv', _run, _fake, _save, _differentiate, _run_backward, _backward_fake,
    refuse_second_derivative,
)  # fmt: skip


@register_flop_formula(torch.ops.vim_timm.cpu_conv)
def conv_flops(x_shape, weight_shape, bias_shape, weight_b_shape, *others, out_shape=None, **kwargs) -> int:
    """A multiplication and an addition a tap."""
    batch, length, channels = x_shape
    return 2 * batch * length * channels * weight_shape[1] * (1 + (weight_b_shape is not None))


@register_flop_formula(torch.ops.vim_timm.cpu_conv_backward)
def conv_backward_flops(grad_shape, grad_b_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * conv_flops(*shapes)


def conv(x, weight, bias, weight_b, bias_b, silu):
    """`ops.reference.conv` on the kernel: same arguments, same result."""
    y, y_b = torch.ops.vim_timm.cpu_conv(x, weight, bias, weight_b, bias_b, silu)
    return y, None if weight_b is None else y_b
