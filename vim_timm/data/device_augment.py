"""timm's basic augmentation for whole batches on the device: random resized crop, flips and colour jitter.

Numbers of the host enter as scalars, never as tensors: a copy of one would make the host wait for the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

ATTEMPTS = 10  # how often a random crop may miss the image before the centre is taken, as in timm

# Places in the row of uniform numbers that an image's augmentation is a function of.
AREA, ASPECT, TOP, LEFT = 0, ATTEMPTS, 2 * ATTEMPTS, 2 * ATTEMPTS + 1
REST = LEFT + 1
HFLIP, VFLIP = REST + 1, REST + 2
DRAWS = REST + 7

# Places in the row of numbers that `Augmentation.numbers` makes of it: where the crop's lines and columns are, and the
# rest of the uniform ones.
LINES = 8
FILTER, ORDER, FACTORS = LINES, LINES + 3, slice(LINES + 4, LINES + 7)
NUMBERS = LINES + DRAWS - REST


def random_sides(
    area: torch.Tensor, aspect: torch.Tensor, areas: Sequence[float], ratio: Sequence[float], most: tuple[int, int],
    parts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Heights and widths (2, B) of the first attempt that fits, and whether one does (B,).

    Args:
        area, aspect: (B, attempts) in [0, 1): where between its bounds the area is, and the logarithm of the ratio.
        areas, ratio: bounds, in pixels and as width / height.
        most: the largest height and width.
        parts: (B, 1) among how many boxes the area is shared; None for one.
    """
    pixels = area * (areas[1] - areas[0]) + areas[0]
    root = (pixels if parts is None else pixels / parts).sqrt()
    low, high = math.log(ratio[0]) / 2, math.log(ratio[1]) / 2
    bend = (aspect * (high - low) + low).exp()
    heights, widths = (root / bend).round(), (root * bend).round()
    fits = (heights <= most[0]) & (widths <= most[1])
    first = fits.int().argmax(1, keepdim=True)
    return torch.stack([heights, widths]).gather(2, first.expand(2, -1, -1))[..., 0], fits.any(1)


