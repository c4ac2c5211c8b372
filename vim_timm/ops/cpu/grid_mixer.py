"""The inside of a Vision Mamba 2 mixer on the CPU kernel: its convolution and its gated norm around the state space.

Each is one pass over memory: `vim_timm::cpu_grid_conv` and `vim_timm::cpu_gated_norm`.

Shapes: see `ops.operands`.
"""

import struct
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.cpu import library
from vim_timm.ops.cpu.linear import linear
from vim_timm.ops.cpu.ssd import ssd
from vim_timm.ops.cpu.tensors import address, checked, gradient, limit, new, parameter, present, rows, threads
from vim_timm.ops.registration import Kernel, register, uncounted

# C structures: pointers, Rows of three numbers, integers, one double
_CONVOLUTION = struct.Struct('@21q')
_NORM = struct.Struct('@8qd7q')
library.expect('GridConvolution', _CONVOLUTION.size)
library.expect('GatedNorm', _NORM.size)


# --- convolution


def _convolution(function: str, given: Any, y: Tensor, grad: Optional[Tensor], grad_taps: Optional[Tensor], silu: bool):
    x, taps, bias, prefix, height, width, keep = given
    batch, length, channels = x.shape
    if keep is None and prefix + height * width != length:
        raise ValueError(f'{length} tokens are not {prefix} and a grid of {height} x {width}')
    kept = -1
    if keep is not None:
        kept = length - prefix
        if keep.shape != (batch, kept) or keep.dtype != torch.int64 or not keep.is_cpu:
            what = f'{keep.dtype} {list(keep.shape)} on {keep.device}'
            raise ValueError(f'places of {batch} x {kept} tokens on a grid are not {what}')
        keep = keep.contiguous()
    x = checked('x', x if x.stride(-1) == 1 else x.contiguous(), x.shape)
    taps, bias = parameter('taps', taps, (9, channels)), parameter('bias', bias, (channels,))
    if x.numel():
        packed = _CONVOLUTION.pack(
            *rows(x), *rows(y), *rows(grad), address(taps), address(bias), address(grad_taps),
            address(keep), kept, batch, prefix, height, width, channels, silu, threads(9 * x.numel()),
        )  # fmt: skip
        if library.call(function, packed):
            raise ValueError(f'places of tokens do not ascend, or leave a grid of {height} x {width}')


def _run_conv(x, taps, bias, *grid):
    """SiLU of the convolution of a grid behind prefix tokens: x (B, L, X), taps (9, X), bias (X); keep (B, M) are the
    places of the tokens behind the prefix, None where the grid is whole."""
    y = new(x.shape)
    _convolution('grid_conv_forward', (x, taps, bias, *grid), y, None, None, True)
    return y


def _run_conv_backward(grad, x, taps, bias, *grid):
    """Gradients of x and, as (10, X), of taps and bias."""
    before, grad_x, grad_taps = new(x.shape), new(x.shape), new((10, x.shape[-1])).zero_()
    _convolution('grid_conv_backward', (x, taps, bias, *grid), before, gradient(grad, x.shape), grad_taps, True)
    _convolution('grid_conv_forward', (before, taps.flip(0), None, *grid), grad_x, None, None, False)
    return grad_x, grad_taps


def _save_conv(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], inputs[6])
    ctx.grid = inputs[3:6]


def _differentiate_conv(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, taps, bias, keep = ctx.saved_tensors
    grad_x, grad_taps = torch.ops.vim_timm.cpu_grid_conv_backward.default(grad, x, taps, bias, *ctx.grid, keep)
    return grad_x, grad_taps[:9], None if bias is None else grad_taps[9], None, None, None, None


def _conv_flops(shapes: Dict[str, Any]) -> int:
    """As many as of the whole image, which backends without this operator convolve of a masked one too."""
    batch, _, channels = shapes['x']
    return 18 * batch * (shapes['prefix'] + shapes['height'] * shapes['width']) * channels


_CONV_OPERANDS = 'Tensor x, Tensor taps, Tensor? bias, int prefix, int height, int width, Tensor? keep'
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
    _norm('gated_norm_backward', (x, weight, z, eps), gradient(grad.contiguous(), x.shape), *grads)
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
    return limit(*present(given.zxbcdt, given.conv, given.A_log, given.norm, given.D))


def _columns(given: operands.GridMixer, tokens: Tensor) -> Tensor:
    """The tokens (1 or B, L) in the order of the columns of their image, prefix tokens first."""
    first, height, width, keep = given.prefix, given.height, given.width, given.keep
    if keep is None:
        columns = tokens[first:].view(height, width).t().reshape(1, -1)
    else:
        columns = torch.argsort(keep % width * height + keep // width, dim=1) + first
    return torch.cat([tokens[:first].expand(columns.shape[0], -1), columns], 1)


def grid_mixer(given: operands.GridMixer) -> Tensor:
    """The gated norm of the state space dual of convolved tokens, computed in float32, in zxbcdt's dtype: (B, L, D), or
    (B, L, C) with out_proj."""
    dim, state, heads = given.norm.shape[0], given.state, given.A_log.shape[1]
    zxbcdt = given.zxbcdt.float()[..., : 2 * dim + 2 * state + heads]
    z, xbc, delta = zxbcdt.split([dim, dim + 2 * state, heads], -1)
    grid = (given.prefix, given.height, given.width, given.keep)
    bias = None if given.conv_bias is None else given.conv_bias.float()
    xbc = torch.ops.vim_timm.cpu_grid_conv.default(xbc, given.conv.float().t().contiguous(), bias, *grid)
    x, B, C = xbc.split([dim, state, state], -1)
    tokens, moves = torch.arange(x.shape[1], device=x.device), None
    if given.prefix:
        moves = (tokens >= given.prefix).float()
    columns = None if given.rows and given.A_log.shape[0] == 1 else _columns(given, tokens)
    x = x.unflatten(-1, (heads, dim // heads))
    y = ssd(operands.Ssd(x, delta, given.A_log, B, C, given.D, given.delta_bias, given.rows, columns, moves))
    out = torch.ops.vim_timm.cpu_gated_norm.default(y.flatten(2), given.norm.float(), z, given.eps)
    out = out.to(given.zxbcdt.dtype)
    return out if given.out_proj is None else linear(operands.Linear(out, given.out_proj, None))
