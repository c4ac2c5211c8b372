"""The inside of a bidirectional Mamba block as one torch operator, `vim_timm::cpu_mixer`.

The kernel computes batch entries a few at a time: what lies between the convolution and the gate stays in cache and is
never kept. The backward pass computes the convolutions and the step sizes again, from xz and the projections.

Shapes: see `ops.operands`.
"""

import struct
from typing import Optional, Sequence

import torch
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.linear import linear
from vim_timm.ops.cpu.scan import new_states, states_shape
from vim_timm.ops.cpu.tensors import address, checked, gradient, halves, limit, new, parameter, present, rows, threads
from vim_timm.ops.operands import Weights, schema
from vim_timm.ops.registration import Kernel, keep_outputs, mixer_flops, register, wants_gradient

# The C structure Mixer: two directions of sixteen pointers, five Rows, seven integers, one double.
_STRUCT = struct.Struct('@54qd')
library.expect('Mixer', _STRUCT.size)
_NO_GRADIENTS = (None,) * len(Weights._fields)


class _Mixer:
    """The operands as the kernel takes them."""

    def __init__(self, given: operands.Mixer) -> None:
        xz, forward = given.xz, given.forward
        if xz.dim() != 3 or xz.shape[2] % 2:
            raise ValueError(f'xz must be (B, L, 2 D), not {tuple(xz.shape)}')
        self.xz = checked('xz', xz if xz.stride(2) == 1 else xz.contiguous(), xz.shape)
        self.batch, self.length, both = xz.shape
        self.channels, self.width = both // 2, forward.conv.shape[-1]
        self.state, self.rank = forward.A_log.shape[1], forward.dt.shape[1]
        self.scale = given.scale
        self.directions = [self._weights(forward, ''), self._weights(given.backward, '_b')]

    def _weights(self, weights: Weights, suffix: str) -> list[Optional[Tensor]]:
        channels, row = self.channels, self.rank + 2 * self.state
        taps = (channels, *[1] * (weights.conv.dim() - 2), self.width)
        shapes = (
            taps, (channels,), (row, channels), (channels, self.rank), (channels,), (channels, self.state), (channels,)
        )  # fmt: skip
        return [parameter(name + suffix, x, shape) for name, x, shape in zip(Weights._fields, weights, shapes)]

    def call(
        self,
        function: str,
        out: Tensor,
        kept: Sequence[Sequence[Optional[Tensor]]],
        gradients: Sequence[Sequence[Optional[Tensor]]],
        grad_xz: Optional[Tensor],
    ) -> None:
        """Run the kernel; `kept` holds each direction's projections and states, `gradients` those of its weights."""
        pointers = [address(x) for own in zip(self.directions, kept, gradients) for group in own for x in group]
        packed = _STRUCT.pack(
            *pointers, *halves(self.xz), *rows(out), *halves(grad_xz),
            self.batch, self.length, self.channels, self.state, self.rank, self.width,
            threads(out.numel() * self.state), self.scale,
        )  # fmt: skip
        library.call(function, packed)


def _kept_shapes(given: operands.Mixer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What both directions keep for the backward pass: projections and states."""
    batch, length, both = given.xz.shape
    state = given.forward.A_log.shape[1]
    return (2, batch, length, given.forward.x_proj.shape[0]), (2, *states_shape((batch, length, both // 2), state))


def _run(*arguments):
    """Gated output (B, L, D) in xz's dtype; kept for the backward pass, projections (2, B, L, R + 2 N) and states."""
    *flat, keep = arguments
    given = operands.Mixer.of(*flat)
    mixer = _Mixer(given)
    out, x, states = new((mixer.batch, mixer.length, mixer.channels)), new((0,)), new((0,))
    if keep:
        shapes = _kept_shapes(given)
        x, states = new(shapes[0]), new_states(shapes[1], mixer.channels)
    if out.numel():
        kept = list(zip(x, states)) if keep else [(None, None)] * 2
        mixer.call('mixer_forward', out, kept, (_NO_GRADIENTS, _NO_GRADIENTS), None)
    return out.to(given.xz.dtype), x, states


def _fake(*arguments):
    *flat, keep = arguments
    given = operands.Mixer.of(*flat)
    batch, length, both = given.xz.shape
    kept = _kept_shapes(given) if keep else ((0,), (0,))
    out = given.xz.new_empty((batch, length, both // 2))
    return out, *(out.new_empty(shape, dtype=torch.float32) for shape in kept)


def _run_backward(grad, *arguments):
    """Gradients of xz and of the parameters that are there, in their order and dtypes."""
    *tensors, scale, x, states = arguments
    if not grad.numel():
        return [torch.zeros_like(t) for t in present(*tensors)]
    mixer = _Mixer(operands.Mixer.of(*tensors, scale))
    gradients = [None if t is None else new(t.shape) for t in tensors]
    grad_xz, forward, backward, *_ = operands.Mixer.of(*gradients)
    grad = gradient(grad, (*grad_xz.shape[:2], grad_xz.shape[2] // 2))
    mixer.call('mixer_backward', grad, list(zip(x, states)), (forward, backward), grad_xz)
    return [g.to(t.dtype) for g, t in zip(gradients, tensors) if t is not None]


def _backward_fake(grad, *arguments):
    *tensors, scale, x, states = arguments
    return [t.new_empty(t.shape) for t in present(*tensors)]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    _, x, states = output
    ctx.save_for_backward(*tensors, x, states)
    keep_outputs(ctx, x, states)


def _differentiate(ctx, grad, *others):
    *tensors, x, states = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(tensors) + 2)
    found = iter(torch.ops.vim_timm.cpu_mixer_backward.default(grad, *tensors, ctx.scale, x, states))
    return *(None if t is None else next(found) for t in tensors), None, None


_OPERANDS = schema(operands.Mixer, 'out_proj', 'out_bias')
register(
    'cpu_mixer',
    f'({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor)',
    f'(Tensor grad, {_OPERANDS}, Tensor x, Tensor states) -> Tensor[]',
    Kernel(_run, _fake, _save, _differentiate, _run_backward, _backward_fake),
    mixer_flops,
)


def mixer_limit(given: operands.Mixer) -> str:
    if given.backward.conv.shape != given.forward.conv.shape:
        return 'the CPU kernel takes convolutions of the same width in both directions'
    return limit(given.xz, given.forward.A_log)


def mixer(given: operands.Mixer) -> Tensor:
    """`reference.mixer` on the kernel, for any sizes.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16.
        ValueError: another device or shape.
    """
    xz, forward, backward, scale, out_proj, out_bias = given
    tensors = (xz, *forward, *backward)
    y = torch.ops.vim_timm.cpu_mixer.default(*tensors, scale, wants_gradient(tensors))[0]
    return y if out_proj is None else linear(operands.Linear(y, out_proj, out_bias))
