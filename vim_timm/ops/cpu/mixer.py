"""The inside of a bidirectional Mamba block as one torch operator, `vim_timm::cpu_mixer`.

The kernel computes batch entries a few at a time: what lies between the convolution and the gate stays in cache and is
never kept. The backward pass computes the convolutions and the step sizes again, from xz and the projections.

Shapes: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank, W convolution width.
"""

import struct
from typing import Any, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.scan import new_states, states_shape
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

# The C structure Mixer: two directions of sixteen pointers, five Rows, seven integers, one double.
_STRUCT = struct.Struct('@54qd')
library.expect('Mixer', _STRUCT.size)
_PARAMETERS = (
    'Tensor conv{0}, Tensor? conv_bias{0}, Tensor x_proj{0}, Tensor dt{0}, Tensor? dt_bias{0}, '
    'Tensor A_log{0}, Tensor D{0}'
)
_OPERANDS = f'Tensor xz, {_PARAMETERS.format("")}, {_PARAMETERS.format("_b")}, float scale'
_PER_DIRECTION = 7
_definitions = torch.library.Library('vim_timm', 'FRAGMENT')
_definitions.define(f'cpu_mixer({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor)')
_definitions.define(f'cpu_mixer_backward(Tensor grad, {_OPERANDS}, Tensor x, Tensor states) -> Tensor[]')


class _Direction(NamedTuple):
    """One direction's parameters, or their gradients."""

    conv: Tensor  # (D, W)
    conv_bias: Optional[Tensor]  # (D)
    x_proj: Tensor  # (R + 2 N, D)
    dt: Tensor  # (D, R)
    dt_bias: Optional[Tensor]  # (D)
    A_log: Tensor  # (D, N)
    D: Tensor  # (D)


_NO_GRADIENTS = _Direction._make((None,) * _PER_DIRECTION)


class _Mixer:
    """The operands as the kernel takes them."""

    def __init__(self, xz: Tensor, *operands) -> None:
        if xz.dim() != 3 or xz.shape[2] % 2:
            raise ValueError(f'xz must be (B, L, 2 D), not {tuple(xz.shape)}')
        self.xz = checked('xz', xz if xz.stride(2) == 1 else xz.contiguous(), xz.shape)
        self.batch, self.length, both = xz.shape
        self.channels = both // 2
        self.state, self.rank = operands[5].shape[1], operands[3].shape[1]
        forward, backward, self.scale = operands[:_PER_DIRECTION], operands[_PER_DIRECTION:-1], operands[-1]
        self.directions = [self._direction(forward, ''), self._direction(backward, '_b')]

    def _direction(self, operands: Sequence[Any], suffix: str) -> _Direction:
        channels, row = self.channels, self.rank + 2 * self.state
        shapes = (
            (channels, operands[0].shape[1]), (channels,), (row, channels), (channels, self.rank), (channels,),
            (channels, self.state), (channels,),
        )  # fmt: skip
        named = zip(_Direction._fields, operands, shapes)
        return _Direction._make(parameter(name + suffix, x, shape) for name, x, shape in named)

    def call(
        self,
        function: str,
        out: Tensor,
        kept: Sequence[Sequence[Optional[Tensor]]],
        gradients: Sequence[_Direction],
        grad_xz: Optional[Tensor],
    ) -> None:
        """Runs the kernel; `kept` holds each direction's projections and states."""
        pointers = [address(x) for i in range(2) for x in (*self.directions[i], *kept[i], *gradients[i])]
        halves = [*self.xz.split(self.channels, 2)]
        grad_x, grad_z = (None, None) if grad_xz is None else grad_xz.split(self.channels, 2)
        tensors = (*halves, out, grad_x, grad_z)
        packed = _STRUCT.pack(
            *pointers, *(field for x in tensors for field in rows(x)),
            self.batch, self.length, self.channels, self.state, self.rank, self.directions[0].conv.shape[1],
            threads(out.numel() * self.state), self.scale,
        )  # fmt: skip
        library.call(function, packed)


