"""The bidirectional selective scan as a torch operator, `vim_timm::cpu_scan`, with its backward pass.

Shapes: B batch, L tokens, D channels (d_inner), N state (d_state). A direction's tensors come in the order u (B, L, D),
delta (B, L, D), A (D, N), B (B, L, N), C (B, L, N), D (D) or None, delta_bias (D) or None.
"""

import struct
from typing import Optional, Sequence

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

_CHUNK = 64  # tokens between two kept states
_PADDING = 16  # the kept states' channels are padded to a multiple of it
library.expect('CHUNK', _CHUNK)
library.expect('PADDING', _PADDING)
_NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
_PER_DIRECTION = len(_NAMES)
_Z = 2 * _PER_DIRECTION  # position of z among the arguments

# The C structure Scan: two directions, three Rows, eight integers, one double.
_STRUCT = struct.Struct('@79qd')
library.expect('Scan', _STRUCT.size)
_NO_GRADIENTS = (0,) * 15
_NO_DIRECTION = (0,) * 31

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, '
    'Tensor? u_b, Tensor? delta_b, Tensor? A_b, Tensor? B_b, Tensor? C_b, Tensor? D_b, Tensor? delta_bias_b, Tensor? z'
)
_FLAGS = 'float scale, bool delta_softplus, bool A_is_log'
_definitions = torch.library.Library('vim_timm', 'FRAGMENT')
_definitions.define(f'cpu_scan({_INPUTS}, {_FLAGS}, bool keep_states) -> (Tensor, Tensor, Tensor)')
_definitions.define(
    f'cpu_scan_backward(Tensor grad, {_INPUTS}, {_FLAGS}, Tensor states, Tensor states_b) -> Tensor[]',
)


def _direction(
    inputs: Sequence[Optional[Tensor]], suffix: str, shape: torch.Size, state: int
) -> list[Optional[Tensor]]:
    """One direction's tensors, checked and in float32."""
    batch, length, channels = shape
    shapes = (shape, shape, (channels, state), (batch, length, state), (batch, length, state), (channels,), (channels,))
    taken: list[Optional[Tensor]] = []
    for name, x, expected in zip(_NAMES, inputs, shapes):
        if len(expected) == 3:
            if x is None:
                raise ValueError(f'{name}{suffix} is missing: a direction needs u, delta, A, B and C')
            taken.append(checked(name + suffix, x, expected))
        else:
            taken.append(parameter(name + suffix, x, expected))
    return taken


def _directions(inputs: Sequence[Optional[Tensor]]) -> list[list[Optional[Tensor]]]:
    u, A = inputs[0], inputs[2]
    assert u is not None and A is not None
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f'u must be (B, L, D) and A (D, N), not {tuple(u.shape)} and {tuple(A.shape)}')
    forward = _direction(inputs[:_PER_DIRECTION], '', u.shape, A.shape[1])
    if inputs[_PER_DIRECTION] is None:
        return [forward]
    return [forward, _direction(inputs[_PER_DIRECTION:_Z], '_b', u.shape, A.shape[1])]


def _fields(direction: Sequence[Optional[Tensor]], states: Optional[Tensor]) -> tuple[int, ...]:
    """The first half of the C structure Direction."""
    u, delta, A, B, C, D, bias = direction
    return (*rows(u), *rows(delta), *rows(B), *rows(C), address(A), address(D), address(bias), address(states))


def states_shape(shape: Sequence[int], state: int) -> tuple[int, int, int, int]:
    """Shape of the states that a direction of a scan of (B, L, D) keeps: one before every chunk but the first."""
    batch, length, channels = shape
    return batch, max(length - 1, 0) // _CHUNK, state, -(-channels // _PADDING) * _PADDING


def new_states(shape: Sequence[int], channels: int) -> Tensor:
    """Memory for states. Narrow vectors leave some of the padding alone: two runs must still return equal tensors."""
    return torch.zeros(shape) if channels % _PADDING else torch.empty(shape)


