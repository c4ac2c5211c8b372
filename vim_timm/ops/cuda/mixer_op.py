"""The inside of a bidirectional Mamba block, from in_proj's output to out_proj's input or output, as one dispatcher op.

A batch of short sequences takes three kernels: weights in two bytes, convolution and projection, scan with step sizes
and gate. Few tokens take a product for the projection, long sequences in small batches three kernels for the scan.
What a composition of operators would keep for the backward pass (both convolutions' results, projections, both step
sizes, the ungated and the gated sum) is computed again there from in_proj's output.
"""

import contextlib
import functools
import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, autocast_off, mixer_flops, register
from ..triton_kernels.launch import multiprocessors
from . import sizes
from .nvrtc import Argument, Module, load
from .sizes import BACKWARD_CHANNELS, CHANNELS, FLAT_THREADS, KEPT, STATE, SUM_COLUMNS, TILE, padded_rank

MIN_CHUNK = 64
CONV_BACKWARD_WARPS = 12  # on a multiprocessor, as many as registers allow
PRODUCT_BLOCKS = 2  # on a multiprocessor, of sums of outer products; more write more sums
BACKWARD_BLOCKS = 8
DIRECTION = len(operands.Weights._fields)


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as dtype, contiguous and at an address that 16 divides: the kernels read 16 bytes at once."""
    x = x.to(dtype).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def each(x: Tensor) -> Tuple[int, int]:
    """The addresses of both directions' halves."""
    first = x.data_ptr()
    return first, first + x.numel() // 2 * x.element_size()


class Addresses(NamedTuple):
    """Addresses of both directions' `operands.Weights`, float32 and contiguous; 0 for none."""

    conv: Tuple[int, int]
    conv_bias: Tuple[int, int]
    x_proj: Tuple[int, int]
    dt: Tuple[int, int]
    dt_bias: Tuple[int, int]
    A_log: Tuple[int, int]
    skip: Tuple[int, int]


def parameter_shapes(dim: int, width: int, rank: int) -> List[Tuple[int, ...]]:
    """Shapes of one direction's dt_bias, A_log, D, conv, conv_bias, dt, x_proj: the order of gradients in memory."""
    return [(dim,), (dim, STATE), (dim,), (dim, width), (dim,), (dim, rank), (rank + 2 * STATE, dim)]


class Projected(NamedTuple):
    """What a scan reads, u (2, B, L, D) and its projections dt, B and C (2, B, L, ROW), and weights in two bytes:
    x_proj (2, ROW, D), dt (2, D, RANK_PAD), out_proj (C, D) or None."""

    u: Tensor
    x: Tensor
    x_proj: Tensor
    dt: Tensor
    out_proj: Optional[Tensor]


class Cut(NamedTuple):
    """How a scan is cut: tokens of a chunk, chunks of a sequence, blocks that a multiprocessor has to hold."""

    chunk: int
    chunks: int
    blocks: int


