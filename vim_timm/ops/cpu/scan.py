"""The bidirectional selective scan as a torch operator, `vim_timm::cpu_scan`, with its backward pass.

Shapes: see `ops.operands`.
"""

import struct
from typing import Optional, Sequence

import torch
from torch import Tensor

from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, present, rows, threads
from vim_timm.ops.operands import Direction, Scan, schema
from vim_timm.ops.plain import reference
from vim_timm.ops.registration import Kernel, keep_outputs, register, scan_flops, wants_gradient

_CHUNK = 64  # tokens between two kept states
_PADDING = 16  # the kept states' channels are padded to a multiple of it
library.expect('CHUNK', _CHUNK)
library.expect('PADDING', _PADDING)
library.expect('FASTEST / 2^64', round(reference.FASTEST / 2**64))

# The C structure Scan: two directions, three Rows, eight integers, one double.
_STRUCT = struct.Struct('@79qd')
library.expect('Scan', _STRUCT.size)
_NO_GRADIENTS = (0,) * 15
_NO_DIRECTION = (0,) * 31


def _direction(direction: Direction, suffix: str, shape: torch.Size, state: int) -> Direction:
    """One direction's tensors, checked and in float32."""
    batch, length, channels = shape
    shapes = (shape, shape, (channels, state), (batch, length, state), (batch, length, state), (channels,), (channels,))
    taken: list[Optional[Tensor]] = []
    for name, x, expected in zip(Direction._fields, direction, shapes):
        if len(expected) == 3:
            if x is None:
                raise ValueError(f'{name}{suffix} is missing: a direction needs u, delta, A_log, B and C')
            taken.append(checked(name + suffix, x, expected))
        else:
            taken.append(parameter(name + suffix, x, expected))
    return Direction(*taken)  # type: ignore[arg-type]


def _checked(scan: Scan) -> Scan:
    u, A = scan.forward.u, scan.forward.A_log
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f'u must be (B, L, D) and A_log (D, N), not {tuple(u.shape)} and {tuple(A.shape)}')
    state, backward = A.shape[1], scan.backward
    return scan._replace(
        forward=_direction(scan.forward, '', u.shape, state),
        backward=None if backward is None else _direction(backward, '_b', u.shape, state),
        z=None if scan.z is None else checked('z', scan.z, u.shape),
    )


def _fields(direction: Direction, states: Optional[Tensor]) -> tuple[int, ...]:
    """The first half of the C structure Direction."""
    u, delta, A, B, C, D, bias = direction
    return (*rows(u), *rows(delta), *rows(B), *rows(C), address(A), address(D), address(bias), address(states))


def _gradient_fields(gradients: Direction) -> tuple[int, ...]:
    """The second half of the C structure Direction."""
    u, delta, A, B, C, D, bias = gradients
    return (*rows(u), *rows(delta), *rows(B), *rows(C), address(A), address(D), address(bias))


def states_shape(shape: Sequence[int], state: int) -> tuple[int, int, int, int]:
    """Shape of the states that a direction of a scan of (B, L, D) keeps: one before every chunk but the first."""
    batch, length, channels = shape
    return batch, max(length - 1, 0) // _CHUNK, state, -(-channels // _PADDING) * _PADDING


def new_states(shape: Sequence[int], channels: int) -> Tensor:
    """Memory for states. Narrow vectors leave some of the padding alone: two runs must still return equal tensors."""
    return new(shape).zero_() if channels % _PADDING else new(shape)


def _fake(*arguments):
    *flat, keep = arguments
    scan = Scan.of(*flat)
    u, A = scan.forward.u, scan.forward.A_log
    kept = (keep, keep and scan.backward is not None)
    shapes = [states_shape(u.shape, A.shape[1]) if this else (0,) for this in kept]
    return u.new_empty(u.shape), *(u.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _run(*arguments):
    """Result (B, L, D) in u's dtype, and each direction's states between chunks of tokens, if they are kept."""
    *flat, keep = arguments
    given = Scan.of(*flat)
    scan = _checked(given)
    shape, state = scan.forward.u.shape, scan.forward.A_log.shape[1]
    directions = [direction for direction in (scan.forward, scan.backward) if direction is not None]
    out = new(shape)
    kept = states_shape(shape, state)
    states = [new_states(kept if keep and i < len(directions) else (0,), shape[2]) for i in range(2)]
    if out.numel():
        fields = []
        for direction, own in zip(directions, states):
            fields += [*_fields(direction, own if keep else None), *_NO_GRADIENTS]
        library.call('scan_forward', _pack(fields, scan, out, None))
    return out.to(given.forward.u.dtype), *states


def _pack(fields: list[int], scan: Scan, out: Tensor, grad_z: Optional[Tensor]) -> bytes:
    forward, backward, z, scale, softplus, log_A = scan
    count, state = 1 + (backward is not None), forward.A_log.shape[1]
    return _STRUCT.pack(
        *fields, *(_NO_DIRECTION if backward is None else ()), *rows(z), *rows(out), *rows(grad_z),
        count, *forward.u.shape, state, softplus, log_A, threads(forward.u.numel() * state * count), scale,
    )  # fmt: skip


def _backward_fake(grad, *arguments):
    *tensors, scale, softplus, log_A, states, states_b = arguments
    return [x.new_empty(x.shape) for x in present(*tensors)]


def _run_backward(grad, *arguments):
    """Gradients of the tensors that are there, in their order and dtypes."""
    *tensors, scale, softplus, log_A, states, states_b = arguments
    given = Scan.of(*tensors, scale, softplus, log_A)
    if not given.forward.u.numel() or not given.forward.A_log.numel():
        return [torch.zeros_like(x) for x in present(*tensors)]
    scan = _checked(given)
    gradients = [None if x is None else new(x.shape) for x in tensors]
    own = Scan.of(*gradients)
    fields = [*_fields(scan.forward, states), *_gradient_fields(own.forward)]
    if scan.backward is not None and own.backward is not None:
        fields += [*_fields(scan.backward, states_b), *_gradient_fields(own.backward)]
    grad = gradient(grad, given.forward.u.shape)  # a copy has to live until the call has ended, as those in `scan` do
    library.call('scan_backward', _pack(fields, scan, grad, own.z))
    return [g.to(x.dtype) for g, x in zip(gradients, tensors) if x is not None]


def _save(ctx, inputs, output) -> None:
    *tensors, scale, softplus, log_A, _ = inputs
    _, states, states_b = output
    ctx.save_for_backward(*tensors, states, states_b)
    ctx.flags = (scale, softplus, log_A)
    keep_outputs(ctx, states, states_b)


def _differentiate(ctx, grad, *states_grads):
    *inputs, states, states_b = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(inputs) + len(ctx.flags) + 1)
    found = iter(torch.ops.vim_timm.cpu_scan_backward.default(grad, *inputs, *ctx.flags, states, states_b))
    return *(None if x is None else next(found) for x in inputs), *(None for _ in ctx.flags), None


register(
    'cpu_scan',
    f'({schema(Scan)}, bool keep_states) -> (Tensor, Tensor, Tensor)',
    f'(Tensor grad, {schema(Scan)}, Tensor states, Tensor states_b) -> Tensor[]',
    Kernel(_run, _fake, _save, _differentiate, _run_backward, _backward_fake),
    scan_flops,
)


def scan_limit(scan: Scan) -> str:
    return limit(scan.forward.u, scan.forward.A_log)


def scan(given: Scan) -> Tensor:
    """`reference.scan` on the kernel."""
    flat = given.flat()
    return torch.ops.vim_timm.cpu_scan.default(*flat, wants_gradient(flat))[0]
