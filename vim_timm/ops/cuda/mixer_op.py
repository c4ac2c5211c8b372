"""The inside of a bidirectional Mamba block, from in_proj's output to out_proj's input, as one dispatcher op.

A short sequence takes three kernels: convolution, projection (a batched product), scan with step sizes and gate. What a
composition of operators would keep for the backward pass (both convolutions' results, both step sizes, the ungated sum)
is computed again there from in_proj's output.
"""

import ctypes
import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..triton_kernels.launch import multiprocessors
from .nvrtc import Module, load

STATE = 16
CHANNELS = 64  # of a block of the scan, two warps
TILE = 16  # tokens
MIN_CHUNK = 64
WARPS_PER_SM = 16  # of the convolution, as many as registers allow
PACKING_BLOCKS = 16
PARAMETERS = (
    'Tensor conv{0}, Tensor? conv_bias{0}, Tensor x_proj{0}, Tensor dt{0}, Tensor dt_bias{0}, '
    'Tensor A_log{0}, Tensor D{0}'
)
OPERANDS = f'Tensor xz, {PARAMETERS.format("")}, {PARAMETERS.format("_b")}, float scale'


class Direction(NamedTuple):
    """Parameters of one direction, float32 and contiguous: (D, W), (D), (R + 32, D), (D, R), (D), (D, 16), (D)."""

    conv: Tensor
    conv_bias: Optional[Tensor]
    x_proj: Tensor
    dt: Tensor
    dt_bias: Tensor
    A_log: Tensor
    skip: Tensor


def as_float(*parameters: Any) -> Direction:
    return Direction(*(None if p is None else p.float().contiguous() for p in parameters))  # type: ignore[arg-type]


class Cut(NamedTuple):
    """How a scan is cut: tokens of a chunk, chunks of a sequence, blocks that a multiprocessor has to hold."""

    chunk: int
    chunks: int
    blocks: int


def padded_rank(rank: int) -> int:
    return 16 * math.ceil(rank / 16)


