"""timm's basic augmentation for whole batches on the device: random resized crop, flips and colour jitter."""

import itertools
import math
from collections.abc import Sequence

import torch

ATTEMPTS = 10  # how often a random crop may miss the image before the centre is taken, as in timm

# Places in the row of uniform numbers that an image's augmentation is a function of.
AREA, ASPECT, TOP, LEFT, FILTER, HFLIP, VFLIP, ORDER = (
    0,
    ATTEMPTS,
    2 * ATTEMPTS,
    *(2 * ATTEMPTS + i for i in range(1, 6)),
)
FACTORS = slice(2 * ATTEMPTS + 6, 2 * ATTEMPTS + 9)
DRAWS = 2 * ATTEMPTS + 9


def random_boxes(
    uniform: torch.Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of timm's RandomResizedCropAndInterpolation as (top, left, height, width), each (B,) float32.

    Args:
        uniform: (B, DRAWS) in [0, 1).
    """
    area = (scale[0] + (scale[1] - scale[0]) * uniform[:, AREA : AREA + ATTEMPTS]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniform[:, ASPECT : ASPECT + ATTEMPTS])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths <= width) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)
    # without any: the largest centred box of an allowed aspect
    shape = min(max(width / height, min(ratio)), max(ratio))
    centre = (min(height, round(width / shape)), min(width, round(height * shape)))
    found = fits.any(1)
    h = torch.where(found, heights.gather(1, first)[:, 0], float(centre[0]))
    w = torch.where(found, widths.gather(1, first)[:, 0], float(centre[1]))
    top = torch.where(found, (uniform[:, TOP] * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(found, (uniform[:, LEFT] * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return top, left, h, w


def resampling(start: torch.Tensor, length: torch.Tensor, size: int, out: int, cubic: torch.Tensor) -> torch.Tensor:
    """Weights (B, out, size) of Pillow's antialiased resize of the pixels [start, start + length) of a line to `out`.

    Args:
        start, length: (B,) whole numbers as float32.
        cubic: (B,) bool; bicubic (Keys, a = -0.5) or else bilinear.
    """
    scale = (length / out)[:, None, None]
    pixel = torch.arange(size, device=start.device)
    centre = start[:, None, None] + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
    x = (pixel + 0.5 - centre).abs() / scale.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    keys = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = torch.where(cubic[:, None, None], keys, (1 - x).clamp(min=0))
    weights = weights * ((pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pillow's brightness (0), contrast (1) and saturation (2), in each image's own order.

    Args:
        images: (B, C, H, W), whole numbers of 0..255 as float32.
        factors: (B, 3), of the three.
        order: (B, 3), a permutation of them.
    """
    luma = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    for place in range(3):
        kind = order[:, place, None, None, None]
        grey = (images * luma).sum(1, keepdim=True).round() if images.shape[1] == 3 else images
        mean = grey.mean((1, 2, 3), keepdim=True).round()
        base = torch.where(kind == 0, 0.0, torch.where(kind == 1, mean, grey))
        factor = factors.gather(1, order[:, place : place + 1])[:, :, None, None]
        images = (base + factor * (images - base)).clamp(0, 255).floor()
    return images


class Augmentation:
    """`augmentation(images, uniform)`: every image's result depends on its own row of uniform numbers alone.

    Args:
        size: height and width of the result.
        interpolation: bilinear, bicubic, or random (one of the two for each image).
    """

    def __init__(
        self, size: tuple[int, int], scale: Sequence[float], ratio: Sequence[float], hflip: float, vflip: float,
        color_jitter: float, interpolation: str,
    ):  # fmt: skip
        self.size, self.scale, self.ratio, self.hflip, self.vflip = size, scale, ratio, hflip, vflip
        self.color_jitter = color_jitter
        self.cubic_share = {'bilinear': 0.0, 'bicubic': 1.0, 'random': 0.5}[interpolation]

    def __call__(self, images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            images: (B, C, H, W) uint8.
            uniform: (B, DRAWS) float32 in [0, 1).

        Returns:
            (B, C, *size) float32 with whole numbers of 0..255.
        """
        height, width = images.shape[2:]
        top, left, h, w = random_boxes(uniform, height, width, self.scale, self.ratio)
        cubic = uniform[:, FILTER] < self.cubic_share
        rows = resampling(top, h, height, self.size[0], cubic)
        columns = resampling(left, w, width, self.size[1], cubic)
        # a flipped image is one whose weights are
        rows = torch.where((uniform[:, VFLIP] < self.vflip)[:, None, None], rows.flip(1), rows)
        columns = torch.where((uniform[:, HFLIP] < self.hflip)[:, None, None], columns.flip(1), columns)
        # Pillow rounds and clips between its two passes as well, in an order that depends on its version
        result = (rows[:, None] @ images.float() @ columns.mT[:, None]).round().clamp(0, 255)
        if self.color_jitter:
            orders = torch.tensor(list(itertools.permutations(range(3))), device=images.device)
            order = orders[(uniform[:, ORDER] * len(orders)).long()]
            low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
            result = jitter(result, low + (high - low) * uniform[:, FACTORS], order)
        return result
