"""The inside of a bidirectional Mamba block, from in_proj's output to out_proj's input or output, as one dispatcher op.

A batch of short sequences takes three kernels: weights in two bytes, convolution and projection, scan with step sizes
and gate. Few tokens take a product for the projection, long sequences in small batches three kernels for the scan.
What a composition of operators would keep for the backward pass (both convolutions' results, projections, both step
sizes, the ungated and the gated sum) is computed again there from in_proj's output.
"""

import contextlib
import functools
import itertools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operands
from ..cpu.tensors import address
from ..operands import schema
from ..registration import Kernel, autocast_off, mixer_flops, register
from ..triton_kernels.launch import multiprocessors
from . import sizes
from .nvrtc import Module, bits, load
from .sizes import BACKWARD_CHANNELS, CHANNELS, FLAT_THREADS, KEPT, STATE, SUM_COLUMNS, TILE, padded_rank

# Sources of the modules.
_COMMON = ('ptx.cuh', 'common.cuh')
PROJECT, CONV_BACKWARD = ((*_COMMON, 'taps.cuh', file) for file in ('project.cu', 'conv_backward.cu'))
FORWARD, BACKWARD = ((*_COMMON, 'scan.cuh', file) for file in ('forward.cu', 'backward.cu'))
SUMS, WEIGHTS = ((*_COMMON, file) for file in ('sums.cu', 'weights.cu'))

