"""The inside of a Vision Mamba 2 mixer of masked images, whose tokens are visible patches alone, as one dispatcher op.

The kernels of `grid_mixer_op`, but for the convolution, and for that of decays, which finds which tokens are neighbours
and how they follow by columns; the state space dual sees the places of tokens in its sums of decays alone.
"""

from typing import Any, List, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, masked_grid_mixer_flops, register
from . import grid_mixer_op
from .grid_mixer_op import GridMixer, differentiate_by, gradients, save_operands
from .masked_conv_launch import MaskedConv
from .masked_places_launch import Decays, Places, find_places
from .ssd_launch import Grid, Ssd


def check_keep(given: operands.GridMixer) -> Tensor:
    """keep, whose values are not looked at; raises ValueError where kernels would read past its ends."""
    batch, length, _ = given.zxbcdt.shape
    keep, kept = given.keep, length - given.prefix
    assert keep is not None
    if keep.shape != (batch, kept) or keep.dtype != torch.int64 or keep.device != given.zxbcdt.device:
        what = f'{keep.dtype} {list(keep.shape)} on {keep.device}'
        raise ValueError(f'places of {batch} x {kept} tokens on a grid are not {what}')
    return keep


def empty_places(given: operands.GridMixer) -> Places:
    batch, length, _ = given.zxbcdt.shape
    return Places.empty(given.zxbcdt, batch, length, not given.rows or given.A_log.shape[0] == 2)


class MaskedGridMixer(GridMixer):
    """`GridMixer` of visible patches; `forward` fills `places`, which `backward` wants filled."""

    def __init__(self, given: operands.GridMixer, places: Places) -> None:
        super().__init__(given)
        self.grid = Grid(given.prefix, 1, given.zxbcdt.shape[1] - given.prefix)  # of what `columns` does not say
        self.places = places
        self.columns = places.columns if places.columns.shape[1] else None

    def decays(self, ssd: Ssd) -> Tuple[Tensor, Tensor]:
        kernels, keep = self.kernels['masked_places_kernels'], check_keep(self.given)
        grid = Grid(self.given.prefix, self.given.height, self.given.width)
        if ssd.length > ssd.span:
            find_places(kernels, keep, grid, self.places, None)
            return ssd.decays()
        dt, s = ssd.empty_decays()
        find_places(kernels, keep, grid, self.places, Decays(ssd, dt, s))
        return dt, s

    def convolution(self) -> Any:
        x = self.split(self.zxbcdt)[1]
        kernels = self.kernels['masked_conv_kernels']
        return MaskedConv(kernels, x, self.given.conv, self.given.conv_bias, self.places.neighbours)


def run(*flat: Any) -> Tuple[Tensor, ...]:
    """The output, and for the backward pass the convolution's, dt, s, the sum before the norm, and `Places`."""
    given = operands.GridMixer(*flat)
    places = empty_places(given)
    with torch.cuda.device_of(given.zxbcdt):
        return *MaskedGridMixer(given, places).forward(), *places


def fake(*flat: Any) -> Tuple[Tensor, ...]:
    return *grid_mixer_op.fake(*flat), *empty_places(operands.GridMixer(*flat))


def run_backward(
    grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor, neighbours: Tensor, columns: Tensor, *flat: Any
) -> List[Tensor]:
    mixer = MaskedGridMixer(operands.GridMixer(*flat), Places(neighbours, columns))
    return gradients(mixer, grad, xbc, dt, s, y)


def fake_backward(
    grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor, neighbours: Tensor, columns: Tensor, *flat: Any
) -> List[Tensor]:
    return grid_mixer_op.fake_backward(grad, xbc, dt, s, y, *flat)


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Any, ...]:
    return differentiate_by(torch.ops.vim_timm.triton_masked_grid_mixer_backward.default, ctx, grad)


_KEPT = 'Tensor xbc, Tensor dt, Tensor s, Tensor y, Tensor neighbours, Tensor columns'
register(
    'triton_masked_grid_mixer',
    f'({schema(operands.GridMixer)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
    f'(Tensor grad, {_KEPT}, {schema(operands.GridMixer)}) -> Tensor[]',
    Kernel(run, fake, save_operands, differentiate, run_backward, fake_backward),
    masked_grid_mixer_flops,
)
