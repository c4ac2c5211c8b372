"""Launches of the symmetric state space dual's kernels, for sequences whose row of scores fits into registers."""

import functools
import itertools
import math
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .. import operands
from .launch import INTERPRET, aligned_strides, common_rows, or_else

MAX_LENGTH = 256  # a program has a row of scores in registers


class Launch(NamedTuple):
    """Tokens of a program, its warps and stages, and programs over which the heads of a token are spread.

    Fewer registers than the compiler asks for may spill a little and still pay, as more programs run side by side.
    """

    block: int
    warps: int
    stages: int
    groups: int
    registers: Optional[int] = None

    @property
    def constants(self) -> Dict[str, Optional[int]]:
        return {'BM': self.block, 'num_warps': self.warps, 'num_stages': self.stages, 'maxnreg': self.registers}


class ValuesLaunch(NamedTuple):
    """Tokens j of a program, tokens i of a step, warps, stages and registers of `ssd_backward_values`."""

    block: int
    size: int
    warps: int
    stages: int
    registers: Optional[int] = None

    @property
    def constants(self) -> Dict[str, Optional[int]]:
        return {
            'BM': self.block,
            'SIZE': self.size,
            'num_warps': self.warps,
            'num_stages': self.stages,
            'maxnreg': self.registers,
        }


class DecayLaunch(NamedTuple):
    """Most tokens of a step along the sums of decays, and warps of a program.

    Many tokens a thread make a long program, which takes longer to fetch than to run: among others it is in no cache.
    """

    tokens: int
    warps: int


DECAY_FORWARD = DecayLaunch(256, 8)
DECAY_BACKWARD = DecayLaunch(256, 16)
FORWARD, FORWARD_SHORT = Launch(64, 4, 1, 1), Launch(64, 4, 1, 3)
BACKWARD_VALUES = ValuesLaunch(32, 64, 4, 3, 128)
LONGER_VALUES = BACKWARD_VALUES._replace(stages=2)  # of two orders or over 32 states
SHORT = 64  # tokens up to which an image is one program, and its heads have programs of their own
BACKWARD_SCORES = Launch(64, 4, 2, 1)
SUM_SIZE = 2048  # numbers of each part that a program adds


class Grid(NamedTuple):
    """Where tokens stand whose orders need no table: a grid behind `prefix` tokens."""

    prefix: int
    height: int
    width: int

    def check(self, length: int) -> None:
        """Raise ValueError where `length` tokens are not these: kernels would read past their ends."""
        if length != self.prefix + self.height * self.width:
            raise ValueError(f'{length} tokens are not {self.prefix} and a grid of {self.height} x {self.width}')


@functools.lru_cache(maxsize=None)
def pieces(length: int) -> Tuple[int, ...]:
    """Four sizes, 16 to 64 or 0 for none, that cover a sequence of up to 256 tokens with the least waste."""
    covers = (c for c in itertools.combinations_with_replacement((64, 32, 16, 0), 4) if sum(c) >= length)
    return min(covers, key=lambda c: (sum(c), -c.count(0)))


def size_limit(length: int, headdim: int, state: int) -> str:
    """Why a program cannot hold its tiles, in one sentence, or ''."""
    for name, size in (('headdim', headdim), ('d_state', state)):
        if size not in (16, 32, 64, 128):
            return f'The triton backend takes a {name} of 16, 32, 64 or 128, not {size}.'
    return 'The triton backend takes at least one token.' if length == 0 else ''


def precision(dtype: torch.dtype) -> str:
    """How products are rounded. Values times scores of float16 operands need float32's range, which tf32 has."""
    if dtype == torch.bfloat16 and not INTERPRET:  # whose products are of float32
        return 'bf16'
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return 'tf32' if allowed else 'tf32x3'  # 'ieee' takes minutes to compile


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums before a norm: they may leave float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


