"""timm's random erasing for whole batches on the device, where its own goes from image to image."""

import torch

from .device_augment import random_sides

ATTEMPTS = 10  # timm's: a long image has no room for many of the boxes
AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's: share of the image, width / height


class Erasing:
    """`erasing(images, uniform)`: where the boxes are depends on an image's own row of uniform numbers alone.

    What fills them is black (the mean), or normal numbers of the device's generator.

    Args:
        probability: that anything of an image is erased.
        mode: const (the mean), rand (a colour for each box) or pixel (a colour for each pixel).
        count: most boxes of an image.
    """

    def __init__(self, probability: float, mode: str, count: int):
        self.probability, self.mode, self.count = probability, mode, count
        self.draws = 2 + count * (2 * ATTEMPTS + 2)

    def __call__(self, images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Erase.

        Args:
            images: (B, C, H, W), normalized.
            uniform: (B, draws) float32 in [0, 1).
        """
        batch, channels, height, width = images.shape
        # as many boxes as the image has, of an area that is shared among them
        boxes = (uniform[:, 1:2] * self.count).floor() + 1
        erased = (uniform[:, :1] < self.probability) & (torch.arange(self.count, device=images.device) < boxes)
        numbers = uniform[:, 2:].reshape(batch * self.count, -1)
        area, aspect, place = numbers.split([ATTEMPTS, ATTEMPTS, 2], 1)
        share = boxes.expand(-1, self.count).reshape(-1, 1)
        areas = [bound * height * width for bound in AREA]
        (h, w), found = random_sides(area, aspect, areas, RATIO, (height - 1, width - 1), share)
        top, left = (place[:, 0] * (height + 1 - h)).floor(), (place[:, 1] * (width + 1 - w)).floor()
        erased = erased & found.view(batch, -1)
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        inside = [
            ((line >= start[:, None]) & (line < (start + side)[:, None])).view(batch, self.count, -1)
            for line, start, side in ((rows, top, h), (columns, left, w))
        ]
        masks = (inside[0] & erased[:, :, None])[..., None] & inside[1][:, :, None]  # (B, count, H, W)
        for mask in masks.unsqueeze(2).unbind(1):
            images = torch.where(mask, self._fill(images), images)
        return images

    def _fill(self, images: torch.Tensor) -> torch.Tensor | float:
        if self.mode == 'const':
            return 0.0
        one = (1, 1) if self.mode == 'rand' else images.shape[2:]
        return torch.randn(*images.shape[:2], *one, dtype=images.dtype, device=images.device)
