"""The inside of a Vision Mamba 2 mixer of masked images, whose tokens are visible patches alone, as one dispatcher op.

The kernels of `grid_mixer_op`, but for the convolution. Which tokens are neighbours, and how they follow by columns, is
found by an operator of its own, once for all blocks; the state space dual sees the places of tokens in its sums of
decays alone.
"""

from typing import Any, List, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, masked_grid_mixer_flops, register, register_inference
from . import grid_mixer_op
from .grid_mixer_op import GridMixer, differentiate_by, gradients, save_operands
from .launch import check
from .masked_conv_launch import MaskedConv, empty_neighbours, find_neighbours
from .ssd_launch import Grid


class MaskedGridMixer(GridMixer):
    def __init__(self, given: operands.GridMixer) -> None:
        super().__init__(given)
        batch, length, _ = given.zxbcdt.shape
        shape = (10, batch, length)
        neighbours = check('neighbours of tokens', given.neighbours, shape, torch.int32, given.zxbcdt)
        self.neighbours = neighbours.contiguous()
        self.grid = Grid(given.prefix, 1, length - given.prefix)  # of what `columns` does not say
        self.columns = None if given.rows and given.A_log.shape[0] == 1 else self.neighbours[9]

    def convolution(self) -> Any:
        x = self.split(self.zxbcdt)[1]
        kernels = self.kernels['masked_conv_kernels']
        return MaskedConv(kernels, x, self.given.conv, self.given.conv_bias, self.neighbours)


def with_neighbours(given: operands.GridMixer) -> operands.GridMixer:
    """The operands, whose neighbours are made of `keep` if nobody has."""
    if given.neighbours is not None:
        return given
    batch, kept = given.zxbcdt.shape[0], given.zxbcdt.shape[1] - given.prefix
    what = f'places of {batch} x {kept} tokens on a grid'
    keep = check(what, given.keep, (batch, kept), torch.int64, given.zxbcdt)
    found = torch.ops.vim_timm.triton_visible_neighbours.default(keep, given.prefix, given.height, given.width)
    flat: Any = [*given[:-2], found, given.out_proj]  # torch 2.6 compiles no `_replace`
    return operands.GridMixer(*flat)


def find(keep: Tensor, *grid: int) -> Tensor:
    with torch.cuda.device_of(keep):
        return find_neighbours(grid_mixer_op.kernel_modules()['masked_conv_kernels'], operands.Visible(keep, *grid))


def fake_find(keep: Tensor, prefix: int, height: int, width: int) -> Tensor:
    return empty_neighbours(keep, prefix)


def run(*flat: Any) -> Tuple[Tensor, ...]:
    mixer = MaskedGridMixer(operands.GridMixer(*flat))
    with torch.cuda.device_of(mixer.zxbcdt):
        return mixer.forward()


def run_backward(grad: Tensor, xbc: Tensor, dt: Tensor, s: Tensor, y: Tensor, *flat: Any) -> List[Tensor]:
    return gradients(MaskedGridMixer(operands.GridMixer(*flat)), grad, xbc, dt, s, y)


def differentiate(ctx: Any, grad: Tensor, *_: Any) -> Tuple[Any, ...]:
    return differentiate_by(torch.ops.vim_timm.triton_masked_grid_mixer_backward.default, ctx, grad)


register_inference(
    'triton_visible_neighbours', f'({schema(operands.Visible)}) -> Tensor', find, fake_find, lambda shapes: 0
)
register(
    'triton_masked_grid_mixer',
    f'({schema(operands.GridMixer)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    f'(Tensor grad, Tensor xbc, Tensor dt, Tensor s, Tensor y, {schema(operands.GridMixer)}) -> Tensor[]',
    Kernel(run, grid_mixer_op.fake, save_operands, differentiate, run_backward, grid_mixer_op.fake_backward),
    masked_grid_mixer_flops,
)
