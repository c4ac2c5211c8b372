"""The bidirectional causal convolution with SiLU as a torch operator, `vim_timm::cpu_conv`, with its backward pass.

Shapes: B batch, L tokens, D channels (d_inner), W convolution width.
"""

import struct
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, present, rows, threads
from vim_timm.ops.operands import Conv, Taps, schema
from vim_timm.ops.registration import Kernel, conv_flops, register

# The C structure Convolution: four Rows, two weights, biases and their gradients each, seven integers.
_STRUCT = struct.Struct('@27q')
library.expect('Convolution', _STRUCT.size)


def _checked(conv: Conv) -> Conv:
    """The operands in float32, once it is sure that the kernel may read them."""
    x, forward, backward, silu = conv
    if x.dim() != 3 or forward.weight.dim() != 2:
        raise ValueError(
            f'x must be (B, L, D) and weight (D, W), not {tuple(x.shape)} and {tuple(forward.weight.shape)}'
        )
    shape = (x.shape[2], forward.weight.shape[1])

    def taps(taps: Taps, suffix: str) -> Taps:
        weight = parameter(f'weight{suffix}', taps.weight, shape)
        assert weight is not None
        return Taps(weight, parameter(f'bias{suffix}', taps.bias, shape[:1]))

    two = None if backward is None else taps(backward, '_b')
    return Conv(checked('x', x, x.shape), taps(forward, ''), two, silu)


def _pack(conv: Conv, ys: Sequence[Optional[Tensor]], gradients: Optional[Sequence[Optional[Tensor]]]) -> bytes:
    """The C structure; `ys` are both directions' results or their gradients, `gradients` those of the operands."""
    x, (weight, bias), backward, silu = conv
    weight_b, bias_b = (None, None) if backward is None else backward
    grad_x, grad_weight, grad_bias, grad_weight_b, grad_bias_b = gradients or (None,) * 5
    parameters = (weight, weight_b, bias, bias_b, grad_weight, grad_weight_b, grad_bias, grad_bias_b)
    directions, width = 1 + (backward is not None), weight.shape[1]
    y, y_b = ys
    return _STRUCT.pack(
        *rows(x), *rows(y), *rows(y_b), *rows(grad_x), *(address(p) for p in parameters),
        directions, *x.shape, width, silu, threads(x.numel() * width * directions),
    )  # fmt: skip


def _fake(x, weight, bias, weight_b, bias_b, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape if weight_b is not None else (0,))


def _run(x, weight, bias, weight_b, bias_b, silu):
    """Both directions' results (B, L, D) in x's dtype, the second empty without weight_b."""
    conv = _checked(Conv.of(x, weight, bias, weight_b, bias_b, silu))
    y, y_b = new(x.shape), new(x.shape if weight_b is not None else (0,))
    if y.numel():
        library.call('conv_forward', _pack(conv, (y, None if weight_b is None else y_b), None))
    return y.to(x.dtype), y_b.to(x.dtype)


def _backward_fake(grad, grad_b, *arguments):
    return [x.new_empty(x.shape) for x in present(*arguments[:-1])]


def _run_backward(grad, grad_b, *arguments):
    """Gradients of the tensors that are there, in their order and dtypes."""
    *originals, silu = arguments
    conv = Conv.of(*originals, silu)
    shape = conv.x.shape
    if not conv.x.numel():
        return [torch.zeros_like(t) for t in present(*originals)]
    ys = [new(shape).zero_() if g is None else gradient(g, shape) for g in (grad, grad_b)]
    if conv.backward is None:
        ys[1] = None
    gradients = [None if t is None else new(t.shape) for t in originals]
    conv = _checked(conv)  # copies in it have to live until the call has ended
    library.call('conv_backward', _pack(conv, ys, gradients))
    return [g.to(t.dtype) for g, t in zip(gradients, originals) if t is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_b):
    x, weight, bias, weight_b, bias_b = inputs = ctx.saved_tensors
    if grad is None and grad_b is None:
        return (None,) * (len(inputs) + 1)
    grad_b = None if weight_b is None else grad_b
    found = iter(torch.ops.vim_timm.cpu_conv_backward.default(grad, grad_b, *inputs, ctx.silu))
    return *(None if x is None else next(found) for x in inputs), None


register(
    'cpu_conv',
    f'({schema(Conv)}) -> (Tensor, Tensor)',
    f'(Tensor? grad, Tensor? grad_b, {schema(Conv)}) -> Tensor[]',
    Kernel(_run, _fake, _save, _differentiate, _run_backward, _backward_fake),
    conv_flops,
)


def conv_limit(conv: Conv) -> str:
    if conv.backward is not None and conv.backward.weight.shape != conv.forward.weight.shape:
        return 'the CPU kernel takes convolutions of the same width in both directions'
    return limit(conv.x, conv.forward.weight)


def conv(given: Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """`reference.conv` on the kernel."""
    y, y_b = torch.ops.vim_timm.cpu_conv.default(*given.flat())
    return y, None if given.backward is None else y_b
