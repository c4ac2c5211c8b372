"""The inside of a Vision Mamba 2 mixer of masked images, whose tokens are visible patches alone, as one dispatcher op.

The kernels of `grid_mixer_op`, but for the convolution, and one before them that finds which tokens are neighbours and
how they follow by columns; the state space dual sees the places of tokens in its sums of decays alone.
"""

from typing import Any, List, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, masked_grid_mixer_flops, register
from . import grid_mixer_op
from .grid_mixer_op import GridMixer, differentiate_by, gradients, save_operands
from .masked_conv_launch import MaskedConv, Places, empty_places, find_places
from .ssd_launch import Grid


def check_keep(given: operands.GridMixer) -> Tensor:
    """keep, whose values are not looked at; raises ValueError where kernels would read past its ends."""
    batch, length, _ = given.zxbcdt.shape
    keep, kept = given.keep, length - given.prefix
    assert keep is not None
    if keep.shape != (batch, kept) or keep.dtype != torch.int64 or keep.device != given.zxbcdt.device:
        what = f'{keep.dtype} {list(keep.shape)} on {keep.device}'
        raise ValueError(f'places of {batch} x {kept} tokens on a grid are not {what}')
    return keep


class MaskedGridMixer(GridMixer):
    def __init__(self, given: operands.GridMixer, places: Places) -> None:
        super().__init__(given)
        self.grid = Grid(given.prefix, 1, given.zxbcdt.shape[1] - given.prefix)  # of what `columns` does not say
        self.neighbours = places.neighbours
        self.columns = None if given.rows and given.A_log.shape[0] == 1 else places.columns

    def convolution(self) -> Any:
        x = self.split(self.zxbcdt)[1]
        kernels = self.kernels['masked_conv_kernels']
        return MaskedConv(kernels, x, self.given.conv, self.given.conv_bias, self.neighbours)


def run(*flat: Any) -> Tuple[Tensor, ...]:
    """The output, and for the backward pass the convolution's, dt, s, the sum before the norm, and `Places`."""
    given = operands.GridMixer(*flat)
    keep, grid = check_keep(given), Grid(given.prefix, given.height, given.width)
    with torch.cuda.device_of(keep):
        places = find_places(grid_mixer_op.kernel_modules()['masked_conv_kernels'], keep, grid)
        return *MaskedGridMixer(given, places).forward(), *places


def fake(*flat: Any) -> Tuple[Tensor, ...]:
    x = flat[0]
    return *grid_mixer_op.fake(*flat), *empty_places(x, *x.shape[:2])


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
