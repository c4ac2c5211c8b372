"""The symmetric state space dual on the CPU kernel.

For inference it is one operator, `vim_timm::cpu_dual`, without a matrix of scores in memory; where gradients are wanted
it is matrix products of torch's around `vim_timm::cpu_decayed`, the decays times the scores.

Shapes: see `ops.operands`.
"""

import struct
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, present, rows, threads
from vim_timm.ops.plain import ssd as plain
from vim_timm.ops.registration import (
    SSD_CHUNK,
    SSD_WHOLE,
    Kernel,
    Shapes,
    register,
    register_inference,
    ssd_flops,
    uncounted,
    wants_gradient,
)

# C structures: pointers, Rows of three numbers, integers
_DECAYED = struct.Struct('@13q')
_DUAL = struct.Struct('@27q')
library.expect('Decayed', _DECAYED.size)
library.expect('Dual', _DUAL.size)


def _check_orders(name: str, orders: int) -> None:
    if orders not in (1, 2):
        raise ValueError(f'{name} is of {orders} orders of tokens, not of one or two')


# --- decays times scores


def _decayed(
    function: str, given: Tuple[Tensor, Tensor, Tensor], grad: Optional[Tensor], *to: Optional[Tensor]
) -> None:
    s = given[1]
    batch, orders, heads, length = s.shape
    _check_orders('s', orders)
    shapes = (batch, length, length), s.shape, (batch, heads, length)
    inputs = [checked(*one) for one in zip(('scores', 's', 'dt'), (x.contiguous() for x in given), shapes)]
    work = batch * orders * heads * length * length
    tensors = (*inputs, grad, *to)
    if s.numel():
        library.call(function, _DECAYED.pack(*map(address, tensors), batch, orders, heads, length, threads(work)))


def _run_decayed(scores: Tensor, s: Tensor, dt: Tensor) -> Tensor:
    """Scores (B, L, L) times steps (B, H, L) of their columns and the sum of all orders' decays of s (B, O, H, L)."""
    out = new((*dt.shape, dt.shape[-1]))
    _decayed('decayed_forward', (scores, s, dt), None, out, None, None, None)
    return out


