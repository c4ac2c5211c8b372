"""timm's RandAugment for whole batches on the device.

A layer does one thing to each image, so three steps do all of them: one affine map, one table of grey levels a channel,
and one blend with another image; each is the identity for the images that are not its own. Pillow's arithmetic is kept
as far as float32 can: maps differ by one grey level here and there, the rest is exact but for ties.
"""

import math

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import RandAugment as TimmRandAugment

from .device_augment import grey_of

# Places in a layer's uniform numbers.
KIND, APPLIED, LEVEL, SIGN, FILTER, DRAWS = range(6)

GEOMETRIC = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')
ENHANCE = ('Color', 'Contrast', 'Brightness', 'Sharpness')
OPS = (
    *('AutoContrast', 'Equalize', 'Invert', 'Posterize', 'PosterizeIncreasing', 'Solarize', 'SolarizeIncreasing'),
    *('SolarizeAdd', *GEOMETRIC, *ENHANCE, *(f'{name}Increasing' for name in ENHANCE)),
)
FILTERS = {Image.Resampling.BILINEAR: 0.0, Image.Resampling.BICUBIC: 1.0}  # share of bicubic images


def supports(policy: object) -> bool:
    """Whether `RandAugment` can do what timm's transform does."""
    return (
        isinstance(policy, TimmRandAugment)
        and policy.choice_weights is None
        and all(op.name in OPS for op in policy.ops)
        and all(isinstance(op.kwargs['resample'], tuple) or op.kwargs['resample'] in FILTERS for op in policy.ops)
    )


