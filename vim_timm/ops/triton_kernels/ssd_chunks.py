"""Launches of the symmetric state space dual's kernels for long sequences: chunks, and states between them."""

import math
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .launch import major_capability, multiprocessors, or_else
from .ssd_launch import Ssd


class ChunkLaunch(NamedTuple):
    """Warps and stages of a program, and the most registers of a thread."""

    warps: int
    stages: int
    registers: Optional[int] = None

    @property
    def constants(self) -> Dict[str, Optional[int]]:
        return {'num_warps': self.warps, 'num_stages': self.stages, 'maxnreg': self.registers}


TILE = 64  # tokens of a program, and of a chunk in the backward pass
STEPS = 128  # tokens of a program of `step_gradients`
SIZE = 512  # elements of a state of a program of `chunk_states`
SUMS = ChunkLaunch(4, 1)
SUMS_GROUP = 1  # heads of a program of `chunk_sums`
STATES = ChunkLaunch(4, 1)
FORWARD = ChunkLaunch(4, 2, 168)
WARPGROUPS = (9, 10)  # capabilities whose products read shared memory; others spill a kilobyte with FORWARD's registers
OTHER_FORWARD = ChunkLaunch(4, 1)  # also of float32 products and large states, which fit into shared memory once
BACKWARD_VALUES = ChunkLaunch(4, 1)
BACKWARD_MATRICES = ChunkLaunch(4, 1)
PROGRAMS = 4  # on each multiprocessor, below which the heads of a token are spread over several