def _run_decayed_backward(grad: Tensor, scores: Tensor, s: Tensor, dt: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    grads = new(scores.shape), new(s.shape), new(dt.shape)
    grad = gradient(grad.contiguous(), (*dt.shape, dt.shape[-1]))
    _decayed('decayed_backward', (scores, s, dt), grad, None, *grads)
    return grads


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


register(
    'cpu_decayed',
    '(Tensor scores, Tensor s, Tensor dt) -> Tensor',
    '(Tensor grad, Tensor scores, Tensor s, Tensor dt) -> (Tensor, Tensor, Tensor)',
    Kernel(
        _run_decayed,
        lambda scores, s, dt: dt.new_empty((*dt.shape, dt.shape[-1])),
        _save,
        lambda ctx, grad: torch.ops.vim_timm.cpu_decayed_backward.default(grad, *ctx.saved_tensors),
        _run_decayed_backward,
        lambda grad, scores, s, dt: tuple(x.new_empty(x.shape) for x in (scores, s, dt)),
    ),
    uncounted,
)


def _order(tokens: Tensor, batch: int, length: int) -> Tensor:
    if tokens.dtype != torch.int64 or tokens.shape not in ((1, length), (batch, length)) or not tokens.is_cpu:
        what = f'{tokens.dtype} {list(tokens.shape)} on {tokens.device}'
        raise ValueError(f'an order of {batch} x {length} tokens is not {what}')
    return tokens.contiguous()


# --- as one operator, which keeps nothing for a backward pass


def _run(
    x: Tensor,
    dt: Tensor,
    growth: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    first: Optional[Tensor],
    second: Optional[Tensor],
) -> Tensor:
    """The dual of x (B, L, H, P) for steps divided by the number of orders (B, L, H), growth of s (B, O, L, H), and the
    places of the tokens (1 or B, L) as orders meet them, None for 0 to L - 1."""
    batch, length, heads, headdim = x.shape
    orders, state = growth.shape[1], B.shape[-1]
    _check_orders('growth', orders)
    x = checked('x', x.flatten(2), (batch, length, heads * headdim))
    B, C = (checked(name, X, (batch, length, state)) for name, X in (('B', B), ('C', C)))
    small = [
        parameter('dt', dt, (batch, length, heads)),
        parameter('growth', growth, (batch, orders, length, heads)),
        parameter('D', D, (heads,)),
    ]
    visits = [None if tokens is None else _order(tokens, batch, length) for tokens in (first, second)]
    y = new(x.shape)
    if x.numel():
        chunk = length if length <= SSD_WHOLE else SSD_CHUNK
        strides = [0 if tokens is None or len(tokens) < batch else length for tokens in visits]
        packed = _DUAL.pack(
            *rows(x), *rows(B), *rows(C), *rows(y), *map(address, (*small, *visits)), *strides,
            batch, length, heads, headdim, state, orders, threads(batch * length * chunk * heads * headdim), chunk,
        )  # fmt: skip
        if library.call('dual_forward', packed):
            raise ValueError(f'an order of {length} tokens does not meet each of them once')
    return y.unflatten(-1, (heads, headdim))


def _flops(shapes: Shapes) -> int:
    growth = shapes['growth']
    return ssd_flops({**shapes, 'A_log': None if growth is None else growth[1:2]})


register_inference(
    'cpu_dual',
    '(Tensor x, Tensor dt, Tensor growth, Tensor B, Tensor C, Tensor? D, Tensor? first, Tensor? second) -> Tensor',
    _run,
    lambda x, *_: x.new_empty(x.shape, dtype=torch.float32),
    _flops,
)


# --- as products of matrices, which autograd differentiates


def _composition(x, dt, growth, B, C, D, *visits):
    x, B, C = x.float(), B.float(), C.float()
    if x.shape[1] <= SSD_WHOLE:
        scores = torch.matmul(C, B.transpose(1, 2))
        s = torch.stack([plain.cumulated(growth[:, o], visits[o]) for o in range(growth.shape[1])], 1)
        mixed = torch.ops.vim_timm.cpu_decayed.default(scores, s, dt.transpose(1, 2).contiguous())
        y = torch.matmul(mixed, x.transpose(1, 2)).transpose(1, 2)
    else:
        v = x * dt.unsqueeze(-1)
        y = torch.zeros_like(v)
        for o in range(growth.shape[1]):
            tokens, given = visits[o], (v, growth[:, o], B, C)
            if tokens is None:
                y = y + _chunks(*given)
            else:
                one = _chunks(*(plain.rows_at(t, tokens) for t in given))
                y = y + plain.rows_at(one, torch.argsort(tokens, dim=1))
    return plain.skip(y, x, D)


def _chunks(v: Tensor, growth: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`plain.ssd.chunks` with the kernel's decays inside a chunk."""
    length = v.shape[1]
    v, s, B, C = plain.cut(v, growth, B, C, SSD_CHUNK)
    scores, each = torch.matmul(C, B.transpose(2, 3)), s.flatten(0, 1)
    mixed = torch.ops.vim_timm.cpu_decayed.default(scores.flatten(0, 1), each.unsqueeze(1), torch.ones_like(each))
    return plain.joined(torch.matmul(mixed.unflatten(0, s.shape[:2]), v), v, s, B, C)[:, :length]


# --- what is chosen


def ssd(given: operands.Ssd) -> Tensor:
    """`plain.ssd.reference` in float32, in x's dtype: (B, L, H, P)."""
    x, delta, A_log, B, C, D, delta_bias, _, _, moves = given
    if x.numel() == 0:  # `not` of a size makes torch 2.6's export take it for a constant
        return plain.quadratic(given)
    dt, orders = plain.step_sizes(delta, delta_bias, torch.float32), len(A_log)
    growth = plain.decays(dt, A_log, moves).transpose(0, 1)
    visits = [plain.visited(given, o) if o < orders else None for o in range(2)]
    tensors = x, dt / orders, growth, B, C, D
    learns = wants_gradient(tensors)
    run = _composition if learns else torch.ops.vim_timm.cpu_dual.default
    return run(*tensors, *visits).to(x.dtype)


def ssd_limit(given: operands.Ssd) -> str:
    return limit(*present(given.x, given.delta, given.A_log, given.B, given.C, given.D))
