"""Sums of many short rows, for gradients of weights and biases; aten's take several times as long as memory."""

import math
from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor

from .launch import multiprocessors


class Launch(NamedTuple):
    """Rows and columns of a step, warps of a program; programs on each multiprocessor that walk over all rows."""

    rows: int
    columns: int
    warps: int
    programs: int


ROWS = Launch(32, 64, 4, 4)
PARTS = Launch(1024, 8, 8, 0)


def new_parts(like: Tensor, rows: int, columns: int, step: int, programs: int, pieces: int = 1) -> Tuple[Tensor, int]:
    """Parts of a sum over rows (count, columns), float32, uninitialized, and the rows that each takes, a multiple of a
    step.

    Args:
        like: On whose device.
        programs: On each multiprocessor, together with those of `pieces` pieces of the columns.
    """
    wanted = max(1, programs * multiprocessors(like.device) // pieces)
    span = step * max(1, math.ceil(rows / (step * wanted)))
    return torch.empty((math.ceil(rows / span), columns), dtype=torch.float32, device=like.device), span


def sum_of_parts(kernels: Any, parts: Tensor, launch: Launch = PARTS) -> Tensor:
    """The sum of contiguous float32 rows, of which a program takes all."""
    rows, columns = parts.shape
    out = torch.empty(columns, dtype=torch.float32, device=parts.device)
    step = min(launch.rows, 1 << max(0, rows - 1).bit_length())
    kernels.sum_parts[math.ceil(columns / launch.columns),](
        parts, out, rows, COLUMNS=columns, BR=step, BC=launch.columns, num_warps=launch.warps
    )
    return out


def sum_of_rows(kernels: Any, x: Tensor, launch: Launch = ROWS) -> Tensor:
    """The float32 sum of contiguous rows."""
    rows, columns = x.shape
    pieces = math.ceil(columns / launch.columns)
    parts, span = new_parts(x, rows, columns, launch.rows, launch.programs, pieces)
    kernels.column_sums[len(parts), pieces](
        x, parts, rows, span, COLUMNS=columns, BR=launch.rows, BC=launch.columns, num_warps=launch.warps
    )
    return sum_of_parts(kernels, parts)