class ChunkedSsd(Ssd):
    """`Ssd` for any length."""

    span = TILE

    def cut(self) -> Dict[str, int]:
        return {'ORDERS': self.orders, 'BT': TILE}

    def chunks(self, tiles: int) -> int:
        return math.ceil(self.length / (tiles * TILE))

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of what products take."""
        return torch.bfloat16 if self.constants['PRECISION'] == 'bf16' else torch.float32

    def visits(self, order: int) -> Tuple[Tuple[int, ...], int, Dict[str, bool]]:
        """How an order visits tokens: integers that follow length and heads, the stride of a table, constants."""
        by_columns = order > 0 or self.decay_constants['FIRST_COLUMNS']
        constants = {'BY_COLUMNS': bool(by_columns), 'TABLE': self.columns is not None}
        return (*self.grid, order), self.decay_strides()[2], constants

    def states(
        self, rows: Tensor, values: Tensor, dt: Tensor, s: Tensor, order: int, weighted: bool, tiles: int
    ) -> Tensor:
        """States (B, H, chunks, 2, N, P) of one order with which chunks of some tiles are entered from both ends."""
        chunks = self.chunks(tiles)
        shape = (self.batch, self.heads, chunks, 2, self.state, self.headdim)
        states, visits = self.empty(*shape, dtype=self.product_dtype), or_else(self.columns, self.x)
        at, stride, constants = self.visits(order)
        self.chunk_kernels.chunk_sums[chunks, math.ceil(self.heads / SUMS_GROUP), self.batch](
            rows, values, dt, s, visits, states, self.length, self.heads, SUMS_GROUP, *at,
            *rows.stride()[:2], *values.stride()[:2], stride, WEIGHTED=weighted, TILES=tiles,
            **constants, **self.constants, **SUMS.constants,
        )  # fmt: skip
        size = min(SIZE, self.state * self.headdim)
        self.chunk_kernels.chunk_states[self.state * self.headdim // size, 2 * self.heads, self.batch](
            s, visits, states, self.length, self.heads, chunks, *at, stride, SIZE=size, TILES=tiles,
            **constants, **self.constants, **STATES.constants,
        )  # fmt: skip
        return states

    def forward(self, dt: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        y = self.empty(*self.x.shape, dtype=dtype)
        part = self.empty(*self.x.shape, dtype=self.product_dtype) if self.orders == 2 else None
        tiles = 2 if self.state * self.headdim <= TILE * TILE else 1
        small = tiles == 2 and self.product_dtype == torch.bfloat16
        launch = FORWARD if small and major_capability(self.x.device) in WARPGROUPS else OTHER_FORWARD
        blocks = self.chunks(1)
        groups = min(self.heads, math.ceil(PROGRAMS * multiprocessors(self.x.device) / max(1, blocks * self.batch)))
        group = math.ceil(self.heads / groups)
        for order in range(self.orders - 1, -1, -1):
            last = order == 0
            to = y if last else or_else(part, y)
            has_part, has_D = last and part is not None, last and self.D is not None
            states = self.states(self.B, self.x, dt, s, order, True, tiles)
            at, stride, constants = self.visits(order)
            self.chunk_kernels.chunk_forward[blocks, math.ceil(self.heads / group), self.batch](
                self.x, self.B, self.C, dt, s, or_else(self.D, self.x), or_else(self.columns, self.x), states,
                or_else(part, y), to, self.length, self.heads, group, *at,
                *self.x.stride()[:2], *self.B.stride()[:2], *to.stride()[:2], stride,
                HAS_D=has_D, HAS_PART=has_part, TILES=tiles,
                **constants, **self.constants, **launch.constants,
            )  # fmt: skip
        return y

    def gradients(
        self, grad: Tensor, dt: Tensor, s: Tensor, grad_x: Tensor, grad_B: Tensor, grad_C: Tensor
    ) -> Tuple[Tensor, ...]:
        chunks = self.chunks(1)
        grad_dt, grad_l = torch.empty_like(dt), torch.empty_like(s)
        grad_D = self.empty(self.batch * chunks, self.heads)
        parts_B, parts_C = (self.empty(self.orders, *total.shape) for total in (grad_B, grad_C))
        part = self.empty(*self.x.shape, dtype=self.product_dtype) if self.orders == 2 else None
        for order in range(self.orders - 1, -1, -1):
            last = order == 0
            to = grad_x if last else or_else(part, grad_x)
            has_part, has_D = last and part is not None, last and self.D is not None
            states = self.states(self.B, self.x, dt, s, order, True, 1)
            grad_states = self.states(self.C, grad, dt, s, order, False, 1)
            at, stride, constants = self.visits(order)
            visits = or_else(self.columns, self.x)
            inputs = (*self.x.stride()[:2], *self.B.stride()[:2], *grad.stride()[:2])
            self.chunk_gradient_kernels.chunk_backward_values[chunks, self.batch](
                self.x, self.B, self.C, dt, s, or_else(self.D, self.x), visits, states, grad_states, grad,
                or_else(part, grad_x), to, grad_dt, grad_l, grad_D, self.length, self.heads, *at, *inputs,
                *to.stride()[:2], stride, HAS_D=has_D, HAS_PART=has_part,
                **constants, **self.constants, **BACKWARD_VALUES.constants,
            )  # fmt: skip
            self.chunk_gradient_kernels.chunk_backward_matrices[chunks, self.batch](
                self.x, self.B, self.C, dt, s, visits, states, grad_states, grad, parts_B, parts_C,
                self.length, self.heads, *at, *inputs, stride,
                **constants, **self.constants, **BACKWARD_MATRICES.constants,
            )  # fmt: skip
        self.add_parts(parts_B, grad_B)
        self.add_parts(parts_C, grad_C)
        return grad_D, grad_dt, grad_l

    def decay_gradients(self, dt: Tensor, grad_delta: Tensor, *of_steps: Tensor) -> Tuple[Tensor, Tensor]:
        """Results as of `Ssd.decay_gradients`, from gradients of dt and of what tokens add to s."""
        spans, constants = math.ceil(self.length / STEPS), self.decay_constants
        grad_A = self.empty(self.batch * spans, self.orders, self.heads)
        grad_bias = self.empty(self.batch * spans, self.heads)
        raw, bias, A_log, _, moves = self.decay_operands()
        self.decay_kernels.step_gradients[spans, self.batch](
            raw, bias, A_log, moves, dt, *of_steps, grad_delta, grad_A, grad_bias,
            self.length, self.heads, grad_delta.shape[-1], self.grid.prefix, *self.decay_strides()[:2],
            *grad_delta.stride()[:2], ORDERS=self.orders, BT=STEPS, BH=self.most_heads(8),
            **{name: constants[name] for name in ('HAS_BIAS', 'HAS_MOVES', 'FAST')},
        )  # fmt: skip
        return grad_A, grad_bias
