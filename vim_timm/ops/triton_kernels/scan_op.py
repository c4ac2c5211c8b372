"""The bidirectional selective scan as dispatcher ops over the Triton kernels.

Opaque operators, not `triton_op`s: how a kernel is launched depends on addresses (the alignment of B's and C's rows),
the batch size and the device, none of which may become guards of a compiled graph.
"""

import functools
import math
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, in_dtypes_of, keep_outputs, register, scan_flops
from .launch import GROUP, INTERPRET, Plan, alignment, common_rows, multiprocessors, or_else, plan


def padded(state: int) -> int:
    return max(2, 1 << (state - 1).bit_length())


def cut_scan(u: Tensor, A: Tensor, two: bool) -> Plan:
    batch, length, dim = u.shape
    return plan((2 if two else 1) * batch, length, dim, padded(A.shape[1]), multiprocessors(u.device))


class Scan:
    """The operands as the kernels take them, and the launches of one call."""

    def __init__(self, given: operands.Scan) -> None:
        from . import scan_kernels

        forward, backward, self.z, self.scale, delta_softplus, self.A_is_log = given
        u, delta, A, B, C, D, bias = forward
        u_b, delta_b, A_b, B_b, C_b, D_b, bias_b = forward if backward is None else backward
        self.kernels = scan_kernels
        self.batch, self.length, self.dim = u.shape
        self.directions = 1 if backward is None else 2
        self.cells = self.directions * self.batch
        self.state = A.shape[1]
        self.u, self.u_b = common_rows(u, u_b)
        self.delta, self.delta_b = common_rows(delta, delta_b)
        self.B, self.C, self.B_b, self.C_b = common_rows(B, C, B_b, C_b)
        self.A, self.A_b = common_rows(A.contiguous(), A_b)
        self.D, self.D_b = common_rows(or_else(D, A).contiguous(), or_else(D_b, or_else(D, A)))
        self.bias, self.bias_b = common_rows(or_else(bias, A).contiguous(), or_else(bias_b, or_else(bias, A)))
        if self.z is not None:
            (self.z,) = common_rows(self.z)
        self.sizes = {'DIM': self.dim, 'N': self.state, 'NP': padded(self.state), 'FAST': not INTERPRET}
        self.skip = {'HAS_D': D is not None}
        self.step = {'HAS_BIAS': bias is not None, 'SOFTPLUS': delta_softplus}
        self.rows = {'ALIGN': alignment(self.B, self.C, self.B_b, self.C_b)}
        self.cut = cut_scan(u, A, self.directions == 2)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.u.device)

    def blocks(self, cut: Plan) -> int:
        return math.ceil(self.dim / cut.block)

    def operands(self) -> List[Tensor]:
        return [
            self.u, self.u_b, self.delta, self.delta_b, self.decay, self.B, self.B_b, self.C, self.C_b,
            self.D, self.D_b, self.bias, self.bias_b,
        ]  # fmt: skip

    def lengths(self, cut: Plan) -> List[int]:
        return [self.length, cut.chunk, cut.chunks]

    def strides(self) -> List[int]:
        """Rows of delta, rows of B and C, and the zero that hides alignment."""
        return [*self.delta.stride()[:2], *self.B.stride()[:2], 0]

    @functools.cached_property
    def decay(self) -> Tensor:
        decay = self.empty(self.directions, self.state, self.dim)
        self.kernels.decays[math.ceil(self.A.numel() / 1024), self.directions](
            self.A, self.A_b, decay, DIM=self.dim, N=self.state, BLOCK=1024, A_IS_LOG=self.A_is_log,
        )  # fmt: skip
        return decay

    def forward(self, H: Tensor, S: Tensor, Y: Tensor, bounds: Optional[Tensor], local: bool) -> None:
        cut = self.cut
        self.kernels.scan_forward[self.blocks(cut), cut.chunks, self.cells](
            *self.operands(), H, S, Y, or_else(bounds, H), self.batch, *self.lengths(cut),
            *self.u.stride()[:2], *self.strides(),
            BD=cut.block, VEC=cut.vec, LOCAL=local, CARRY=cut.chunks > 1, KEEP=bounds is not None,
            **self.sizes, **self.skip, **self.step, **self.rows, num_warps=cut.warps,
        )  # fmt: skip

    def carry(self, contributions: Tensor, S: Tensor, reverse: bool) -> Tensor:
        cut = self.cut
        states = torch.empty_like(contributions)
        self.kernels.carry[self.blocks(cut), self.cells](
            self.decay, contributions, states, S, self.batch, cut.chunks, 0,
            BD=cut.block, VEC=cut.vec, REVERSE=reverse, **self.sizes, num_warps=cut.warps,
        )  # fmt: skip
        return states

    def first_states(self) -> Tuple[Tensor, Tensor]:
        """Each chunk's first state and its sum of steps."""
        ends = self.empty(self.cells, self.cut.chunks, self.state, self.dim)
        S = self.empty(self.cells, self.cut.chunks, self.dim)
        self.forward(ends, S, self.u, None, local=True)
        return self.carry(ends, S, reverse=False), S

    def gate(self, Y: Tensor) -> Tensor:
        out = self.empty(self.batch, self.length, self.dim, dtype=self.u.dtype)
        z = or_else(self.z, out)
        self.kernels.gate_forward[math.ceil(out.numel() / 1024),](
            Y, z, out, self.batch * self.length, self.length, self.scale, *z.stride()[:2],
            DIM=self.dim, BLOCK=1024, TWO=self.directions == 2, HAS_Z=self.z is not None, FAST=not INTERPRET,
        )  # fmt: skip
        return out

    def gate_backward(self, grad: Tensor, Y: Tensor, z: Tensor) -> Tuple[Tensor, Tensor]:
        grad_y = self.empty(self.batch, self.length, self.dim, dtype=self.u.dtype)
        grad_z = torch.empty_like(grad_y, dtype=z.dtype)
        self.kernels.gate_backward[math.ceil(grad.numel() / 1024),](
            grad, Y, z, grad_y, grad_z, self.batch * self.length, self.length, self.scale, *z.stride()[:2],
            DIM=self.dim, BLOCK=1024, TWO=self.directions == 2, FAST=not INTERPRET,
        )  # fmt: skip
        return grad_y, grad_z

    def last_gradients(self, grad_y: Tensor, scale: float, S: Tensor) -> Tensor:
        """The gradient of the state that leaves each chunk."""
        cut = self.cut
        local = self.empty(self.cells, cut.chunks, self.state, self.dim)
        self.kernels.grad_states[self.blocks(cut), cut.chunks, self.cells](
            self.delta, self.delta_b, self.decay, self.C, self.C_b, self.bias, self.bias_b, grad_y, local,
            self.batch, *self.lengths(cut), scale, *self.strides(),
            BD=cut.block, VEC=cut.vec, **self.sizes, **self.step, **self.rows, num_warps=cut.warps,
        )  # fmt: skip
        return self.carry(local, S, reverse=True)

    def backward(self, grad_y: Tensor, scale: float, bounds: Tensor, Q: Tensor, cut: Plan) -> List[Tensor]:
        """Gradients of u, delta (directions, B, L, D), of B and C (directions, B, L, 2, N), of A (directions, D, N), of
        D and delta_bias (directions, 2, D)."""
        blocks, directions, batch = self.blocks(cut), self.directions, self.batch
        grad_u = self.empty(directions, batch, self.length, self.dim, dtype=self.u.dtype)
        grad_delta = torch.empty_like(grad_u, dtype=self.delta.dtype)
        part_X = self.empty(blocks, directions, batch, self.length, 2, self.state)
        part_A = self.empty(directions, batch * cut.chunks, self.dim, self.state)
        part_V = self.empty(directions, batch * cut.chunks, 2, self.dim)
        # The matrix unit adds bfloat16 products; float32 gradients need float32 sums.
        dot = self.B.dtype != torch.float32
        self.kernels.scan_backward[blocks, cut.chunks, self.cells](
            *self.operands(), grad_y, bounds, Q, grad_u, grad_delta, part_X, part_A, part_V,
            self.batch, self.cells, *self.lengths(cut), scale, *self.u.stride()[:2], *self.strides(),
            BD=cut.block, VEC=cut.vec, CARRY=cut.chunks > 1, A_IS_LOG=self.A_is_log, DOT=dot,
            **self.sizes, **self.skip, **self.step, **self.rows, num_warps=cut.warps, num_stages=1,
        )  # fmt: skip
        grad_X = torch.empty_like(part_X[0], dtype=self.B.dtype)
        self.kernels.sum_parts[math.ceil(grad_X.numel() / 1024),](
            part_X, grad_X, grad_X.numel(), PARTS_COUNT=blocks, BLOCK=1024,
        )  # fmt: skip
        return [grad_u, grad_delta, grad_X, part_A.sum(1), part_V.sum(1)]


