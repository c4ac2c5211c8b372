"""Launches of the symmetric state space dual's kernels for long sequences: chunks, and states between them."""

import math
from typing import Dict, NamedTuple, Tuple

import torch
from torch import Tensor

from .launch import multiprocessors, or_else
from .ssd_launch import Ssd


class ChunkLaunch(NamedTuple):
    """Warps and stages of a program."""

    warps: int
    stages: int

    @property
    def constants(self) -> Dict[str, int]:
        return {'num_warps': self.warps, 'num_stages': self.stages}


CHUNK = 64  # tokens
STEPS = 128  # tokens of a program of `step_gradients`
SIZE = 512  # elements of a state of a program of `chunk_states`
SUMS = ChunkLaunch(4, 1)
STATES = ChunkLaunch(4, 1)
FORWARD = ChunkLaunch(4, 1)
BACKWARD_VALUES = ChunkLaunch(4, 1)
BACKWARD_MATRICES = ChunkLaunch(4, 1)
PROGRAMS = 2  # on each multiprocessor, below which the heads of a token are spread over several


class ChunkedSsd(Ssd):
    """`Ssd` for any length."""

    span = CHUNK

    def cut(self) -> Dict[str, int]:
        return {'ORDERS': self.orders, 'BT': CHUNK}

    @property
    def chunks(self) -> int:
        return math.ceil(self.length / CHUNK)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of what products take."""
        return torch.bfloat16 if self.constants['PRECISION'] == 'bf16' else torch.float32

    def visits(self, order: int) -> Tuple[Tuple[int, ...], int, Dict[str, bool]]:
        """How an order visits tokens: integers that follow length and heads, the stride of a table, constants."""
        by_columns = order > 0 or self.decay_constants['FIRST_COLUMNS']
        constants = {'BY_COLUMNS': bool(by_columns), 'TABLE': self.columns is not None}
        return (*self.grid, order), self.decay_strides()[2], constants

    def states(self, rows: Tensor, values: Tensor, dt: Tensor, s: Tensor, order: int, weighted: bool) -> Tensor:
        """States (B, H, chunks, 2, N, P) of one order with which chunks are entered from both ends."""
        shape = (self.batch, self.heads, self.chunks, 2, self.state, self.headdim)
        states, visits = self.empty(*shape, dtype=self.product_dtype), or_else(self.columns, self.x)
        at, stride, constants = self.visits(order)
        self.chunk_kernels.chunk_sums[self.chunks, self.heads, self.batch](
            rows, values, dt, s, visits, states, self.length, self.heads, *at,
            *rows.stride()[:2], *values.stride()[:2], stride, WEIGHTED=weighted,
            **constants, **self.constants, **SUMS.constants,
        )  # fmt: skip
        size = min(SIZE, self.state * self.headdim)
        self.chunk_kernels.chunk_states[self.state * self.headdim // size, 2 * self.heads, self.batch](
            s, visits, states, self.length, self.heads, self.chunks, *at, stride, SIZE=size,
            **constants, **self.constants, **STATES.constants,
        )  # fmt: skip
        return states

    def forward(self, dt: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        y = self.empty(*self.x.shape, dtype=dtype)
        part = self.empty(*self.x.shape, dtype=self.product_dtype) if self.orders == 2 else None
        groups = min(self.heads, math.ceil(PROGRAMS * multiprocessors(self.x.device) / (self.chunks * self.batch)))
        group = math.ceil(self.heads / groups)
        for order in range(self.orders - 1, -1, -1):
            last = order == 0
            to = y if last else or_else(part, y)
            has_part, has_D = last and part is not None, last and self.D is not None
            states = self.states(self.B, self.x, dt, s, order, True)
            at, stride, constants = self.visits(order)
            self.chunk_kernels.chunk_forward[self.chunks, math.ceil(self.heads / group), self.batch](
                self.x, self.B, self.C, dt, s, or_else(self.D, self.x), or_else(self.columns, self.x), states,
                or_else(part, y), to, self.length, self.heads, group, *at,
                *self.x.stride()[:2], *self.B.stride()[:2], *to.stride()[:2], stride,
                HAS_D=has_D, HAS_PART=has_part,
                **constants, **self.constants, **FORWARD.constants,
            )  # fmt: skip
        return y

    def gradients(self, grad: Tensor, dt: Tensor, s: Tensor, grad_x: Tensor) -> Tuple[Tensor, ...]:
        grad_dt, grad_l = torch.empty_like(dt), torch.empty_like(s)
        grad_D = self.empty(self.batch * self.chunks, self.heads)
        grad_B = self.empty(self.orders, self.batch, self.length, self.state)
        grad_C = torch.empty_like(grad_B)
        part = self.empty(*self.x.shape, dtype=self.product_dtype) if self.orders == 2 else None
        for order in range(self.orders - 1, -1, -1):
            last = order == 0
            to = grad_x if last else or_else(part, grad_x)
            has_part, has_D = last and part is not None, last and self.D is not None
            states = self.states(self.B, self.x, dt, s, order, True)
            grad_states = self.states(self.C, grad, dt, s, order, False)
            at, stride, constants = self.visits(order)
            visits = or_else(self.columns, self.x)
            inputs = (*self.x.stride()[:2], *self.B.stride()[:2], *grad.stride()[:2])
            self.chunk_kernels.chunk_backward_values[self.chunks, self.batch](
                self.x, self.B, self.C, dt, s, or_else(self.D, self.x), visits, states, grad_states, grad,
                or_else(part, grad_x), to, grad_dt, grad_l, grad_D, self.length, self.heads, *at, *inputs,
                *to.stride()[:2], stride, HAS_D=has_D, HAS_PART=has_part,
                **constants, **self.constants, **BACKWARD_VALUES.constants,
            )  # fmt: skip
            self.chunk_kernels.chunk_backward_matrices[self.chunks, self.batch](
                self.x, self.B, self.C, dt, s, visits, states, grad_states, grad, grad_B, grad_C,
                self.length, self.heads, *at, *inputs, stride,
                **constants, **self.constants, **BACKWARD_MATRICES.constants,
            )  # fmt: skip
        return grad_D, grad_B, grad_C, grad_dt, grad_l

    def decay_gradients(self, dt: Tensor, grad_delta: Tensor, *of_steps: Tensor) -> Tuple[Tensor, Tensor]:
        """Results as of `Ssd.decay_gradients`, from gradients of dt and of what tokens add to s."""
        spans, constants = math.ceil(self.length / STEPS), self.decay_constants
        grad_A = self.empty(self.batch * spans, self.orders, self.heads)
        grad_bias = self.empty(self.batch * spans, self.heads)
        raw, bias, A_log, _, moves = self.decay_operands()
        self.decay_kernels.step_gradients[spans, self.batch](
            raw, bias, A_log, moves, dt, *of_steps, grad_delta, grad_A, grad_bias,
            self.length, self.heads, grad_delta.shape[-1], self.grid.prefix, *self.decay_strides()[:2],
            *grad_delta.stride()[:2], ORDERS=self.orders, BT=STEPS,
            **{name: constants[name] for name in ('HAS_BIAS', 'HAS_MOVES', 'BH', 'FAST')},
        )  # fmt: skip
        return grad_A, grad_bias
