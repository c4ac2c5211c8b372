"""Masked images: which patches are there, their pixels, and which of them are neighbours."""

from typing import Optional, Tuple

from torch import Tensor

from vim_timm.ops.backends import run_if_there
from vim_timm.ops.operands import Noise, Pixels, Visible


def random_mask(noise: Noise) -> Optional[Tuple[Tensor, Tensor]]:
    """The patches of least noise, those of equal noise in their order, NaN last, for `layers.masking`.

    Args:
        noise: See `operands.Noise`.

    Returns:
        Their places (B, K) int64, ascending, and the mask (B, L) float32, 1 where a patch is removed; None where no
        backend draws it in one.
    """
    return run_if_there('random_mask', noise, noise.noise)


def visible_pixels(pixels: Pixels) -> Optional[Tensor]:
    """The pixels of visible patches, for `layers.patch_embed`.

    Args:
        pixels: See `operands.Pixels`; x takes no gradient.

    Returns:
        (B, K, C * height * width) in the dtype that is asked for; NaN for a place that is none of the grid, which a GPU
        would have to be waited for. None where no backend takes them in one.
    """
    return run_if_there('visible_pixels', pixels, pixels.x)


def visible_neighbours(visible: Visible) -> Optional[Tensor]:
    """Which tokens of masked images are neighbours, for `fused_grid_mixer`; the same for all blocks of a model.

    Args:
        visible: See `operands.Visible`.

    Returns:
        (10, B, L) int32: the token that each of nine taps meets at a token, -1 for none, and the tokens by columns of
        their image. None where no backend looks them up.
    """
    return run_if_there('visible_neighbours', visible, visible.keep)