def run(*flat: Any) -> Tuple[Tensor, Tensor, Tensor]:
    """The output and, of a scan in chunks, each chunk's first state and sum of steps for the backward pass."""
    scan = Scan(operands.Scan.of(*flat))
    H = S = scan.empty(0)
    with torch.cuda.device_of(scan.u):
        if scan.cut.chunks > 1:
            H, S = scan.first_states()
        Y = scan.empty(scan.cells, scan.length, scan.dim, dtype=scan.u.dtype)
        scan.forward(H, S, Y, None, local=False)
        return scan.gate(Y), H, S if scan.cut.chunks > 1 else scan.empty(0)


def fake(*flat: Any) -> Tuple[Tensor, Tensor, Tensor]:
    given = operands.Scan.of(*flat)
    u, A = given.forward.u, given.forward.A_log
    directions = 1 if given.backward is None else 2
    cut = cut_scan(u, A, directions == 2)
    cells = directions * u.shape[0]
    shape = (cells, cut.chunks, A.shape[1], u.shape[2]) if cut.chunks > 1 else (0,)
    H = u.new_empty(shape, dtype=torch.float32)
    S = u.new_empty((cells, cut.chunks, u.shape[2]) if cut.chunks > 1 else (0,), dtype=torch.float32)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device), H, S


