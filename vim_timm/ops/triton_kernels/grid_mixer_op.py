"""The inside of a Vision Mamba 2 mixer, from in_proj's output to out_proj's, as one dispatcher op.

Four kernels: 3x3 convolution with SiLU, step sizes and their sums, the state space dual, norm with gate; out_proj is
torch's product. The backward pass keeps in_proj's output, what the convolution makes of it, and the sum before the
norm; it writes the gradient of in_proj's output in place, so that nothing is padded, added or copied, and the gated
norm, for the gradient of out_proj's weight, in the place of its own gradient.
"""

import functools
import importlib
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, autocast_off, grid_mixer_flops, in_dtypes_of, keep_outputs, register
from .grid_conv_op import Conv
from .launch import INTERPRET, aligned_strides
from .ssd_launch import Grid, Ssd, sum_dtype
from .ssd_op import ssd_of
from .sums import new_parts


class NormLaunch(NamedTuple):
    """Rows of a step and warps of a program; programs on each multiprocessor that walk over all rows."""

    rows: int
    warps: int
    programs: int


NORM_FORWARD = NormLaunch(4, 4, 0)
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 256, 8, 8  # of a step of a program of `mixer_sums`


def norm_backward(channels: int) -> NormLaunch:
    """The fastest launch on an H200."""
    if channels > 512:
        return NormLaunch(1, 1, 16)
    return NormLaunch(2, 1, 12 if channels <= 256 else 8)