def cut(batch: int, length: int, dim: int, rank: int, sms: int) -> Cut:
    """Cuts a scan so that blocks fill the device; in chunks it computes its exponentials twice."""
    blocks = 6 if padded_rank(rank) <= 32 else 5  # what shared memory and registers hold, without gradients
    programs = batch * dim // CHANNELS
    if programs >= sms or length < 2 * MIN_CHUNK:
        return Cut(length, 1, blocks)
    chunk = max(MIN_CHUNK, TILE * math.ceil(length / (blocks * sms // programs * TILE)))
    return Cut(chunk, math.ceil(length / chunk), blocks)


def gradient_blocks(programs: int, rank: int, sms: int) -> int:
    """Blocks that a multiprocessor has to hold of a scan for gradients: as many as shared memory does, or four, which
    have more registers, where these take no more rounds."""
    most = {16: 6, 32: 5, 48: 4}[padded_rank(rank)]
    return 4 if math.ceil(programs / (4 * sms)) <= math.ceil(programs / (most * sms)) else most


class Mixer:
    """The operands as the kernels take them, and the launches of one call."""

    def __init__(self, given: operands.Mixer) -> None:
        xz, forward, backward, self.scale, self.out_proj, self.out_bias = given
        self.xz = aligned(xz, xz.dtype)
        addresses: List[int] = []
        self.copies: List[Tensor] = []  # have to live as long as their addresses
        for p in (*forward, *backward):
            address = 0 if p is None else p.data_ptr()
            # asked before `aligned` is called: 14 calls a block cost the host more than these questions
            if p is not None and (address % 16 or p.dtype != torch.float32 or not p.is_contiguous()):
                self.copies.append(aligned(p, torch.float32))
                address = self.copies[-1].data_ptr()
            addresses.append(address)
        self.at = Addresses(*zip(addresses[:DIRECTION], addresses[DIRECTION:]))
        self.batch, self.length, _ = xz.shape
        self.dim, self.width = forward.conv.shape
        self.rank = forward.dt.shape[1]
        self.rank_pad = padded_rank(self.rank)
        self.row = sizes.row(self.rank)
        self.macros = (('HALF', int(xz.dtype == torch.float16)), ('RANK', self.rank))
        self.cut = cut(self.batch, self.length, self.dim, self.rank, multiprocessors(xz.device))

    @functools.cached_property
    def direction_size(self) -> int:
        """Numbers in the gradients of one direction's parameters."""
        return sum(map(math.prod, parameter_shapes(self.dim, self.width, self.rank)))

    def empty(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.xz.dtype, device=self.xz.device)

    def module(self, *files: str, **flags: int) -> Module:
        return load(self.xz.device, ('ptx.cuh', 'common.cuh', *files), self.macros + tuple(flags.items()))

    def conv_module(self, file: str, **flags: int) -> Module:
        has_bias = int(self.at.conv_bias[0] != 0)
        return self.module('taps.cuh', file, WIDTH=self.width, HAS_BIAS=has_bias, **flags)

    def pack_weights(self, module: Module) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Weights of x_proj, dt and out_proj as in `Projected`."""
        x_proj, dt = self.empty(2, self.row, self.dim), self.empty(2, self.dim, self.rank_pad)
        weight, out_proj, others = self.out_proj, None, 0
        if weight is not None:
            if weight.dtype == torch.float32:
                weight = aligned(weight, torch.float32)
                others, out_proj = weight.numel(), self.empty(*weight.shape)
            else:
                out_proj = weight.to(self.xz.dtype)
        blocks = math.ceil(max(self.row * self.dim, others) / (2 * FLAT_THREADS))
        module.launch(
            'pack_weights', (blocks, 1, 1), FLAT_THREADS, *self.at.x_proj, *self.at.dt, weight, x_proj, dt, out_proj,
            self.dim, others,
        )  # fmt: skip
        return x_proj, dt, out_proj

    def project(self) -> Projected:
        """One kernel where blocks of 64 tokens fill the device, else a convolution by parts of the channels and a
        product."""
        tokens = self.batch * self.length
        fused = tokens >= 64 * multiprocessors(self.xz.device)
        warps = 4 if fused else 1
        u = self.empty(2, self.batch, self.length, self.dim)
        shared = sizes.project_shared(self.rank, warps, fused)
        module = self.conv_module('project.cu', PROJECT=int(fused), WARPS=warps, SHARED_BYTES=shared)
        x_proj, dt, out_proj = self.pack_weights(module)
        x = self.empty(2, self.batch, self.length, self.row) if fused else None
        module.launch(
            'conv_project', (math.ceil(tokens / (TILE * warps)), 1 if fused else self.dim // CHANNELS, 1), 32 * warps,
            self.xz, 2 * self.dim, *self.at.conv, *self.at.conv_bias, x_proj, *each(u), x, tokens, self.length,
            self.dim, shared=shared, early=True,
        )  # fmt: skip
        if x is None:
            x = torch.bmm(u.view(2, -1, self.dim), x_proj.transpose(1, 2)).view(2, self.batch, self.length, self.row)
        return Projected(u, x, x_proj, dt, out_proj)

    def scan(
        self, p: Projected, out: Tensor, H: Optional[Tensor], S: Optional[Tensor] = None,
        grad: Optional[Tensor] = None, grad_y: Optional[Tensor] = None, gated: Optional[Tensor] = None,
        bounds: Optional[Tensor] = None,
    ) -> None:  # fmt: skip
        local = S is not None
        z = self.xz.data_ptr() + self.dim * self.xz.element_size()
        blocks, sms = self.dim // CHANNELS * self.cut.chunks * self.batch, multiprocessors(self.xz.device)
        held = self.cut.blocks if grad is None else gradient_blocks(blocks, self.rank, sms)
        module = self.module(
            'scan.cuh', 'forward.cu', BLOCKS=held, LOCAL=int(local), CARRY=int(H is not None and not local),
            KEEP=int(bounds is not None), GRAD=int(grad is not None),
        )  # fmt: skip
        # Fewer blocks would crowd on the multiprocessors that the last kernel leaves first.
        early = blocks > (held - 1) * sms
        module.launch(
            'scan_forward', (self.dim // CHANNELS, self.cut.chunks, self.batch), sizes.SCAN_THREADS,
            *each(p.u), *each(p.x), *each(p.dt), *self.at.dt_bias, *self.at.A_log, *self.at.skip,
            z, 2 * self.dim, out, out.stride(1), grad, grad_y, gated, H, S, bounds, self.scale, self.batch, self.length,
            self.dim, self.cut.chunk, early=early,
        )  # fmt: skip

    def scan_forward(self, p: Projected) -> Tensor:
        """The gated output (B, L, D)."""
        H = self.first_states(p)[0] if self.cut.chunks > 1 else None
        out = self.empty(self.batch, self.length, self.dim)
        self.scan(p, out, H)
        return out

    def gated(self) -> Tuple[Tensor, Optional[Tensor]]:
        """The gated output (B, L, D) and out_proj's weight; on return all else that led to them is free."""
        p = self.project()
        return self.scan_forward(p), p.out_proj

    def forward(self) -> Tensor:
        """out_proj of the gated output (B, L, C), or without out_proj the gated output."""
        out, weight = self.gated()
        if weight is None:
            return out
        return F.linear(out, weight, None if self.out_bias is None else self.out_bias.to(out.dtype))

    def carry(self, contributions: Tensor, S: Tensor, against: bool) -> Tensor:
        states = torch.empty_like(contributions)
        flags = dict(BLOCKS=self.cut.blocks, LOCAL=1, CARRY=0, KEEP=0, GRAD=0)
        self.module('scan.cuh', 'forward.cu', **flags).launch(
            'carry', (math.ceil(STATE * self.dim / 128), 2 * self.batch, 1), 128, *self.at.A_log, contributions,
            states, S, self.batch, self.dim, self.cut.chunks, int(against),
        )  # fmt: skip
        return states

    def first_states(self, p: Projected) -> Tuple[Tensor, Tensor]:
        """The state on entry of each chunk (2 B, chunks, 16, D) and the chunk's sum of step sizes (2 B, chunks, D)."""
        cells = 2 * self.batch
        ends = self.empty(cells, self.cut.chunks, STATE, self.dim, dtype=torch.float32)
        S = self.empty(cells, self.cut.chunks, self.dim, dtype=torch.float32)
        self.scan(p, p.u, ends, S)
        return self.carry(ends, S, against=False), S

    def sum_rows(self, parts: Tensor, sums: Tensor, stride: int) -> None:
        """Sums of parts (G, P, N), float32, N a multiple of SUM_COLUMNS: those of group g to sums[g * stride :]."""
        groups, rows, columns = parts.shape
        self.module('sums.cu').launch(
            'sum_rows', (columns // SUM_COLUMNS, groups, 1), FLAT_THREADS, parts, sums, rows, columns, stride
        )  # fmt: skip

    def scan_backward(
        self, p: Projected, grad_y: Tensor, bounds: Tensor, S: Optional[Tensor], weights: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Gradients of u and of the step sizes before softplus (2, B, L, D), and of the projections (2, B * L, ROW),
        with B's and C's columns filled; puts those of dt_bias, A_log and D in `weights`. grad_y has rows of 2 D."""
        chunks = self.cut.chunks
        grid = (self.dim // BACKWARD_CHANNELS, chunks, 2 * self.batch)
        sizes = (self.batch, self.length, self.dim, self.cut.chunk)
        module = self.module('scan.cuh', 'backward.cu', BLOCKS=BACKWARD_BLOCKS, CHUNKED=int(chunks > 1))
        rows: List[Argument] = [*each(p.x), *each(p.dt), *self.at.dt_bias, *self.at.A_log]
        Q = None
        if S is not None:
            local = self.empty(2 * self.batch, chunks, STATE, self.dim, dtype=torch.float32)
            module.launch('grad_states', grid, 32, *rows, grad_y, local, *sizes)
            Q = self.carry(local, S, against=True)
        grad_u, grad_delta = self.empty(*p.u.shape), self.empty(*p.u.shape)
        part_x = self.empty(grid[0], 2, self.batch, self.length, 2 * STATE, dtype=torch.float32)
        part_p = self.empty(2, self.batch * chunks, (STATE + 2) * self.dim, dtype=torch.float32)
        module.launch(
            'scan_backward', grid, 32, *each(p.u), *rows, *self.at.skip, grad_y, bounds, Q, grad_u, grad_delta,
            part_x, part_p, *sizes,
        )  # fmt: skip
        tokens = 2 * self.batch * self.length
        grad_x = self.empty(2, tokens // 2, self.row)
        self.module('sums.cu').launch(
            'sum_projections', (math.ceil(8 * tokens / FLAT_THREADS), 1, 1), FLAT_THREADS, part_x, grad_x, grid[0],
            tokens,
        )  # fmt: skip
        self.sum_rows(part_p, weights, self.direction_size)
        return grad_u, grad_delta, grad_x

    def conv_backward(self, p: Projected, grad_u: Tensor, grad_x: Tensor, grad_xz: Tensor) -> Tensor:
        """The gradient of x to the first half of grad_xz, from those of u by the scan and of its projections; returns
        those of four taps and the bias (2, 5, D)."""
        groups = self.dim // CHANNELS
        wanted = CONV_BACKWARD_WARPS * multiprocessors(self.xz.device) // (groups * self.batch)
        span = sizes.CONV_GROUP * math.ceil(self.length / max(1, wanted) / sizes.CONV_GROUP)  # tokens of a warp
        spans = self.batch * math.ceil(self.length / span)
        parts = self.empty(1, spans, 10 * self.dim, dtype=torch.float32)
        self.conv_module('conv_backward.cu').launch(
            'conv_backward', (groups * math.ceil(spans / sizes.CONV_WARPS), 1, 1), 32 * sizes.CONV_WARPS,
            self.xz, 2 * self.dim, *self.at.conv, *self.at.conv_bias, grad_u, grad_x, p.x_proj, grad_xz, parts,
            self.batch, self.length, self.dim, span,
        )  # fmt: skip
        taps = self.empty(2, 5, self.dim, dtype=torch.float32)
        self.sum_rows(parts, taps, taps.numel())
        return taps

    def gate_backward(
        self, p: Projected, grad: Tensor, grad_y: Tensor, grad_z: Tensor
    ) -> Tuple[Optional[Tensor], Tensor, Optional[Tensor]]:
        """The gradient of out_proj's weight (C, D) or None, kept states, and the chunks' sums of step sizes; writes
        those of y and z."""
        H, S = self.first_states(p) if self.cut.chunks > 1 else (None, None)
        bounds = self.empty(2 * self.batch, math.ceil(self.length / KEPT), STATE, self.dim)
        if p.out_proj is None:
            self.scan(p, grad_z, H, grad=grad, grad_y=grad_y, bounds=bounds)
            return None, bounds, S
        grad = grad.view(-1, grad.shape[2])
        gated = through = torch.mm(grad, p.out_proj)  # the kernel puts the output where it has read its gradient
        self.scan(p, grad_z, H, grad=through, grad_y=grad_y, gated=gated, bounds=bounds)
        return torch.mm(grad.t(), gated), bounds, S

    def scan_gradients(
        self, p: Projected, grad: Tensor, grad_xz: Tensor, weights: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
        """Those of `scan_backward` and of out_proj's weight from the result's gradient.

        The gradient of z goes to the second half of grad_xz; the first half holds that of y until `conv_backward`.
        """
        grad_y, grad_z = grad_xz.chunk(2, dim=-1)
        grad_out_proj, bounds, S = self.gate_backward(p, grad, grad_y, grad_z)
        return (*self.scan_backward(p, grad_y, bounds, S, weights), grad_out_proj)

    def projection_gradients(self, p: Projected, grad_delta: Tensor, grad_x: Tensor) -> Tensor:
        """Those of the weights of dt and x_proj, side by side for each channel (2, D, RANK_PAD + ROW), float32; writes
        grad_x's first columns."""
        torch.bmm(grad_delta.view(2, -1, self.dim), p.dt, out=grad_x[..., : self.rank_pad])
        tokens, columns = self.batch * self.length, self.rank_pad + self.row
        groups = self.dim // CHANNELS
        spans = max(1, PRODUCT_BLOCKS * multiprocessors(self.xz.device) // (2 * groups))
        span = sizes.PRODUCT_TOKENS * math.ceil(tokens / (sizes.PRODUCT_TOKENS * spans))
        parts = self.empty(2, math.ceil(tokens / span), self.dim * columns, dtype=torch.float32)
        self.module('weights.cu').launch(
            'sum_outer_products', (groups, parts.shape[1], 2), 2 * CHANNELS, grad_delta, p.u, p.x, grad_x, parts,
            tokens, self.dim, span,
        )  # fmt: skip
        products = self.empty(2, self.dim, columns, dtype=torch.float32)
        self.sum_rows(parts, products, self.dim * columns)
        return products

    def backward(self, grad: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of xz and of the parameters, float32: both directions as in `parameter_shapes`, then out_proj."""
        p = self.project()
        grad_xz = self.empty(*self.xz.shape)  # not empty_like: axes of one token may have any stride
        others = 0 if self.out_proj is None else self.out_proj.numel()
        weights = self.empty(2 * self.direction_size + others, dtype=torch.float32)
        grad_u, grad_delta, grad_x, out_proj = self.scan_gradients(p, aligned(grad, self.xz.dtype), grad_xz, weights)
        products = self.projection_gradients(p, grad_delta, grad_x)
        taps = self.conv_backward(p, grad_u, grad_x, grad_xz)
        threads = max((self.rank + 2 * STATE) * self.dim, others)
        self.module('weights.cu').launch(
            'place_gradients', (math.ceil(threads / FLAT_THREADS), 1, 1), FLAT_THREADS, taps, products, out_proj,
            weights, self.direction_size, self.dim, self.width, others,
        )  # fmt: skip
        return grad_xz, weights


def no_casts(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off where it would make torch's products inside the operator another type than x's."""
    same = torch.get_autocast_dtype(x.device.type) == x.dtype
    return contextlib.nullcontext() if same else autocast_off(x)


def run(*flat: Any) -> Tensor:
    """`Mixer.forward`."""
    mixer = Mixer(operands.Mixer.of(*flat))
    with torch.cuda.device_of(mixer.xz), no_casts(mixer.xz):
        return mixer.forward()


def fake(*flat: Any) -> Tensor:
    given = operands.Mixer.of(*flat)
    batch, length, width = given.xz.shape
    return given.xz.new_empty((batch, length, width // 2 if given.out_proj is None else given.out_proj.shape[0]))


def run_backward(grad: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    """The gradients of `Mixer.backward`."""
    mixer = Mixer(operands.Mixer.of(*flat))
    with torch.cuda.device_of(mixer.xz), no_casts(mixer.xz):
        return mixer.backward(grad)


def all_shapes(given: operands.Mixer) -> List[Tuple[int, ...]]:
    """Shapes of all parameters, as their gradients follow each other in memory."""
    (dim, width), rank = given.forward.conv.shape, given.forward.dt.shape[1]
    both = 2 * parameter_shapes(dim, width, rank)
    return both if given.out_proj is None else [*both, given.out_proj.shape]


def fake_backward(grad: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    given = operands.Mixer.of(*flat)
    numbers = sum(map(math.prod, all_shapes(given)))
    return given.xz.new_empty(given.xz.shape), given.xz.new_empty((numbers,), dtype=torch.float32)


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    xz, forward, backward, ctx.scale, out_proj, out_bias = operands.Mixer.of(*inputs)
    ctx.save_for_backward(xz, *forward, *backward, out_proj, out_bias)


def differentiate(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    *tensors, out_proj, out_bias = ctx.saved_tensors
    grad_xz, weights = torch.ops.vim_timm.cuda_mixer_backward.default(grad, *tensors, ctx.scale, out_proj)
    shapes = all_shapes(operands.Mixer.of(*tensors, ctx.scale, out_proj))
    found = [g.view(shape) for g, shape in zip(weights.split([*map(math.prod, shapes)]), shapes)]
    grads: List[Any] = [grad_xz]
    for dt_bias, A_log, D, conv, conv_bias, dt, x_proj in (found[:DIRECTION], found[DIRECTION : 2 * DIRECTION]):
        grads += [conv, conv_bias, x_proj, dt, dt_bias, A_log, D]
    of_tensors = [None if p is None else g.to(p.dtype) for g, p in zip(grads, tensors)]
    grad_out_proj = None if out_proj is None else found[-1].to(out_proj.dtype)
    grad_bias = None if out_bias is None else grad.sum((0, 1)).to(out_bias.dtype)
    return (*of_tensors, None, grad_out_proj, grad_bias)


register(
    'cuda_mixer',
    f'({schema(operands.Mixer)}) -> Tensor',
    f'(Tensor grad, {schema(operands.Mixer, "out_bias")}) -> (Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    mixer_flops,
)