def run_backward(grad: Tensor, H: Tensor, S: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    """The five gradients of `Scan.backward` and that of z (empty without z)."""
    scan = Scan(operands.Scan.of(*flat))
    cut = scan.cut
    grad = grad.contiguous()
    with torch.cuda.device_of(scan.u):
        Y = scan.empty(scan.cells, scan.length, scan.dim, dtype=scan.u.dtype)
        bounds = scan.empty(scan.cells, math.ceil(scan.length / GROUP), scan.state, scan.dim)
        scan.forward(H, S, Y, bounds, local=False)
        if scan.z is None:
            grad_y, grad_z, scale = grad, scan.empty(0), scan.scale
        else:
            (grad_y, grad_z), scale = scan.gate_backward(grad, Y, scan.z), 1.0
        Q = scan.last_gradients(grad_y, scale, S) if cut.chunks > 1 else H
        return (*scan.backward(grad_y, scale, bounds, Q, cut._replace(block=32)), grad_z)


def fake_backward(grad: Tensor, H: Tensor, S: Tensor, *flat: Any) -> Tuple[Tensor, ...]:
    given = operands.Scan.of(*flat)
    u, delta, A, B, *_ = given.forward
    batch, length, dim = u.shape
    directions, state = 1 if given.backward is None else 2, A.shape[1]

    def empty(shape: Tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=u.device)

    return (
        empty((directions, batch, length, dim), u.dtype),
        empty((directions, batch, length, dim), delta.dtype),
        empty((directions, batch, length, 2, state), B.dtype),
        empty((directions, dim, state), torch.float32),
        empty((directions, 2, dim), torch.float32),
        empty((0,), torch.float32) if given.z is None else empty((batch, length, dim), given.z.dtype),
    )


def save_operands(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, scale, delta_softplus, A_is_log = inputs
    _, H, S = output
    ctx.save_for_backward(H, S, *tensors)
    ctx.flags = (scale, delta_softplus, A_is_log)
    keep_outputs(ctx, H, S)


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
    H, S, *tensors = ctx.saved_tensors
    grad_u, grad_delta, grad_X, grad_A, grad_V, grad_z = torch.ops.vim_timm.triton_scan_backward.default(
        grad, H, S, *tensors, *ctx.flags
    )
    grads: List[Optional[Tensor]] = []
    for i in range(grad_u.shape[0]):
        grad_B, grad_C = grad_X[i].unbind(2)
        grad_D, grad_bias = grad_V[i]
        grads += [grad_u[i], grad_delta[i], grad_A[i], grad_B, grad_C, grad_D, grad_bias]
    grads += [None] * (2 * len(operands.Direction._fields) - len(grads)) + [grad_z]
    return *in_dtypes_of(tensors, grads), None, None, None


register(
    'triton_scan',
    f'({schema(operands.Scan)}) -> (Tensor, Tensor, Tensor)',
    f'(Tensor grad, Tensor H, Tensor S, {schema(operands.Scan)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    scan_flops,
)