class RandAugment:
    """`randaugment(images, uniform)`: every image's result depends on its own row of uniform numbers alone.

    Args:
        policy: timm's transform, which `supports` accepts.
    """

    def __init__(self, policy: TimmRandAugment):
        op = policy.ops[0]  # they differ by their names alone
        self.names = [op.name for op in policy.ops]
        self.layers, self.probability = policy.num_layers, op.prob
        self.magnitude, self.deviation = float(op.magnitude), float(op.magnitude_std)
        self.most = float(op.magnitude_max or 10)
        self.translation = op.hparams.get('translate_pct', 0.45)
        self.fill = [float(value) for value in op.kwargs['fillcolor']]
        self.cubic_share = 0.5 if isinstance(op.kwargs['resample'], tuple) else FILTERS[op.kwargs['resample']]
        self.draws = self.layers * DRAWS

    def __call__(self, images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            images: (B, C, H, W), whole numbers of 0..255 as float32.
            uniform: (B, draws) in [0, 1).
        """
        for numbers in uniform.unflatten(1, (self.layers, DRAWS)).unbind(1):
            images = self._layer(images, numbers)
        return images

    def levels(self, uniform: torch.Tensor) -> torch.Tensor:
        """Magnitudes (B,) for numbers (B,) in [0, 1)."""
        if self.deviation == math.inf:
            return (uniform * self.magnitude).clamp(0, self.most)
        normal = torch.erfinv(2 * uniform - 1) * (math.sqrt(2) * self.deviation) if self.deviation else 0 * uniform
        return (normal + self.magnitude).clamp(0, self.most)

    def kinds(self, numbers: torch.Tensor) -> torch.Tensor:
        """Places (B,) in `names` of what a layer does to each image; -1 for nothing."""
        kind = (numbers[:, KIND] * len(self.names)).long()
        return torch.where(numbers[:, APPLIED] < self.probability, kind, -1)

    def _layer(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(self.names), device=images.device)
        chosen = dict(zip(self.names, (self.kinds(numbers)[:, None] == places).unbind(1)))
        level = self.levels(numbers[:, LEVEL]) / 10
        signed = torch.where(numbers[:, SIGN] > 0.5, -level, level)
        if chosen.keys() & {*GEOMETRIC}:
            matrix = self._matrix(chosen, signed, images.shape[2], images.shape[3])
            cubic = numbers[:, FILTER] < self.cubic_share if self.cubic_share else None
            images = affine(images, matrix, cubic, self.fill)
        factor = enhancement(chosen, level, signed)
        tables = grey_tables(images, chosen, level, factor).expand(-1, images.shape[1], -1)
        images = tables.gather(2, images.flatten(2).long()).view_as(images)
        return blended(images, chosen, factor)

    def _matrix(
        self, chosen: dict[str, torch.Tensor], signed: torch.Tensor, height: int, width: int
    ) -> list[torch.Tensor]:
        """Six numbers (B,) a b c d e f: pixel (x, y) around the centre comes from (ax + by + c, dx + ey + f)."""
        none = torch.zeros_like(signed)
        turn, shear_x, shear_y, move_x, move_y = (
            signed * chosen[name] if name in chosen else none for name in GEOMETRIC
        )
        turn = turn * math.radians(30)
        sine, cosine = torch.sin(turn), torch.cos(turn)
        b, d = torch.sub(-sine, shear_x, alpha=-0.3), torch.add(sine, shear_y, alpha=0.3)
        c = torch.add(shear_x * (0.15 * height), move_x, alpha=self.translation * width)
        f = torch.add(shear_y * (0.15 * width), move_y, alpha=self.translation * height)
        return [cosine, b, c, d, cosine, f]


def affine(
    images: torch.Tensor, matrix: list[torch.Tensor], cubic: torch.Tensor | None, fill: list[float]
) -> torch.Tensor:
    """Pillow's affine transform with bilinear, or where `cubic` (B,) says so bicubic (a = -1) interpolation."""
    batch, channels, height, width = images.shape
    x = torch.arange(0.5 - width / 2, width / 2, device=images.device)[None, None]
    y = torch.arange(0.5 - height / 2, height / 2, device=images.device)[None, :, None]
    a, b, c, d, e, f = (number[:, None, None] for number in matrix)
    # where each pixel comes from, across and down (B, H, W)
    across = torch.addcmul(torch.addcmul(c, b, y), a, x) + (width - 1) / 2
    down = torch.addcmul(torch.addcmul(f, d, x), e, y) + (height - 1) / 2
    inside = (across >= -0.5) & (across < width - 0.5) & (down >= -0.5) & (down < height - 0.5)
    first, weights = taps(torch.stack([across, down], 1), cubic)
    count = weights.shape[2]
    offsets = torch.arange(1.0 - count // 2, 1 + count // 2, device=images.device)[:, None, None]
    columns, lines = (first[:, i, None] + offsets for i in range(2))
    columns, lines = columns.clamp_(0, width - 1), lines.clamp_(0, height - 1) * width
    flat, result = images.flatten(2), torch.zeros_like(images)
    for line in range(count):
        places = (lines[:, line, None] + columns).long().view(batch, 1, -1)
        values = flat.gather(2, places.expand(-1, channels, -1)).view(batch, channels, count, height, width)
        result.addcmul_((values * weights[:, None, 0]).sum(2), weights[:, None, 1, line])
    outside = torch.cat([images.new_full((1, 1, 1, 1), value) for value in fill], 1)
    # what float32 loses of a whole number would be a grey level when it is cut off, as Pillow does
    return torch.where(inside[:, None], result.add_(1e-3).floor_().clamp_(0, 255), outside)


def taps(places: torch.Tensor, cubic: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels (B, n, H, W) before places on a line, and weights (B, n, 2 or 4, H, W) of those around."""
    first = places.floor()
    count = 2 if cubic is None else 4
    offsets = torch.arange(1.0 - count // 2, 1 + count // 2, device=places.device)[:, None, None]
    distance = ((places - first)[:, :, None] - offsets).abs_()
    near = (1 - distance).clamp_(min=0)
    if cubic is None:
        return first, near
    far = (2 - distance).clamp_(min=0)
    keys = torch.addcmul(far * far * (far - 1), near * near, near + 0.5, value=-2)
    return first, torch.where(cubic[:, None, None, None, None], keys, near)


def enhancement(chosen: dict[str, torch.Tensor], level: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    """Factors (B,) of ImageEnhance: 0.1 to 1.9, or away from 1 as the level increases."""
    if any(f'{name}Increasing' in chosen for name in ENHANCE):
        return (signed * 0.9 + 1).clamp(min=0.1)
    return level * 1.8 + 0.1


def grey_tables(
    images: torch.Tensor, chosen: dict[str, torch.Tensor], level: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """What becomes of each grey level (B, C or 1, 256)."""
    grey = torch.arange(256.0, device=images.device)[None, None]
    level, factor = level[:, None, None], factor[:, None, None]

    def posterized(bits: torch.Tensor) -> torch.Tensor:
        step = torch.exp2((8 - bits).clamp_(min=0)).round_()
        return (grey / step).floor_() * step

    def solarized(threshold: torch.Tensor) -> torch.Tensor:
        return torch.where(grey < threshold, grey, 255 - grey)

    def contrast() -> torch.Tensor:
        mean = (grey_of(images).mean((2, 3)) + 0.5).floor_()[..., None]
        return torch.addcmul(mean, factor, grey - mean).clamp_(0, 255).floor_()

    def stretched() -> torch.Tensor:
        low, high = (part[..., None] for part in (images.amin((2, 3)), images.amax((2, 3))))
        table = ((grey - low) * 255 / (high - low).clamp(min=1) + 1e-4).floor_().clamp_(0, 255)
        return torch.where(high > low, table, grey)

    makers = {
        'Invert': lambda: 255 - grey,
        'Solarize': lambda: solarized((256 * level).floor_()),
        'SolarizeIncreasing': lambda: solarized(256 - (256 * level).floor_().clamp_(max=256)),
        'SolarizeAdd': lambda: torch.where(
            grey < 128, (grey + (110 * level).floor_().clamp_(max=128)).clamp_(max=255), grey
        ),
        'Posterize': lambda: posterized((4 * level).floor_()),
        'PosterizeIncreasing': lambda: posterized(4 - (4 * level).floor_()),
        **dict.fromkeys(('Brightness', 'BrightnessIncreasing'), lambda: (grey * factor).floor_().clamp_(0, 255)),
        **dict.fromkeys(('Contrast', 'ContrastIncreasing'), contrast),
        'AutoContrast': stretched,
        'Equalize': lambda: equalizing(images),
    }
    tables = grey.expand(len(images), 1, -1)
    for name in chosen:
        if name in makers:
            tables = torch.where(chosen[name][:, None, None], makers[name](), tables)
    return tables


def equalizing(images: torch.Tensor) -> torch.Tensor:
    """Tables (B, C, 256) of Pillow's equalize."""
    places = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, places, torch.ones_like(places))
    last = counts.gather(2, places.amax(2, keepdim=True))
    step = (places.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    tables = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    grey = torch.arange(256, device=images.device)
    return torch.where(step > 0, tables, grey).float()


def blended(images: torch.Tensor, chosen: dict[str, torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
    """Saturation, a blend with the grey image, and sharpness, one with the smoothed image."""
    other = images
    for name, base in (('Color', grey_of), ('Sharpness', smoothed)):
        for full in {name, f'{name}Increasing'} & chosen.keys():
            other = torch.where(chosen[full][:, None, None, None], base(images), other)
    # an image that is its own other stays as it is
    return torch.addcmul(other, images - other, factor[:, None, None, None]).clamp_(0, 255).floor_()


def smoothed(images: torch.Tensor) -> torch.Tensor:
    """Pillow's SMOOTH filter, which leaves the outermost pixels as they are."""
    if min(images.shape[2:]) < 3:
        return images
    inner = F.avg_pool2d(images, 3, 1, divisor_override=1) + 4 * images[:, :, 1:-1, 1:-1]
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = (inner / 13 + 0.5).floor_()
    return result
