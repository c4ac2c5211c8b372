"""The inside of a Vision Mamba 2 mixer on the CPU kernel: its convolution, its decays, its gated norm.

Matrix products are torch's; the three operators here are what lies between them, each one pass over memory:
`vim_timm::cpu_grid_conv`, `vim_timm::cpu_decayed` and `vim_timm::cpu_gated_norm`.

Shapes: see `ops.operands`.
"""

import struct
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, rows, threads
from vim_timm.ops.plain import ssd as plain
from vim_timm.ops.registration import SSD_CHUNK, SSD_WHOLE, Kernel, Shapes, register, uncounted

# C structures: pointers, Rows of three numbers, integers, one double
_DECAYED = struct.Struct('@13q')
_CONVOLUTION = struct.Struct('@19q')
_NORM = struct.Struct('@8qd7q')
library.expect('Decayed', _DECAYED.size)
library.expect('GridConvolution', _CONVOLUTION.size)
library.expect('GatedNorm', _NORM.size)


# --- decays


def _decayed(
    function: str, given: Tuple[Tensor, Tensor, Tensor], grad: Optional[Tensor], *to: Optional[Tensor]
) -> None:
    s = given[1]
    batch, orders, heads, length = s.shape
    inputs = [checked(name, x.contiguous(), x.shape) for name, x in zip(('scores', 's', 'dt'), given)]
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
    _decayed('decayed_backward', (scores, s, dt), gradient(grad).contiguous(), None, *grads)
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


def ssd(given: operands.Ssd) -> Tensor:
    """`plain.ssd.reference` in float32, in x's dtype: (B, L, H, P)."""
    x, delta, A_log, B, C, D, delta_bias, _, _, moves = given
    if not x.numel():
        return plain.quadratic(given)
    dt, B, C = plain.step_sizes(delta, delta_bias, torch.float32), B.float(), C.float()
    growth, orders = plain.decays(dt, A_log, moves), range(A_log.shape[0])
    visits = [plain.visited(given, order) for order in orders]
    dt = dt / len(orders)
    if x.shape[1] <= SSD_WHOLE:
        return whole(x, dt, [plain.cumulated(growth[order], visits[order]) for order in orders], B, C, D)
    y, v = None, x.float() * dt.unsqueeze(-1)
    for order in orders:
        tokens = visits[order]
        if tokens is None:
            one = chunks(v, growth[order], B, C)
        else:
            one = chunks(*(plain.rows_at(t, tokens) for t in (v, growth[order], B, C)))
            one = plain.rows_at(one, torch.argsort(tokens, dim=1))
        y = one if y is None else y + one
    assert y is not None
    return plain.skip(y, x, D)


def whole(x: Tensor, dt: Tensor, s: List[Tensor], B: Tensor, C: Tensor, D: Optional[Tensor]) -> Tensor:
    """All scores at once, for steps (B, L, H) divided by the number of orders, and s (B, H, L) of each order."""
    scores = torch.matmul(C, B.transpose(1, 2))
    mixed = torch.ops.vim_timm.cpu_decayed.default(scores, torch.stack(s, 1), dt.transpose(1, 2).contiguous())
    return plain.skip(torch.matmul(mixed, x.float().transpose(1, 2)).transpose(1, 2), x, D)