def _fake(*arguments):
    u, A, u_b, keep = arguments[0], arguments[2], arguments[_PER_DIRECTION], arguments[-1]
    shapes = [states_shape(u.shape, A.shape[1]) if kept else (0,) for kept in (keep, keep and u_b is not None)]
    return u.new_empty(u.shape), *(u.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _run(*arguments):
    """Result (B, L, D) in u's dtype, and each direction's states between chunks of tokens, if they are kept."""
    u, A, z = arguments[0], arguments[2], arguments[_Z]
    scale, softplus, log_A, keep = arguments[_Z + 1 :]
    directions = _directions(arguments[:_Z])
    z = None if z is None else checked('z', z, u.shape)
    out = torch.empty(u.shape)
    shape = states_shape(u.shape, A.shape[1])
    states = [new_states(shape if keep and i < len(directions) else (0,), u.shape[2]) for i in range(2)]
    if out.numel():
        fields = []
        for direction, kept in zip(directions, states):
            fields += _fields(direction, kept if keep else None) + _NO_GRADIENTS
        library.call('scan_forward', _pack(fields, directions, u, A, z, out, None, scale, softplus, log_A))
    return out.to(u.dtype), *states


def _pack(fields, directions, u, A, z, out, grad_z, scale, softplus, log_A) -> bytes:
    if len(directions) == 1:
        fields += _NO_DIRECTION
    count, state = len(directions), A.shape[1]
    team = threads(u.numel() * state * count)
    return _STRUCT.pack(
        *fields, *rows(z), *rows(out), *rows(grad_z), count, *u.shape, state, softplus, log_A, team, scale
    )


def _backward_fake(grad, *arguments):
    return [x.new_empty(x.shape) for x in present(*arguments[: _Z + 1])]


def _run_backward(grad, *arguments):
    """Gradients of the tensors that are there, in their order and dtypes."""
    inputs = arguments[: _Z + 1]
    u, A, z = inputs[0], inputs[2], inputs[_Z]
    scale, softplus, log_A, states, states_b = arguments[_Z + 1 :]
    if not u.numel() or not A.numel():
        return [torch.zeros_like(x) for x in present(*inputs)]
    directions = _directions(inputs[:_Z])
    gradients = [None if x is None else torch.empty(x.shape) for x in inputs]
    fields = []
    for i, (direction, kept) in enumerate(zip(directions, (states, states_b))):
        own = gradients[i * _PER_DIRECTION : (i + 1) * _PER_DIRECTION]
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = own
        fields += _fields(direction, kept) + rows(grad_u) + rows(grad_delta) + rows(grad_B) + rows(grad_C)
        fields += [address(x) for x in (grad_A, grad_D, grad_bias)]
    z = None if z is None else checked('z', z, u.shape)
    grad = gradient(grad)
    packed = _pack(fields, directions, u, A, z, grad, gradients[_Z], scale, softplus, log_A)
    library.call('scan_backward', packed)
    return [g.to(x.dtype) for g, x in zip(gradients, inputs) if x is not None]


def _save(ctx, inputs, output) -> None:
    _, states, states_b = output
    ctx.save_for_backward(*inputs[: _Z + 1], states, states_b)
    ctx.flags = inputs[_Z + 1 : -1]
    ctx.mark_non_differentiable(states, states_b)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *states_grads):
    *inputs, states, states_b = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(inputs) + len(ctx.flags) + 1)
    found = iter(torch.ops.vim_timm.cpu_scan_backward(grad, *inputs, *ctx.flags, states, states_b))
    return *(None if x is None else next(found) for x in inputs), *(None for _ in ctx.flags), None


register(
    _definitions, 'cpu_scan', _run, _fake, _save, _differentiate, _run_backward, _backward_fake,
    refuse_second_derivative,
)  # fmt: skip


@register_flop_formula(torch.ops.vim_timm.cpu_scan)
def scan_flops(*shapes, out_shape=None, **kwargs) -> int:
    """9 operations a state and token, and 2 for the skip and the gate: the count usual in the field."""
    (batch, length, channels), (_, state) = shapes[0], shapes[2]
    skip = (shapes[5] is not None) + (shapes[_Z] is not None)
    return batch * length * channels * ((9 * state) * (1 + (shapes[_PER_DIRECTION] is not None)) + skip)


@register_flop_formula(torch.ops.vim_timm.cpu_scan_backward)
def scan_backward_flops(grad_shape, *shapes, out_shape=None, **kwargs) -> int:
    return 2 * scan_flops(*shapes)


def scan(*arguments):
    """`ops.reference.scan` on the kernel: same arguments, same result."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[: _Z + 1])
    return torch.ops.vim_timm.cpu_scan(*arguments, keep)[0]