MIN_CHUNK = 64
CONV_BACKWARD_WARPS = 12  # on a multiprocessor, as many as registers allow
PRODUCT_BLOCKS = 2  # on a multiprocessor, of sums of outer products; more write more sums
BACKWARD_BLOCKS = 8
DIRECTION = len(operands.Weights._fields)


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as dtype, contiguous and at an address that 16 divides: the kernels read 16 bytes at once."""
    if x.dtype != dtype or not x.is_contiguous():  # calls that change nothing cost the host more than the question
        x = x.to(dtype).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def single_copies(parameters: List[Tensor]) -> List[Tensor]:
    """Float32 copies as the kernels take them, all by one launch; a number of elements is a multiple of 4."""
    sizes = [parameter.numel() for parameter in parameters]
    whole = torch.empty(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    copies = [part.view(p.shape) for part, p in zip(whole.split(sizes), parameters)]
    torch._foreach_copy_(copies, parameters)
    return copies


def pair(buffer: Tensor, first: int, rows: int, columns: int) -> Tensor:
    """Numbers of a flat buffer from `first` on, of both directions (2, rows, columns)."""
    return buffer.as_strided((2, rows, columns), (rows * columns, columns, 1), first)


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
    """Addresses of what a scan reads, u (2, B, L, D) and its projections dt, B and C (2, B, L, ROW), of each direction,
    and of weights in two bytes, x_proj (2, ROW, D) and dt (2, D, RANK_PAD) of each direction."""

    u: Tuple[int, int]
    x: Tuple[int, int]
    x_proj: int
    dt: Tuple[int, int]
    out_proj: Optional[Tensor]  # (C, D) in two bytes
    held: Tuple[Tensor, ...]  # what the addresses point into; the first begins with u, x_proj and dt


class States(NamedTuple):
    """Addresses of the states on entry of each chunk (2 B, chunks, 16, D) and of the chunks' sums of step sizes
    (2 B, chunks, D), float32."""

    entry: int
    steps: int
    held: Tensor  # what they point into


class Gradients(NamedTuple):
    """Addresses of the gradients of u and of the step sizes before softplus (2, B, L, D) and of the projections
    (2, B, L, ROW), one after the other."""

    u: int
    delta: int
    x: int
    held: Tensor  # what they point into


class Cut(NamedTuple):
    """How a scan is cut: tokens of a chunk, chunks of a sequence, blocks that a multiprocessor has to hold."""

    chunk: int
    chunks: int
    blocks: int


@functools.lru_cache(maxsize=64)
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
        others: Dict[int, Tensor] = {}  # parameters that the kernels cannot take, by their place
        single = torch.float32
        for place, p in enumerate((*forward, *backward)):
            at = 0 if p is None else p.data_ptr()
            if p is not None and (at % 16 or p.dtype is not single or not p.is_contiguous()):
                others[place] = p
            addresses.append(at)
        self.copies = single_copies([*others.values()]) if others else []  # have to live as long as their addresses
        for place, copy in zip(others, self.copies):
            addresses[place] = copy.data_ptr()
        self.at = Addresses(*zip(addresses[:DIRECTION], addresses[DIRECTION:]))
        self.batch, self.length, _ = xz.shape
        self.dim, *axes, self.width = forward.conv.shape
        if axes not in ([], [1]):
            raise ValueError(f'conv must be (D, W) or (D, 1, W), not {tuple(forward.conv.shape)}')
        self.rank = forward.dt.shape[1]
        self.rank_pad = padded_rank(self.rank)
        self.row = sizes.row(self.rank)
        self.macros = (('HALF', int(xz.dtype == torch.float16)), ('RANK', self.rank))
        self.sms = multiprocessors(xz.device)
        self.cut = cut(self.batch, self.length, self.dim, self.rank, self.sms)

    @functools.cached_property
    def direction_size(self) -> int:
        """Numbers in the gradients of one direction's parameters."""
        return sum(map(math.prod, parameter_shapes(self.dim, self.width, self.rank)))

    def empty(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.xz.dtype, device=self.xz.device)

    def module(self, files: Tuple[str, ...], *flags: Tuple[str, int]) -> Module:
        return load(self.xz.device, files, (*self.macros, *flags))

    def conv_module(self, files: Tuple[str, ...], *flags: Tuple[str, int]) -> Module:
        return self.module(files, ('WIDTH', self.width), ('HAS_BIAS', int(self.at.conv_bias[0] != 0)), *flags)

    def buffers(self, *numbers: int, dtype: Optional[torch.dtype] = None) -> Tuple[Tensor, List[int]]:
        """One allocation for buffers of so many numbers, and their addresses: one for each would cost the host more.

        The kernels read 16 bytes at once, so all but the last number have to be multiples of 8.
        """
        whole = self.empty(sum(numbers), dtype=dtype)
        begin, size = whole.data_ptr(), whole.element_size()
        return whole, [begin + size * first for first in itertools.accumulate(numbers[:-1], initial=0)]

    def pack_weights(self, module: Module, x_proj: int, dt: int) -> Optional[Tensor]:
        """Puts the weights of x_proj and dt in two bytes at these addresses; returns out_proj's, as in `Projected`."""
        weight, out_proj, others = self.out_proj, None, 0
        if weight is not None:
            if weight.dtype == torch.float32:
                weight = aligned(weight, torch.float32)
                others, out_proj = weight.numel(), self.empty(*weight.shape)
            else:
                out_proj = weight.to(self.xz.dtype)
        blocks = math.ceil(max(self.row * self.dim, others) / (2 * FLAT_THREADS))
        module.launch(
            'pack_weights', (blocks, 1, 1), FLAT_THREADS, *self.at.x_proj, *self.at.dt, address(weight), x_proj, dt,
            address(out_proj), self.dim, others,
        )  # fmt: skip
        return out_proj

    def project(self) -> Projected:
        """One kernel where blocks of 64 tokens fill the device, else a convolution by parts of the channels and a
        product."""
        tokens = self.batch * self.length
        fused = tokens >= 64 * self.sms
        warps = 4 if fused else 1
        of_u, of_x, of_dt = tokens * self.dim, tokens * self.row, self.dim * self.rank_pad
        buffer, (u, x_proj, dt, x) = self.buffers(
            2 * of_u, 2 * self.row * self.dim, 2 * of_dt, 2 * of_x if fused else 0
        )
        shared = sizes.project_shared(self.rank, warps, fused)
        module = self.conv_module(PROJECT, ('PROJECT', int(fused)), ('WARPS', warps), ('SHARED_BYTES', shared))
        out_proj = self.pack_weights(module, x_proj, dt)
        module.launch(
            'conv_project', (math.ceil(tokens / (TILE * warps)), 1 if fused else self.dim // CHANNELS, 1), 32 * warps,
            self.xz.data_ptr(), 2 * self.dim, *self.at.conv, *self.at.conv_bias, x_proj, u, u + 2 * of_u, x, tokens,
            self.length, self.dim, shared=shared, early=True,
        )  # fmt: skip
        held: Tuple[Tensor, ...] = (buffer,)
        if not fused:
            weights = pair(buffer, 2 * of_u, self.row, self.dim)
            product = torch.bmm(pair(buffer, 0, tokens, self.dim), weights.transpose(1, 2))
            x, held = product.data_ptr(), (buffer, product)
        # numbers have two bytes
        return Projected((u, u + 2 * of_u), (x, x + 2 * of_x), x_proj, (dt, dt + 2 * of_dt), out_proj, held)

    def scan(
        self, p: Projected, out: int, H: int, S: int = 0, grad: int = 0, grad_y: int = 0, gated: int = 0,
        bounds: int = 0,
    ) -> None:  # fmt: skip
        """Takes addresses. out has rows of D numbers; as the gradient of z, like grad_y, rows of 2 D."""
        z = self.xz.data_ptr() + 2 * self.dim
        blocks = self.dim // CHANNELS * self.cut.chunks * self.batch
        held = gradient_blocks(blocks, self.rank, self.sms) if grad else self.cut.blocks
        module = self.module(
            FORWARD, ('BLOCKS', held), ('LOCAL', int(S != 0)), ('CARRY', int(H != 0 and S == 0)),
            ('KEEP', int(bounds != 0)), ('GRAD', int(grad != 0)),
        )  # fmt: skip
        # Fewer blocks would crowd on the multiprocessors that the last kernel leaves first.
        early = blocks > (held - 1) * self.sms
        module.launch(
            'scan_forward', (self.dim // CHANNELS, self.cut.chunks, self.batch), sizes.SCAN_THREADS,
            *p.u, *p.x, *p.dt, *self.at.dt_bias, *self.at.A_log, *self.at.skip,
            z, 2 * self.dim, out, 2 * self.dim if grad else self.dim, grad, grad_y, gated, H, S, bounds,
            bits(self.scale), self.batch, self.length, self.dim, self.cut.chunk, early=early,
        )  # fmt: skip

    def scan_forward(self, p: Projected) -> Tensor:
        """The gated output (B, L, D)."""
        states = self.first_states(p)
        out = self.empty(self.batch, self.length, self.dim)
        self.scan(p, out.data_ptr(), states.entry if states else 0)
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

    def carry(self, contributions: int, states: int, steps: int, against: bool) -> None:
        """Writes the states on entry, or against scan order their gradients, from what each chunk contributes."""
        flags = ('BLOCKS', self.cut.blocks), ('LOCAL', 1), ('CARRY', 0), ('KEEP', 0), ('GRAD', 0)
        self.module(FORWARD, *flags).launch(
            'carry', (math.ceil(STATE * self.dim / 128), 2 * self.batch, 1), 128, *self.at.A_log, contributions,
            states, steps, self.batch, self.dim, self.cut.chunks, int(against),
        )  # fmt: skip

    def first_states(self, p: Projected) -> Optional[States]:
        """The states with which chunks begin; None for sequences that are whole."""
        if self.cut.chunks == 1:
            return None
        numbers = 2 * self.batch * self.cut.chunks * self.dim
        ends = self.empty(STATE * numbers, dtype=torch.float32)
        buffer, (entry, steps) = self.buffers(STATE * numbers, numbers, dtype=torch.float32)
        self.scan(p, 0, ends.data_ptr(), steps)
        self.carry(ends.data_ptr(), entry, steps, against=False)
        return States(entry, steps, buffer)

    def sum_rows(self, parts: int, shape: Tuple[int, int, int], sums: int, stride: int) -> None:
        """Sums of parts (G, P, N), float32, N a multiple of SUM_COLUMNS: those of group g to sums[g * stride :]."""
        groups, rows, columns = shape
        self.module(SUMS).launch(
            'sum_rows', (columns // SUM_COLUMNS, groups, 1), FLAT_THREADS, parts, sums, rows, columns, stride
        )  # fmt: skip

    def scan_backward(
        self, p: Projected, grad_y: int, bounds: int, states: Optional[States], weights: Tensor
    ) -> Gradients:
        """Gradients of u, of the step sizes before softplus and of the projections, B's and C's columns; puts those of
        dt_bias, A_log and D in `weights`. grad_y has rows of 2 D."""
        chunks, tokens = self.cut.chunks, self.batch * self.length
        grid = (self.dim // BACKWARD_CHANNELS, chunks, 2 * self.batch)
        extents = (self.batch, self.length, self.dim, self.cut.chunk)
        module = self.module(BACKWARD, ('BLOCKS', BACKWARD_BLOCKS), ('CHUNKED', int(chunks > 1)))
        rows = [*p.x, *p.dt, *self.at.dt_bias, *self.at.A_log]
        Q: Optional[Tensor] = None
        if states is not None:
            local = self.empty(2 * self.batch, chunks, STATE, self.dim, dtype=torch.float32)
            module.launch('grad_states', grid, 32, *rows, grad_y, local.data_ptr(), *extents)
            Q = torch.empty_like(local)
            self.carry(local.data_ptr(), Q.data_ptr(), states.steps, against=True)
        numbers = 2 * tokens * self.dim
        buffer, (grad_u, grad_delta, grad_x) = self.buffers(numbers, numbers, 2 * tokens * self.row)
        shape = (2, self.batch * chunks, (STATE + 2) * self.dim)
        parts, (part_x, part_p) = self.buffers(grid[0] * 2 * tokens * 2 * STATE, math.prod(shape), dtype=torch.float32)
        module.launch(
            'scan_backward', grid, 32, *p.u, *rows, *self.at.skip, grad_y, bounds, address(Q), grad_u,
            grad_delta, part_x, part_p, *extents,
        )  # fmt: skip
        self.module(SUMS).launch(
            'sum_projections', (math.ceil(16 * tokens / FLAT_THREADS), 1, 1), FLAT_THREADS, part_x, grad_x, grid[0],
            2 * tokens,
        )  # fmt: skip
        self.sum_rows(part_p, shape, weights.data_ptr(), self.direction_size)
        return Gradients(grad_u, grad_delta, grad_x, buffer)

    def conv_backward(self, p: Projected, g: Gradients, grad_xz: Tensor, taps: int) -> None:
        """The gradient of x to the first half of grad_xz, from those of u by the scan and of its projections; to `taps`
        those of four taps and the bias (2, 5, D)."""
        groups = self.dim // CHANNELS
        wanted = CONV_BACKWARD_WARPS * self.sms // (groups * self.batch)
        span = sizes.CONV_GROUP * math.ceil(self.length / max(1, wanted) / sizes.CONV_GROUP)  # tokens of a warp
        spans = self.batch * math.ceil(self.length / span)
        parts = self.empty(spans, 10 * self.dim, dtype=torch.float32)
        self.conv_module(CONV_BACKWARD).launch(
            'conv_backward', (groups * math.ceil(spans / sizes.CONV_WARPS), 1, 1), 32 * sizes.CONV_WARPS,
            self.xz.data_ptr(), 2 * self.dim, *self.at.conv, *self.at.conv_bias, g.u, g.x, p.x_proj,
            grad_xz.data_ptr(), parts.data_ptr(), self.batch, self.length, self.dim, span,
        )  # fmt: skip
        self.sum_rows(parts.data_ptr(), (1, spans, 10 * self.dim), taps, 10 * self.dim)

    def gate_backward(
        self, p: Projected, grad: Tensor, grad_y: int, states: Optional[States]
    ) -> Tuple[Optional[Tensor], Tensor]:
        """The gradient of out_proj's weight (C, D) or None, and kept states; writes those of y and, beside it, z."""
        H, grad_z = states.entry if states else 0, grad_y + 2 * self.dim
        bounds = self.empty(2 * self.batch, math.ceil(self.length / KEPT), STATE, self.dim)
        if p.out_proj is None:
            self.scan(p, grad_z, H, grad=grad.data_ptr(), grad_y=grad_y, bounds=bounds.data_ptr())
            return None, bounds
        grad = grad.view(-1, grad.shape[2])
        gated = torch.mm(grad, p.out_proj)  # its gradient, where the kernel puts the output once it has read it
        at = gated.data_ptr()
        self.scan(p, grad_z, H, grad=at, grad_y=grad_y, gated=at, bounds=bounds.data_ptr())
        return torch.mm(grad.t(), gated), bounds

    def scan_gradients(
        self, p: Projected, grad: Tensor, grad_xz: Tensor, weights: Tensor
    ) -> Tuple[Gradients, Optional[Tensor]]:
        """Those of `scan_backward` and of out_proj's weight from the result's gradient.

        The gradient of z goes to the second half of grad_xz; the first half holds that of y until `conv_backward`.
        """
        grad_y, states = grad_xz.data_ptr(), self.first_states(p)
        grad_out_proj, bounds = self.gate_backward(p, grad, grad_y, states)
        return self.scan_backward(p, grad_y, bounds.data_ptr(), states, weights), grad_out_proj

    def projection_gradients(self, p: Projected, g: Gradients, products: int) -> None:
        """Those of the weights of dt and x_proj to `products`, side by side for each channel (2, D, RANK_PAD + ROW),
        float32; writes the first columns of those of the projections."""
        tokens, columns = self.batch * self.length, self.rank_pad + self.row
        numbers = 2 * tokens * self.dim
        dt = pair(p.held[0], numbers + 2 * self.row * self.dim, self.dim, self.rank_pad)
        grad_x = pair(g.held, 2 * numbers, tokens, self.row)
        torch.bmm(pair(g.held, numbers, tokens, self.dim), dt, out=grad_x[..., : self.rank_pad])
        groups = self.dim // CHANNELS
        spans = max(1, PRODUCT_BLOCKS * self.sms // (2 * groups))
        span = sizes.PRODUCT_TOKENS * math.ceil(tokens / (sizes.PRODUCT_TOKENS * spans))
        shape = (2, math.ceil(tokens / span), self.dim * columns)
        parts = self.empty(*shape, dtype=torch.float32)
        self.module(WEIGHTS).launch(
            'sum_outer_products', (groups, shape[1], 2), 2 * CHANNELS, g.delta, p.u[0], p.x[0], g.x,
            parts.data_ptr(), tokens, self.dim, span,
        )  # fmt: skip
        self.sum_rows(parts.data_ptr(), shape, products, self.dim * columns)

    def backward(self, grad: Tensor) -> Tuple[Tensor, Tensor]:
        """Gradients of xz and of the parameters, float32: both directions as in `parameter_shapes`, then out_proj."""
        p = self.project()
        grad_xz = self.empty(*self.xz.shape)  # not empty_like: axes of one token may have any stride
        others = 0 if self.out_proj is None else self.out_proj.numel()
        weights = self.empty(2 * self.direction_size + others, dtype=torch.float32)
        g, out_proj = self.scan_gradients(p, aligned(grad, self.xz.dtype), grad_xz, weights)
        columns = self.rank_pad + self.row
        _held, (taps, products) = self.buffers(10 * self.dim, 2 * self.dim * columns, dtype=torch.float32)
        self.projection_gradients(p, g, products)
        self.conv_backward(p, g, grad_xz, taps)
        threads = max((self.rank + 2 * STATE) * self.dim, others)
        self.module(WEIGHTS).launch(
            'place_gradients', (math.ceil(threads / FLAT_THREADS), 1, 1), FLAT_THREADS, taps, products,
            address(out_proj), weights.data_ptr(), self.direction_size, self.dim, self.width, others,
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
    (dim, *_, width), rank = given.forward.conv.shape, given.forward.dt.shape[1]
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
    dtype = tensors[1].dtype
    if dtype != weights.dtype and all(p is None or p.dtype == dtype for p in (*tensors, out_proj)):
        weights = weights.to(dtype)  # all by one launch
    found = weights.split([*map(math.prod, shapes)])
    grads: List[Tensor] = [grad_xz]
    for dt_bias, A_log, D, conv, conv_bias, dt, x_proj in (found[:DIRECTION], found[DIRECTION : 2 * DIRECTION]):
        grads += [conv, conv_bias, x_proj, dt, dt_bias, A_log, D]
    of_tensors = [
        None if p is None else g.view(p.shape) if g.dtype == p.dtype else g.view(p.shape).to(p.dtype)
        for g, p in zip(grads, tensors)
    ]  # a cast that changes nothing costs the host as much as the view
    grad_out_proj = None if out_proj is None else found[-1].view(out_proj.shape).to(out_proj.dtype)
    grad_bias = None if out_bias is None else grad.sum((0, 1)).to(out_bias.dtype)
    return (*of_tensors, None, grad_out_proj, grad_bias)


register(
    'cuda_mixer',
    f'({schema(operands.Mixer)}) -> Tensor',
    f'(Tensor grad, {schema(operands.Mixer, "out_bias")}) -> (Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    mixer_flops,
)