class GatedNorm:
    """RMSNorm(y) * SiLU(z): launches of one call."""

    def __init__(self, kernels: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.y, self.z, self.weight, self.eps = y, z, weight.contiguous(), eps
        self.batch, self.length, self.dim = y.shape
        self.rows = self.batch * self.length
        self.constants = {'DIM': self.dim, 'BD': 1 << (self.dim - 1).bit_length(), 'FAST': not INTERPRET}

    def forward(self, launch: NormLaunch = NORM_FORWARD) -> Tensor:
        out = torch.empty(self.y.shape, dtype=self.z.dtype, device=self.y.device)
        align, strides = aligned_strides(self.y, self.z)
        self.kernels.gated_norm[math.ceil(self.rows / launch.rows),](
            self.y, self.z, self.weight, out, self.rows, self.length, self.eps, *strides,
            **self.constants, ALIGN=align, BR=launch.rows, num_warps=launch.warps,
        )  # fmt: skip
        return out

    def backward(
        self, grad: Tensor, grad_z: Tensor, again: bool, launch: Optional[NormLaunch] = None
    ) -> Tuple[Tensor, Tensor]:
        """Fills grad_z, of any row stride; returns the gradients of y and, float32, of the weight, as parts to add over
        their first axis. If `again`, the output takes the place of its gradient."""
        launch = launch or norm_backward(self.dim)
        grad_y = torch.empty(self.y.shape, dtype=self.y.dtype, device=self.y.device)
        parts, span = new_parts(self.y, self.rows, self.dim, launch.rows, launch.programs)
        align, strides = aligned_strides(self.y, self.z, grad_z)
        self.kernels.gated_norm_backward[len(parts),](
            self.y, self.z, self.weight, grad, grad_y, grad_z, parts, self.rows, self.length, span, self.eps, *strides,
            **self.constants, ALIGN=align, BR=launch.rows, AGAIN=again, num_warps=launch.warps,
        )  # fmt: skip
        return grad_y, parts


KERNELS = (
    'decay_kernels',
    'gated_norm_kernels',
    'grid_conv_kernels',
    'masked_conv_kernels',
    'ssd_chunk_gradient_kernels',
    'ssd_chunk_kernels',
    'ssd_kernels',
    'sum_kernels',
)


@functools.lru_cache(maxsize=None)
def kernel_modules() -> Dict[str, Any]:
    """The modules of a mixer's kernels by their names; they import Triton."""
    return {name: importlib.import_module(f'.{name}', __package__) for name in KERNELS}


class GridMixer:
    """The operands as the kernels take them, and the launches of one call."""

    def __init__(self, given: operands.GridMixer) -> None:
        self.kernels: Dict[str, Any] = kernel_modules()
        self.given = given
        self.zxbcdt = given.zxbcdt if given.zxbcdt.stride(-1) == 1 else given.zxbcdt.contiguous()
        self.dim, self.state, self.heads = given.norm.shape[0], given.state, given.A_log.shape[1]
        self.grid = Grid(given.prefix, given.height, given.width)
        self.columns: Optional[Tensor] = None  # the tokens by columns, where the grid does not say it

    def split(self, zxbcdt: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """z, the convolution's channels and the step sizes, with a row's padding, of in_proj's output or gradient."""
        inner = 2 * self.dim + 2 * self.state
        return zxbcdt[..., : self.dim], zxbcdt[..., self.dim : inner], zxbcdt[..., inner:]

    def convolution(self) -> Any:
        """See `grid_conv_op.Conv`."""
        x = self.split(self.zxbcdt)[1]
        return Conv(self.kernels['grid_conv_kernels'], x, self.given.conv, self.given.conv_bias, self.grid)

    def ssd(self, xbc: Tensor) -> Ssd:
        x = xbc[..., : self.dim].unflatten(-1, (self.heads, self.dim // self.heads))
        B, C = xbc[..., self.dim :].split(self.state, -1)
        delta, given = self.split(self.zxbcdt)[2][..., : self.heads], self.given
        weights = (given.D, given.delta_bias, given.rows, self.columns)
        ssd = ssd_of(operands.Ssd(x, delta, given.A_log, B, C, *weights), self.grid)
        ssd.kernels, ssd.decay_kernels = self.kernels['ssd_kernels'], self.kernels['decay_kernels']
        ssd.sum_kernels = self.kernels['sum_kernels']
        ssd.chunk_kernels = self.kernels['ssd_chunk_kernels']
        ssd.chunk_gradient_kernels = self.kernels['ssd_chunk_gradient_kernels']
        return ssd

    def gated_norm(self, y: Tensor) -> GatedNorm:
        z = self.split(self.zxbcdt)[0]
        return GatedNorm(self.kernels['gated_norm_kernels'], y, z, self.given.norm, self.given.eps)

    def sums(self, taps: Tensor, *parts: Tensor) -> List[Tensor]:
        """Sums over their first axes of five contiguous float32 tensors: those of taps and bias (10, D), as weight
        (D, 9) and bias, and four others."""
        channels = taps.shape[-1]
        shapes = [(channels, 9), (channels,), *(part.shape[1:] for part in parts)]
        totals = [torch.empty(shape, dtype=torch.float32, device=taps.device) for shape in shapes]
        columns = [total.numel() for total in totals[2:]]
        grid = (math.ceil(max(10 * channels, *columns) / SUM_COLUMNS), 1 + len(parts))
        self.kernels['sum_kernels'].mixer_sums[grid](
            taps, *parts, *totals, len(taps), *(len(part) for part in parts), channels, *columns,
            BR=SUM_ROWS, BC=SUM_COLUMNS, num_warps=SUM_WARPS,
        )  # fmt: skip
        return totals

    def forward(self) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        inside = self.split(self.zxbcdt)[1]
        xbc = torch.empty(inside.shape, dtype=inside.dtype, device=inside.device)
        self.convolution().forward(xbc)
        ssd = self.ssd(xbc)
        dt, s = ssd.decays()
        y = ssd.forward(dt, s, sum_dtype(xbc.dtype)).flatten(2)
        gated, out_proj = self.gated_norm(y).forward(), self.given.out_proj
        return gated if out_proj is None else F.linear(gated, out_proj), xbc, dt, s, y

    def gate_gradients(self, grad: Tensor, y: Tensor, grad_z: Tensor) -> Tuple[Tensor, Tensor, List[Tensor]]:
        """Fills grad_z; returns gradients of y, of norm in parts, and of out_proj where there is one."""
        out_proj = self.given.out_proj
        if out_proj is None:
            return *self.gated_norm(y).backward(grad, grad_z, again=False), []
        gated = torch.matmul(grad, out_proj)  # its gradient, until the kernel
        grad_y, grad_norm = self.gated_norm(y).backward(gated, grad_z, again=True)
        return grad_y, grad_norm, [torch.mm(grad.flatten(0, 1).t(), gated.flatten(0, 1))]

    def ssd_gradients(
        self, grad_y: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, grad_delta: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fills grad_delta; returns the gradient of xbc, and those of delta_bias, A_log and D in parts."""
        grad_xbc = torch.empty_like(xbc)
        grad_x, grad_y = (t.unflatten(-1, (self.heads, -1)) for t in (grad_xbc[..., : self.dim], grad_y))
        grad_B, grad_C = grad_xbc[..., self.dim :].split(self.state, -1)
        backward = self.ssd(xbc).backward
        grad_A, grad_D, grad_bias = backward(grad_y, dt, s, grad_x, grad_delta, grad_B, grad_C)
        return grad_xbc, grad_bias, grad_A, grad_D

    def backward(self, grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor) -> List[Tensor]:
        """Gradients of zxbcdt, and float32 ones of the convolution's weight (D + 2 N, 9) and bias, delta_bias, A_log, D
        and norm; of out_proj where there is one."""
        grad_zxbcdt = torch.empty(self.zxbcdt.shape, dtype=xbc.dtype, device=y.device)
        grad_z, grad_inside, grad_delta = self.split(grad_zxbcdt)
        grad_y, grad_norm, products = self.gate_gradients(grad, y, grad_z)
        grad_xbc, *others = self.ssd_gradients(grad_y, xbc, dt, s, grad_delta)
        del grad_y  # the step's peak of memory may be here
        conv = self.convolution()
        grad_before, taps = conv.before_silu(grad_xbc)
        conv.of_input(grad_before, grad_inside)
        return [grad_zxbcdt, *self.sums(taps, *others, grad_norm), *products]


def run(*flat: Any) -> Tuple[Tensor, ...]:
    """The output, and for the backward pass the convolution's, dt, s and the sum before the norm."""
    mixer = GridMixer(operands.GridMixer(*flat))
    with torch.cuda.device_of(mixer.zxbcdt):
        return mixer.forward()


def fake(*flat: Any) -> Tuple[Tensor, ...]:
    given = operands.GridMixer(*flat)
    x, (orders, heads), dim = given.zxbcdt, given.A_log.shape, given.norm.shape[0]
    batch, length, _ = x.shape
    return (
        x.new_empty((batch, length, dim if given.out_proj is None else given.out_proj.shape[0])),
        x.new_empty((batch, length, dim + 2 * given.state)),
        x.new_empty((batch, heads, length), dtype=torch.float32),
        x.new_empty((batch, orders, heads, length), dtype=torch.float32),
        x.new_empty((batch, length, dim), dtype=sum_dtype(x.dtype)),
    )


def gradients(mixer: GridMixer, grad: Tensor, *kept: Tensor) -> List[Tensor]:
    with torch.cuda.device_of(mixer.zxbcdt), autocast_off(mixer.zxbcdt):
        return mixer.backward(grad.contiguous(), *kept)


def run_backward(grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor, *flat: Any) -> List[Tensor]:
    return gradients(GridMixer(operands.GridMixer(*flat)), grad, xbc, dt, s, y)


def fake_backward(grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor, *flat: Any) -> List[Tensor]:
    given = operands.GridMixer(*flat)
    channels = xbc.shape[-1]
    shapes = [(channels, 9), (channels,), *(p.shape for p in (given.delta_bias, given.A_log, given.D, given.norm))]
    weights = [torch.empty(shape, dtype=torch.float32, device=grad.device) for shape in shapes]
    products = [] if given.out_proj is None else [torch.empty_like(given.out_proj)]
    return [torch.empty(given.zxbcdt.shape, dtype=given.zxbcdt.dtype, device=grad.device), *weights, *products]


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:7], *inputs[-2:])
    ctx.settings = inputs[7:-3]
    keep_outputs(ctx, *output[1:])


def differentiate_by(operator: torch._ops.OpOverload, ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    """Gradients of a mixer's operands by its backward operator, which needs no `keep`."""
    saved: Tuple[Tensor, ...] = ctx.saved_tensors
    kept, tensors, (neighbours, out_proj) = saved[:-9], saved[-9:-2], saved[-2:]
    grads = operator(grad, *kept, *tensors, *ctx.settings, None, neighbours, out_proj)
    *others, of_out_proj = in_dtypes_of((*tensors, out_proj), (*grads, None) if out_proj is None else grads)
    return (*others, *[None] * (len(ctx.settings) + 2), of_out_proj)


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    return differentiate_by(torch.ops.vim_timm.triton_grid_mixer_backward.default, ctx, grad)


register(
    'triton_grid_mixer',
    f'({schema(operands.GridMixer)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    f'(Tensor grad, Tensor xbc, Tensor dt, Tensor s, Tensor y, {schema(operands.GridMixer)}) -> Tensor[]',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    grid_mixer_flops,
)