def random_boxes(
    uniform: torch.Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of timm's RandomResizedCropAndInterpolation as (top, left, height, width), each (B,) float32.

    Args:
        uniform: (B, DRAWS) in [0, 1).
    """
    area, aspect = uniform[:, AREA : AREA + ATTEMPTS], uniform[:, ASPECT : ASPECT + ATTEMPTS]
    areas = [share * height * width for share in scale]
    sides, found = random_sides(area, aspect, areas, ratio, (height, width))
    sides = sides.clamp(min=1)  # of an image of few pixels they may be rounded to none
    # without any: the largest centred box of an allowed aspect
    shape = min(max(width / height, min(ratio)), max(ratio))
    h = torch.where(found, sides[0], float(max(1, min(height, round(width / shape)))))
    w = torch.where(found, sides[1], float(max(1, min(width, round(height * shape)))))
    # a little less than half of the places that are left is the middle, rounded down
    place = torch.where(found, uniform[:, TOP : LEFT + 1].mT, 0.4999)
    return (place[0] * (height + 1 - h)).floor(), (place[1] * (width + 1 - w)).floor(), h, w


def resampling(
    start: torch.Tensor, end: torch.Tensor, origin: torch.Tensor, step: torch.Tensor, size: int, out: int,
    cubic: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Weights (B, out, size) of Pillow's antialiased resize of the pixels [start, end) of a line.

    Args:
        start, end: (B,) whole numbers as float32.
        origin: (B,) where the result begins: at `start`, or at `end` if it goes backwards.
        step: (B,) pixels of the line for one of the result, negative if that goes backwards.
        cubic: (B,) bool; bicubic (Keys, a = -0.5) or else bilinear. None: all are bilinear.
    """
    pixel, place = (torch.arange(0.5, count, device=start.device) for count in (size, out))
    centre = torch.addcmul(origin[:, None], place, step[:, None])
    x = (pixel - centre[:, :, None]).abs_() / step.abs().clamp_(min=1)[:, None, None]
    weights = (1 - x).clamp_(min=0)
    if cubic is not None:  # Keys' kernel in powers of what is left of the distances 1 and 2
        near, far = weights, (2 - x).clamp_(min=0)
        keys = torch.addcmul(near * near * torch.rsub(near, 1, alpha=2), far * far, far - 1, value=0.5)
        weights = torch.where(cubic[:, None, None], keys, near)
    weights *= ((pixel > start[:, None]) & (pixel < end[:, None]))[:, None]
    return weights / weights.sum(2, keepdim=True)


def grey_of(images: torch.Tensor) -> torch.Tensor:
    """Pillow's grey (B, 1, H, W) of whole numbers of 0..255 as float32, exactly: its weights have 16 bits."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.split(1, 1)
    grey = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536).add_(blue, alpha=7471 / 65536)
    return grey.add_(0.5).floor_()


def jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pillow's brightness (0), contrast (1) and saturation (2), in each image's own order.

    Args:
        images: (B, C, H, W), whole numbers of 0..255 as float32; the last of two or four channels is alpha, and stays.
        factors: (B, 3), of the three.
        order: (B, 3), a permutation of them.
    """
    alpha = images[:, images.shape[1] - (images.shape[1] in (2, 4)) :]
    images = images[:, : images.shape[1] - alpha.shape[1]]
    factors = factors.gather(1, order)
    for factor, flat, grey_share in zip(
        *(part.unsqueeze(2).unsqueeze(3).split(1, 1) for part in (factors, (order == 1).float(), (order == 2).float()))
    ):
        grey = grey_of(images)
        mean = grey.mean((1, 2, 3), keepdim=True).add_(0.5).floor_()
        base = torch.addcmul(mean * flat, grey, grey_share)  # black, the mean, or the grey image
        images = torch.addcmul(base, images - base, factor).clamp_(0, 255).floor_()
    return torch.cat([images, alpha], 1) if alpha.shape[1] else images


class Augmentation:
    """`augmentation(images, numbers)`: every image's result depends on its own row of numbers alone.

    Args:
        size: height and width of the result.
        interpolation: bilinear, bicubic, or random (one of the two for each image).
        policy: what is done after crop, flips and colour jitter, by `policy.draws` more numbers.

    Attributes:
        draws: how many uniform numbers an image takes.
        columns: how many numbers `numbers` makes of them.
    """

    def __init__(
        self, size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], hflip: float, vflip: float,
        color_jitter: float, interpolation: str, policy: Any = None,
    ):  # fmt: skip
        self.size, self.scale, self.ratio, self.hflip, self.vflip = size, scale, ratio, hflip, vflip
        self.color_jitter, self.policy = color_jitter, policy
        more = policy.draws if policy else 0
        self.draws, self.columns = DRAWS + more, NUMBERS + more
        self.cubic_share = {'bilinear': 0.0, 'bicubic': 1.0, 'random': 0.5}[interpolation]

    def numbers(self, uniform: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the augmentation of images of a size follows, for all images of an epoch at once.

        Args:
            uniform: (n, draws) float32 in [0, 1).

        Returns:
            (n, columns) float32.
        """
        top, left, h, w = random_boxes(uniform, height, width, self.scale, self.ratio)
        start, length = torch.stack([top, left], 1), torch.stack([h, w], 1)
        end = start + length
        step = torch.stack([h / self.size[0], w / self.size[1]], 1)
        flip = torch.stack([uniform[:, VFLIP] < self.vflip, uniform[:, HFLIP] < self.hflip], 1)
        origin, step = torch.where(flip, end, start), torch.where(flip, -step, step)
        return torch.cat([start, end, origin, step, uniform[:, REST:]], 1)

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            images: (B, C, H, W) uint8.
            numbers: (B, columns) float32.

        Returns:
            (B, C, *size) float32 with whole numbers of 0..255.
        """
        result = self.cropped(images, numbers)
        if self.color_jitter:
            first = (numbers[:, ORDER] * 6).long()  # of six orders
            one, two = first // 2, (first // 2 + first % 2 + 1) % 3
            low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
            order = torch.stack([one, two, 3 - one - two], 1)
            result = jitter(result, numbers[:, FACTORS] * (high - low) + low, order)
        return self.policy(result, numbers[:, NUMBERS:]) if self.policy else result

    def cropped(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Random resized crop and flips, which take and return the same."""
        height, width = images.shape[2:]
        # both lines at once, the shorter one as a part of the longer
        lines = numbers[:, :LINES].unflatten(1, (-1, 2)).permute(1, 2, 0).flatten(1)
        cubic = (numbers[:, FILTER] < self.cubic_share).repeat(2) if self.cubic_share else None
        start, end, origin, step = lines.unbind()
        weights = resampling(start, end, origin, step, max(height, width), max(self.size), cubic)
        rows, columns = weights.chunk(2)
        # Pillow rounds and clips between its two passes as well, in an order that depends on its version
        across = images.flatten(1, 2).float() @ columns[:, : self.size[1], :width].mT
        result = rows[:, None, : self.size[0], :height] @ across.unflatten(1, (-1, height))
        return result.round_().clamp_(0, 255)