def chunks(v: Tensor, growth: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`plain.ssd.chunks` with the kernel's decays inside a chunk."""
    length = v.shape[1]
    v, s, B, C = plain.cut(v, growth, B, C, SSD_CHUNK)
    scores, each = torch.matmul(C, B.transpose(2, 3)), s.flatten(0, 1)
    mixed = torch.ops.vim_timm.cpu_decayed.default(scores.flatten(0, 1), each.unsqueeze(1), torch.ones_like(each))
    return plain.joined(torch.matmul(mixed.unflatten(0, s.shape[:2]), v), v, s, B, C)[:, :length]


def ssd_limit(given: operands.Ssd) -> str:
    return limit(given.x, given.delta, given.A_log, given.B)


# --- convolution


def _convolution(function: str, given: Any, y: Tensor, grad: Optional[Tensor], grad_taps: Optional[Tensor], silu: bool):
    x, taps, bias, prefix, height, width = given
    batch, length, channels = x.shape
    if prefix + height * width != length:
        raise ValueError(f'{length} tokens are not {prefix} and a grid of {height} x {width}')
    x = checked('x', x if x.stride(-1) == 1 else x.contiguous(), x.shape)
    taps, bias = parameter('taps', taps, (9, channels)), parameter('bias', bias, (channels,))
    if x.numel():
        packed = _CONVOLUTION.pack(
            *rows(x), *rows(y), *rows(grad), address(taps), address(bias), address(grad_taps),
            batch, prefix, height, width, channels, silu, threads(9 * x.numel()),
        )  # fmt: skip
        library.call(function, packed)


def _run_conv(x, taps, bias, prefix, height, width):
    """SiLU of the convolution of a grid behind prefix tokens: x (B, L, X), taps (9, X), bias (X)."""
    y = new(x.shape)
    _convolution('grid_conv_forward', (x, taps, bias, prefix, height, width), y, None, None, True)
    return y


def _run_conv_backward(grad, x, taps, bias, prefix, height, width):
    """Gradients of x and, as (10, X), of taps and bias."""
    before, grad_x, grad_taps = new(x.shape), new(x.shape), new((10, x.shape[-1])).zero_()
    grid = (prefix, height, width)
    _convolution('grid_conv_backward', (x, taps, bias, *grid), before, gradient(grad), grad_taps, True)
    _convolution('grid_conv_forward', (before, taps.flip(0), None, *grid), grad_x, None, None, False)
    return grad_x, grad_taps


def _save_conv(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.grid = inputs[3:]


def _differentiate_conv(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, taps, bias = ctx.saved_tensors
    grad_x, grad_taps = torch.ops.vim_timm.cpu_grid_conv_backward.default(grad, x, taps, bias, *ctx.grid)
    return grad_x, grad_taps[:9], None if bias is None else grad_taps[9], None, None, None


def _conv_flops(shapes: Shapes) -> int:
    batch, length, channels = shapes['x'] or (0, 0, 0)
    return 18 * batch * length * channels


_CONV_OPERANDS = 'Tensor x, Tensor taps, Tensor? bias, int prefix, int height, int width'
register(
    'cpu_grid_conv',
    f'({_CONV_OPERANDS}) -> Tensor',
    f'(Tensor grad, {_CONV_OPERANDS}) -> (Tensor, Tensor)',
    Kernel(
        _run_conv,
        lambda x, *_: x.new_empty(x.shape),
        _save_conv,
        _differentiate_conv,
        _run_conv_backward,
        lambda grad, x, *_: (x.new_empty(x.shape), x.new_empty((10, x.shape[-1]))),
    ),
    _conv_flops,
)


# --- norm and gate


def _norm(function, given, grad, to, grad_weight, grad_z) -> None:
    x, weight, z, eps = given
    x, weight = checked('x', x.contiguous(), x.shape), parameter('weight', weight, x.shape[-1:])
    z = checked('z', z if z.stride(-1) == 1 else z.contiguous(), x.shape)
    if x.numel():
        tensors = (x, weight, grad, to, grad_weight)
        count, width = x.shape[0] * x.shape[1], x.shape[-1]
        packed = _NORM.pack(
            *map(address, tensors), count, width, threads(4 * x.numel()), eps, *rows(z), *rows(grad_z), x.shape[1]
        )
        library.call(function, packed)


def _run_norm(x, weight, z, eps):
    """RMSNorm(x) * SiLU(z), (B, L, D)."""
    y = new(x.shape)
    _norm('gated_norm_forward', (x, weight, z, eps), None, y, None, None)
    return y


def _run_norm_backward(grad, x, weight, z, eps):
    grads = new(x.shape), new(weight.shape).zero_(), new(z.shape)
    _norm('gated_norm_backward', (x, weight, z, eps), gradient(grad).contiguous(), *grads)
    return grads


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


register(
    'cpu_gated_norm',
    '(Tensor x, Tensor weight, Tensor z, float eps) -> Tensor',
    '(Tensor grad, Tensor x, Tensor weight, Tensor z, float eps) -> (Tensor, Tensor, Tensor)',
    Kernel(
        _run_norm,
        lambda x, *_: x.new_empty(x.shape),
        _save_norm,
        lambda ctx, grad: (*torch.ops.vim_timm.cpu_gated_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None),
        _run_norm_backward,
        lambda grad, x, weight, z, eps: tuple(t.new_empty(t.shape) for t in (x, weight, z)),
    ),
    uncounted,
)


# --- all of it


def grid_mixer_limit(given: operands.GridMixer) -> str:
    return limit(given.zxbcdt, given.conv, given.A_log, given.norm)


def grid_sums(given: operands.GridMixer, dt: Tensor) -> List[Tensor]:
    """s (B, H, L) of each order: nothing at prefix tokens, then along the grid's rows or columns."""
    growth = dt[:, given.prefix :].transpose(1, 2).unsqueeze(1) * given.A_log.float().exp().unsqueeze(
        -1
    )  # (B, O, H, L)
    found = []
    for order in range(given.A_log.shape[0]):
        if order == 0 and given.rows:
            s = growth[:, order].cumsum(-1)
        else:
            grid = growth[:, order].unflatten(-1, (given.height, given.width)).transpose(2, 3)
            s = grid.flatten(2).cumsum(-1).unflatten(-1, (given.width, given.height)).transpose(2, 3).flatten(2)
        found.append(F.pad(s, [given.prefix, 0]) if given.prefix else s)
    return found


def grid_mixer(given: operands.GridMixer) -> Tensor:
    """The gated norm of the state space dual of convolved tokens (B, L, D), in zxbcdt's dtype, computed in float32."""
    dim, state, heads = given.norm.shape[0], given.state, given.A_log.shape[1]
    zxbcdt = given.zxbcdt.float()[..., : 2 * dim + 2 * state + heads]
    z, xbc, delta = zxbcdt.split([dim, dim + 2 * state, heads], -1)
    grid = (given.prefix, given.height, given.width)
    bias = None if given.conv_bias is None else given.conv_bias.float()
    xbc = torch.ops.vim_timm.cpu_grid_conv.default(xbc, given.conv.float().t().contiguous(), bias, *grid)
    x, B, C = xbc.split([dim, state, state], -1)
    x = x.unflatten(-1, (heads, dim // heads))
    if x.shape[1] <= SSD_WHOLE:
        dt = plain.step_sizes(delta, given.delta_bias, torch.float32)
        y = whole(x, dt / given.A_log.shape[0], grid_sums(given, dt), B, C, given.D)
    else:
        tokens, moves = torch.arange(x.shape[1], device=x.device), None
        columns = tokens[given.prefix :].view(given.height, given.width).t().reshape(-1)
        columns = torch.cat([tokens[: given.prefix], columns]).unsqueeze(0)
        if given.prefix:
            moves = (tokens >= given.prefix).float()
        visits = given.rows, None if given.rows and given.A_log.shape[0] == 1 else columns
        y = ssd(operands.Ssd(x, delta, given.A_log, B, C, given.D, given.delta_bias, *visits, moves))
    out = torch.ops.vim_timm.cpu_gated_norm.default(y.flatten(2), given.norm.float(), z, given.eps)
    return out.to(given.zxbcdt.dtype)