def cut(batch: int, length: int, dim: int, rank: int, sms: int) -> Cut:
    """Cuts a scan so that blocks fill the device; in chunks it computes its exponentials twice."""
    blocks = 6 if padded_rank(rank) <= 32 else 5  # what shared memory and registers hold
    programs = batch * dim // CHANNELS
    if 3 * programs >= blocks * sms or length < 2 * MIN_CHUNK:
        return Cut(length, 1, blocks)
    chunk = max(MIN_CHUNK, TILE * math.ceil(length / (blocks * sms // programs * TILE)))
    return Cut(chunk, math.ceil(length / chunk), blocks)


class Mixer:
    """The operands as the kernels take them, and the launches of one call."""

    def __init__(self, xz: Tensor, *operands: Any) -> None:
        self.xz = xz.contiguous()
        self.scale = operands[-1]
        forward, backward = as_float(*operands[:7]), as_float(*operands[7:14])
        self.directions = forward, backward
        self.batch, self.length, width = xz.shape
        self.dim = width // 2
        self.rank = forward.dt.shape[1]
        self.row = padded_rank(self.rank) + 2 * STATE
        self.cut = cut(self.batch, self.length, self.dim, self.rank, multiprocessors(xz.device))

    def empty(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.xz.dtype, device=self.xz.device)

    def both(self, name: str) -> Tuple[Tensor, Tensor]:
        forward, backward = self.directions
        return getattr(forward, name), getattr(backward, name)

    def module(self, file: str, **flags: int) -> Module:
        half = int(self.xz.dtype == torch.float16)
        macros = dict(HALF=half, RANK=self.rank, RANK_PAD=self.row - 2 * STATE, BLOCKS=self.cut.blocks, **flags)
        return load(self.xz.device, ('common.cuh', file), tuple(macros.items()))

    def span(self, channels: int) -> Tuple[int, int]:
        """Tokens of a warp of the convolution that owns `channels` channels, and blocks of four such warps."""
        groups = math.ceil(self.dim / channels)
        wanted = WARPS_PER_SM * multiprocessors(self.xz.device) // (groups * self.batch)
        span = 8 * math.ceil(self.length / max(1, wanted) / 8)
        return span, math.ceil(groups * self.batch * math.ceil(self.length / span) / 4)

    def conv_module(self) -> Module:
        conv, bias = self.directions[0][:2]
        return self.module('conv.cu', WIDTH=conv.shape[1], HAS_BIAS=int(bias is not None))

    def project(self) -> Tuple[Tensor, Tensor, Tensor]:
        """u (2, B, L, D), the projections (2, B, L, ROW) and the projections' packed weights (2, ROW, D)."""
        u = self.empty(2, self.batch, self.length, self.dim)
        packed = self.empty(2, self.row, self.dim)
        span, blocks = self.span(128)
        self.conv_module().launch(
            'conv_forward', (blocks + PACKING_BLOCKS, 1, 1), 128, self.xz, wide(2 * self.dim), *self.both('conv'),
            *self.both('conv_bias'), *u, *self.both('x_proj'), packed, blocks, self.batch, self.length, self.dim, span,
        )  # fmt: skip
        x = torch.bmm(u.view(2, -1, self.dim), packed.transpose(1, 2))
        return u, x.view(2, self.batch, self.length, self.row), packed

    def scan(
        self, u: Tensor, x: Tensor, out: Tensor, H: Optional[Tensor], S: Optional[Tensor] = None,
        grad: Optional[Tensor] = None, grad_y: Optional[Tensor] = None, bounds: Optional[Tensor] = None,
    ) -> None:  # fmt: skip
        local = S is not None
        flags = dict(LOCAL=local, CARRY=H is not None and not local, KEEP=bounds is not None, GRAD=grad is not None)
        module = self.module('forward.cu', **{name: int(flag) for name, flag in flags.items()})
        z = ctypes.c_void_p(self.xz.data_ptr() + self.dim * self.xz.element_size())
        module.launch(
            'scan_forward', (self.dim // CHANNELS, self.cut.chunks, self.batch), 64, *u, *x, *self.both('dt'),
            *self.both('dt_bias'), *self.both('A_log'), *self.both('skip'), z, wide(2 * self.dim),
            out, wide(out.stride(1)), grad, grad_y, H, S, bounds, self.scale, self.batch, self.length, self.dim,
            self.cut.chunk,
        )  # fmt: skip

    def carry(self, contributions: Tensor, S: Tensor, against: bool) -> Tensor:
        states = torch.empty_like(contributions)
        flags = dict(LOCAL=1, CARRY=0, KEEP=0, GRAD=0)
        self.module('forward.cu', **flags).launch(
            'carry', (math.ceil(STATE * self.dim / 128), 2 * self.batch, 1), 128, *self.both('A_log'), contributions,
            states, S, self.batch, self.dim, self.cut.chunks, int(against),
        )  # fmt: skip
        return states

    def first_states(self, u: Tensor, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The state on entry of each chunk (2 B, chunks, 16, D) and the chunk's sum of step sizes (2 B, chunks, D)."""
        cells = 2 * self.batch
        ends = self.empty(cells, self.cut.chunks, STATE, self.dim, dtype=torch.float32)
        S = self.empty(cells, self.cut.chunks, self.dim, dtype=torch.float32)
        self.scan(u, x, u, ends, S)
        return self.carry(ends, S, against=False), S


def wide(value: int) -> Any:
    return ctypes.c_longlong(value)


@torch.library.custom_op('vim_timm::cuda_mixer', mutates_args=(), schema=f'({OPERANDS}) -> (Tensor, Tensor)')
def cuda_mixer(*operands: Any) -> Tuple[Tensor, Tensor]:
    """The gated output (B, L, D), and the projections for the backward pass."""
    mixer = Mixer(*operands)
    with torch.cuda.device_of(mixer.xz):
        u, x, _ = mixer.project()
        out = mixer.empty(mixer.batch, mixer.length, mixer.dim)
        H = mixer.first_states(u, x)[0] if mixer.cut.chunks > 1 else None
        mixer.scan(u, x, out, H)
        return out, x


@cuda_mixer.register_fake
def _(*operands: Any) -> Tuple[Tensor, Tensor]:
    xz, dt = operands[0], operands[4]
    batch, length, width = xz.shape
    row = padded_rank(dt.shape[1]) + 2 * STATE
    return xz.new_empty((batch, length, width // 2)), xz.new_empty((2, batch, length, row))
