"""timm's mixup and cutmix as numbers of the host, which go to the device in one copy, and three operations there."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target, rand_bbox_minmax

from ..errors import UserError

# columns of the numbers, before those of the lines and columns that are the other image's
PIXELS, TARGETS, LINES = 0, 1, 2


def draw(mixup: Mixup, count: int, size: tuple[int, int]) -> np.ndarray:
    """Numbers (n, 2 + height + width) for a batch of `count` images; n is 1 where the batch has them in common.

    They are drawn from NumPy's generator, with timm's distributions.
    """
    if mixup.mode == 'batch':
        share, cuts = (np.asarray(value)[None] for value in mixup._params_per_batch())
    else:
        share, cuts = mixup._params_per_elem(count // 2 if mixup.mode == 'pair' else count)
    share, cuts = share.astype(np.float64), cuts & (share != 1)
    height, width = size
    result = np.zeros((len(share), LINES + height + width), np.float32)
    result[:, PIXELS] = result[:, TARGETS] = share
    if cuts.any():
        top, bottom, left, right = _boxes(mixup, share, size)
        for first, last, line in (
            (top, bottom, slice(LINES, LINES + height)), (left, right, slice(LINES + height, None))
        ):  # fmt: skip
            place = np.arange(result[:, line].shape[1])
            result[:, line] = cuts[:, None] & (place >= first[:, None]) & (place < last[:, None])
        result[cuts, PIXELS] = 1
        if mixup.correct_lam or mixup.cutmix_minmax is not None:
            result[cuts, TARGETS] = (1 - (bottom - top) * (right - left) / (height * width))[cuts]
    return np.concatenate([result, result[::-1]]) if mixup.mode == 'pair' else result


def _boxes(mixup: Mixup, share: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Top, bottom, left and right (n,) of the boxes of cutmix, as `timm.data.mixup.rand_bbox` draws one."""
    if mixup.cutmix_minmax is not None:
        low, high = mixup.cutmix_minmax
        if any(int(side * low) == int(side * high) for side in size):  # timm's are below the largest
            raise UserError(f'--cutmix-minmax {low:g} {high:g} leaves no box in images of {size[1]} x {size[0]} pixels')
        return rand_bbox_minmax((*size,), mixup.cutmix_minmax, len(share))
    sides = []
    for side in size:
        cut = (side * np.sqrt(1 - share)).astype(int)
        centre = np.random.randint(0, side, len(share))
        sides += [np.clip(centre - cut // 2, 0, side), np.clip(centre + (cut + 1) // 2, 0, side)]
    return tuple(sides)


def mix(
    mixup: Mixup, numbers: torch.Tensor, images: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and soft targets (B, classes), each mixed with its counterpart in the reversed batch."""
    lines, columns = numbers[:, LINES:].split(images.shape[2:], 1)
    mine = numbers[:, PIXELS, None, None, None]
    if mixup.cutmix_alpha > 0:  # 0 in the box, and 1 around it
        mine = torch.addcmul(mine, lines[:, None, :, None], columns[:, None, None, :], value=-1)
    images = torch.lerp(images.flip(0), images, mine.to(images.dtype))
    share = numbers[:, TARGETS, None]
    return images, mixup_target(targets, mixup.num_classes, share, mixup.label_smoothing, mixup.multi_label)