def _kept_shapes(shape: Sequence[int], x_proj: Tensor, A_log: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What both directions keep for the backward pass of an output (B, L, D): projections and states."""
    return (2, *shape[:2], x_proj.shape[0]), (2, *states_shape(shape, A_log.shape[1]))


def _run(*operands):
    """Gated output (B, L, D) in xz's dtype; kept for the backward pass, projections (2, B, L, R + 2 N) and states."""
    *operands, keep = operands
    mixer = _Mixer(*operands)
    shape = mixer.batch, mixer.length, mixer.channels
    out, x, states = torch.empty(shape), torch.empty(0), torch.empty(0)
    if keep:
        shapes = _kept_shapes(shape, operands[3], operands[6])
        x, states = torch.empty(shapes[0]), new_states(shapes[1], mixer.channels)
    if out.numel():
        kept = list(zip(x, states)) if keep else [(None, None)] * 2
        mixer.call('mixer_forward', out, kept, (_NO_GRADIENTS, _NO_GRADIENTS), None)
    return out.to(operands[0].dtype), x, states


def _fake(xz, *operands):
    shape = *xz.shape[:2], xz.shape[2] // 2
    kept = _kept_shapes(shape, operands[2], operands[5]) if operands[-1] else ((0,), (0,))
    return xz.new_empty(shape), *(xz.new_empty(x, dtype=torch.float32) for x in kept)


def _run_backward(grad, *operands):
    """Gradients of xz and of the parameters that are there, in their order and dtypes."""
    *operands, x, states = operands
    tensors = operands[:-1]
    if not grad.numel():
        return [torch.zeros_like(t) for t in present(*tensors)]
    mixer = _Mixer(*operands)
    gradients = [None if t is None else torch.empty(t.shape) for t in tensors]
    forward, backward = gradients[1 : 1 + _PER_DIRECTION], gradients[1 + _PER_DIRECTION :]
    own = _Direction._make(forward), _Direction._make(backward)
    mixer.call('mixer_backward', gradient(grad), list(zip(x, states)), own, gradients[0])
    return [g.to(t.dtype) for g, t in zip(gradients, tensors) if t is not None]


def _backward_fake(grad, *operands):
    return [x.new_empty(x.shape) for x in present(*operands[:-3])]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    _, x, states = output
    ctx.save_for_backward(*tensors, x, states)
    ctx.mark_non_differentiable(x, states)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *others):
    *tensors, x, states = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(tensors) + 2)
    found = iter(torch.ops.vim_timm.cpu_mixer_backward(grad, *tensors, ctx.scale, x, states))
    return *(None if t is None else next(found) for t in tensors), None, None


register(
    _definitions, 'cpu_mixer', _run, _fake, _save, _differentiate, _run_backward, _backward_fake,
    refuse_second_derivative,
)  # fmt: skip


@register_flop_formula(torch.ops.vim_timm.cpu_mixer)
def mixer_flops(xz, conv, conv_bias, x_proj, dt, dt_bias, A_log, *others, out_shape=None, **kwargs) -> int:
    """The sum over the operators of the composition."""
    batch, length, both = xz
    channels, state = A_log
    products = conv[1] + x_proj[0] + dt[1]
    return batch * length * channels * (2 * 2 * products + 2 * 9 * state + 2)


@register_flop_formula(torch.ops.vim_timm.cpu_mixer_backward)
def mixer_backward_flops(grad, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * mixer_flops(*shapes)


def mixer(
    xz: Tensor,
    conv: Tensor,
    conv_bias: Optional[Tensor],
    x_proj: Tensor,
    dt: Tensor,
    dt_bias: Optional[Tensor],
    A_log: Tensor,
    D: Tensor,
    conv_b: Tensor,
    conv_bias_b: Optional[Tensor],
    x_proj_b: Tensor,
    dt_b: Tensor,
    dt_bias_b: Optional[Tensor],
    A_b_log: Tensor,
    D_b: Tensor,
    scale: float,
    out_proj: Optional[Tensor] = None,
    out_bias: Optional[Tensor] = None,
) -> Tensor:
    """`ops.cuda.mixer` on the CPU kernel: same arguments, same result, for any sizes.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16.
        ValueError: another device or shape.
    """
    tensors = (
        xz, conv, conv_bias, x_proj, dt, dt_bias, A_log, D,
        conv_b, conv_bias_b, x_proj_b, dt_b, dt_bias_b, A_b_log, D_b,
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y = torch.ops.vim_timm.cpu_mixer(*tensors, scale, keep)[0]
    return y if out_proj is None else F.linear(y, out_proj, out_bias)