class Ssd:
    """The operands as the kernels take them, and the launches of one call."""

    span = MAX_LENGTH  # tokens over which s is cumulated

    def __init__(self, given: operands.Ssd, grid: Optional[Grid] = None) -> None:
        from . import decay_kernels, ssd_chunk_gradient_kernels, ssd_chunk_kernels, ssd_kernels, sum_kernels

        x, delta, A_log, B, C, D, delta_bias, rows, columns, moves = given
        self.D, self.delta_bias, self.columns, self.moves = (
            None if vector is None else vector.contiguous() for vector in (D, delta_bias, columns, moves)
        )
        self.decay_kernels, self.kernels, self.sum_kernels = decay_kernels, ssd_kernels, sum_kernels
        self.chunk_kernels, self.chunk_gradient_kernels = ssd_chunk_kernels, ssd_chunk_gradient_kernels
        self.x = x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
        self.delta = delta if delta.stride(-1) == 1 else delta.contiguous()
        self.A_log = A_log.contiguous()
        self.B, self.C = common_rows(B, C)
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.grid = grid or Grid(0, 1, self.length)
        self.grid.check(self.length)
        if columns is not None and columns.shape not in ((1, self.length), (self.batch, self.length)):
            raise ValueError(f'columns {list(columns.shape)} do not fit {self.batch} images of {self.length} tokens')
        if moves is not None and moves.shape != (self.length,):
            raise ValueError(f'moves {list(moves.shape)} do not fit {self.length} tokens')
        self.orders, self.state = A_log.shape[0], B.shape[-1]
        self.decay_constants = {
            'HAS_BIAS': self.delta_bias is not None,
            'TABLE': self.columns is not None,
            'HAS_MOVES': self.moves is not None,
            'FIRST_COLUMNS': not rows,
            'FAST': not INTERPRET,
        }
        self.constants = {
            'N': self.state,
            'P': self.headdim,
            **self.cut(),
            'PRECISION': precision(x.dtype),
            'FAST': not INTERPRET,
        }

    def step(self, most: int) -> int:
        """Tokens of a step along a cumulated sum."""
        return min(most, max(16, 1 << (self.length - 1).bit_length()))

    def most_heads(self, least: int) -> int:
        """Heads of a step, or columns of a row that is filled: those of in_proj's output are a multiple of 8."""
        return max(least, 1 << (self.heads - 1).bit_length())

    def cut(self) -> Dict[str, int]:
        """Constants of the kernels for the sequence's length."""
        return {'TWO': self.orders == 2, **dict(zip(('N0', 'N1', 'N2', 'N3'), pieces(self.length)))}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def programs(self, launch: Launch) -> Tuple[int, int, int]:
        return math.ceil(self.length / launch.block), launch.groups, self.batch

    def decay_operands(self) -> Tuple[Tensor, ...]:
        return (
            self.delta,
            or_else(self.delta_bias, self.x),
            self.A_log,
            or_else(self.columns, self.x),
            or_else(self.moves, self.x),
        )

    def decay_strides(self) -> Tuple[int, int, int]:
        columns, (batch, row, _) = self.columns, self.delta.stride()
        return batch, row, 0 if columns is None or columns.shape[0] == 1 else columns.stride(0)

    def decays(self) -> Tuple[Tensor, Tensor]:
        """dt (B, H, L) and s (B, O, H, L), times log2(e), which begins anew every `span` tokens."""
        dt = self.empty(self.batch, self.heads, self.length)
        s = self.empty(self.batch, self.orders, self.heads, self.length)
        self.decay_kernels.decay_forward[self.orders, self.batch, math.ceil(self.length / self.span)](
            *self.decay_operands(), dt, s, self.length, self.heads, *self.grid, self.span, *self.decay_strides(),
            **self.decay_constants, BT=self.step(min(self.span, DECAY_FORWARD.tokens)), BH=self.most_heads(1),
            num_warps=DECAY_FORWARD.warps,
        )  # fmt: skip
        return dt, s

    def forward(self, dt: Tensor, s: Tensor, dtype: torch.dtype, launch: Optional[Launch] = None) -> Tensor:
        launch = launch or (FORWARD_SHORT if self.length <= SHORT else FORWARD)
        y = self.empty(*self.x.shape, dtype=dtype)
        self.kernels.ssd_forward[self.programs(launch)](
            self.x, self.B, self.C, dt, s, or_else(self.D, self.x), y, self.length, self.heads,
            math.ceil(self.heads / launch.groups), *self.x.stride()[:2], *self.B.stride()[:2], *y.stride()[:2],
            HAS_D=self.D is not None, **self.constants, **launch.constants,
        )  # fmt: skip
        return y

    def value_gradients(
        self, grad: Tensor, dt: Tensor, s: Tensor, grad_x: Tensor, launch: Optional[ValuesLaunch] = None
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fills grad_x, of any row stride; returns gradients of dt, the two parts of those of s, and parts of D's."""
        launch = launch or (BACKWARD_VALUES if self.orders * self.state <= 32 else LONGER_VALUES)
        blocks = math.ceil(self.length / launch.block)
        grad_dt, edges = torch.empty_like(dt), torch.empty_like(s)
        rows = self.empty(blocks, *s.shape)
        grad_D = self.empty(self.batch * blocks, self.heads)
        held = {name: value for name, value in self.constants.items() if name not in ('N0', 'N1', 'N2', 'N3')}
        self.kernels.ssd_backward_values[blocks, self.heads, self.batch](
            self.x, self.B, self.C, dt, s, or_else(self.D, self.x), grad, grad_x, grad_dt, edges, rows, grad_D,
            self.length, self.heads, *self.x.stride()[:2], *self.B.stride()[:2], *grad.stride()[:2],
            *grad_x.stride()[:2], HAS_D=self.D is not None, **held, **launch.constants,
        )  # fmt: skip
        return grad_dt, edges, rows, grad_D

    def matrix_gradients(
        self, grad: Tensor, dt: Tensor, s: Tensor, grad_B: Tensor, grad_C: Tensor, launch: Launch = BACKWARD_SCORES
    ) -> None:
        """Fills grad_B and grad_C (batch, L, N), of any row stride."""
        blocks, groups, batch = self.programs(launch)
        parts_B, parts_C = self.parts(groups, grad_B), self.parts(groups * blocks, grad_C)
        self.kernels.ssd_backward_scores[blocks, groups, batch](
            self.x, self.B, self.C, dt, s, grad, parts_B, parts_C,
            self.length, self.heads, math.ceil(self.heads / groups), *self.x.stride()[:2], *self.B.stride()[:2],
            *grad.stride()[:2], *parts_B.stride()[-3:-1], *parts_C.stride()[-3:-1],
            **self.constants, **launch.constants,
        )  # fmt: skip
        self.add_parts(parts_B, grad_B)
        self.add_parts(parts_C, grad_C)

    def add_parts(self, parts: Tensor, total: Tensor) -> None:
        """Fills a gradient (batch, L, N), of any row stride, with the sum of its `parts`, unless these are itself."""
        if parts is total:
            return
        rows, size = self.batch * self.length, SUM_SIZE // self.state
        align, strides = aligned_strides(total)
        self.sum_kernels.sum_rows[math.ceil(rows / size),](
            parts, total, rows, self.length, *strides, COUNT=len(parts), N=self.state, BR=size, ALIGN=align
        )

    def parts(self, count: int, total: Tensor) -> Tensor:
        """Float32 parts of a gradient, to add over their first axis; the gradient itself where it is the only one."""
        return total if count == 1 else self.empty(count, *total.shape)

    def gradients(
        self, grad: Tensor, dt: Tensor, s: Tensor, grad_x: Tensor, grad_B: Tensor, grad_C: Tensor
    ) -> Tuple[Tensor, ...]:
        """Fills grad_x, grad_B and grad_C; returns parts of the gradient of D, and what `decay_gradients` takes."""
        *of_steps, grad_D = self.value_gradients(grad, dt, s, grad_x)
        self.matrix_gradients(grad, dt, s, grad_B, grad_C)
        return grad_D, *of_steps

    def backward(
        self, grad: Tensor, dt: Tensor, s: Tensor, grad_x: Tensor, grad_delta: Tensor, grad_B: Tensor, grad_C: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Fills the last four, of any row stride, grad_delta with zeros behind its heads.

        Returns:
            Float32 gradients of A_log, D and delta_bias, as parts to add over their first axis.
        """
        grad_D, *of_steps = self.gradients(grad, dt, s, grad_x, grad_B, grad_C)
        grad_A, grad_bias = self.decay_gradients(dt, grad_delta, *of_steps)
        return grad_A, grad_D, grad_bias

    def decay_gradients(self, dt: Tensor, grad_delta: Tensor, *of_steps: Tensor) -> Tuple[Tensor, Tensor]:
        """Fills grad_delta from gradients of dt and the two parts of those of s; returns parts of those of A_log and
        delta_bias, to add over their first axis."""
        grad_dt, edges, rows = of_steps
        grad_A, grad_bias = self.empty(self.batch, self.orders, self.heads), self.empty(self.batch, self.heads)
        self.decay_kernels.decay_backward[self.batch,](
            *self.decay_operands(), dt, grad_dt, edges, rows, grad_delta, grad_A, grad_bias,
            self.length, self.heads, grad_delta.shape[-1], rows.shape[0], *self.grid, *self.decay_strides(),
            *grad_delta.stride()[:2], ORDERS=self.orders, **self.decay_constants,
            BT=self.step(DECAY_BACKWARD.tokens), BH=self.most_heads(8), num_warps=DECAY_BACKWARD.warps,
        )  # fmt: skip
        return grad_A, grad_bias
