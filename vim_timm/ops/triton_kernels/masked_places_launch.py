"""Launch of the kernel that finds how visible patches stand to each other, and sums their decays."""

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .launch import INTERPRET
from .ssd_launch import Grid, Ssd


class PlacesLaunch(NamedTuple):
    """Tokens of a program, tokens with which it compares them at once, and its warps."""

    tokens: int
    others: int
    warps: int


PLACES = PlacesLaunch(64, 64, 4)


class Places(NamedTuple):
    """What kernels know of where tokens (B, L) stand on a grid; int32."""

    neighbours: Tensor  # tokens that meet each of the nine taps (B, 9, L), -1 for none
    columns: Tensor  # the tokens by columns of their image (B, L), or (B, 0) where no order is by them

    @classmethod
    def empty(cls, like: Tensor, batch: int, length: int, columns: bool) -> 'Places':
        """On the device of `like`."""
        shapes = (batch, 9, length), (batch, length if columns else 0)
        return cls(*(like.new_empty(shape, dtype=torch.int32) for shape in shapes))


class Decays(NamedTuple):
    """What `Ssd.decays` returns, to be filled, and whose it is."""

    ssd: Ssd
    dt: Tensor
    s: Tensor


def find_places(
    kernels: Any, keep: Tensor, grid: Grid, places: Places, decays: Optional[Decays], launch: PlacesLaunch = PLACES
) -> None:
    """Fills places of tokens, `grid.prefix` of them before the grid and the others (B, K) on it in cells `keep`; and
    decays over up to `Ssd.span` tokens in the same launch.

    What `keep` holds is not looked at here, as the device would be waited for: an image that has a cell outside the
    grid, or one twice, becomes NaN.
    """
    batch, _, length = places.neighbours.shape
    columns, orders, heads = places.columns.shape[1] > 0, 1, 1
    raw: Tuple[Tensor, ...] = (keep, keep, keep, keep, keep)  # stand-ins that are never read
    strides, constants = (0, 0), {'HAS_BIAS': False, 'STEP': 16, 'BH': 8, 'FAST': not INTERPRET}
    jobs = 9 + columns
    if decays is not None:
        ssd, own = decays.ssd, decays.ssd.decay_constants
        raw = (*ssd.decay_operands()[:3], decays.dt, decays.s)
        strides, orders, heads = ssd.decay_strides()[:2], ssd.orders, ssd.heads
        constants = {'STEP': own['BT'], **{name: own[name] for name in ('HAS_BIAS', 'BH', 'FAST')}}
        jobs = 9 + orders
    kernels.masked_places[math.ceil(length / launch.tokens), jobs, batch](
        keep, *places, *raw, length, heads, *grid, *keep.stride(), *strides,
        HAS_COLUMNS=columns, FIRST_COLUMNS=columns and orders == 1, ORDERS=orders, DECAYS=decays is not None,
        BT=launch.tokens, BU=launch.others, num_warps=launch.warps, **constants,
    )  # fmt: skip
