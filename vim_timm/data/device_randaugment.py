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
        for numbers in uniform.split(DRAWS, 1):
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
        kind = self.kinds(numbers)
        chosen = {name: kind == place for place, name in enumerate(self.names)}
        level = self.levels(numbers[:, LEVEL]) / 10
        signed = torch.where(numbers[:, SIGN] > 0.5, -level, level)
        if chosen.keys() & {*GEOMETRIC}:
            matrix = self._matrix(chosen, signed, images.shape[2], images.shape[3])
            cubic = numbers[:, FILTER] < self.cubic_share if self.cubic_share else None
            images = affine(images, matrix, cubic, self.fill)
        factor = enhancement(chosen, level, signed)
        tables = grey_tables(images, chosen, level, factor)
        places = images.flatten(2).long()
        images = tables.expand(-1, images.shape[1], -1).gather(2, places).view_as(images)
        return blended(images, chosen, factor)

    def _matrix(
        self, chosen: dict[str, torch.Tensor], signed: torch.Tensor, height: int, width: int
    ) -> list[torch.Tensor]:
        """Six numbers (B,) a b c d e f: pixel (x, y) around the centre comes from (ax + by + c, dx + ey + f)."""
        none = torch.zeros_like(signed)
        turn, shear_x, shear_y, move_x, move_y = (
            torch.where(chosen[name], signed, 0.0) if name in chosen else none for name in GEOMETRIC
        )
        sine, cosine = torch.sin(turn * math.radians(30)), torch.cos(turn * math.radians(30))
        along, down = shear_x * 0.3, shear_y * 0.3
        c = along * (height / 2) + move_x * (self.translation * width)
        f = down * (width / 2) + move_y * (self.translation * height)
        return [cosine, along - sine, c, down + sine, cosine, f]


def affine(
    images: torch.Tensor, matrix: list[torch.Tensor], cubic: torch.Tensor | None, fill: list[float]
) -> torch.Tensor:
    """Pillow's affine transform with bilinear, or where `cubic` (B,) says so bicubic (a = -1) interpolation."""
    batch, channels, height, width = images.shape
    x = torch.arange(0.5 - width / 2, width / 2, device=images.device)[None, None]
    y = torch.arange(0.5 - height / 2, height / 2, device=images.device)[None, :, None]
    a, b, c, d, e, f = (number[:, None, None] for number in matrix)
    across, down = a * x + b * y + (c + width / 2), d * x + e * y + (f + height / 2)  # (B, H, W)
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    lines, line_weights = taps(down - 0.5, height, cubic)
    columns, column_weights = taps(across - 0.5, width, cubic)
    flat, result = images.flatten(2), torch.zeros_like(images)
    for line, line_weight in zip(lines, line_weights):
        places = torch.stack([line * width + column for column in columns], 1).view(batch, 1, -1)
        values = flat.gather(2, places.expand(-1, channels, -1)).view(batch, channels, len(columns), height, width)
        result += (values * torch.stack(column_weights, 1)[:, None]).sum(2) * line_weight[:, None]
    outside = torch.cat([images.new_full((1, 1, 1, 1), value) for value in fill], 1)
    # what float32 loses of a whole number would be a grey level when it is cut off, as Pillow does
    return torch.where(inside[:, None], (result + 1e-3).floor_().clamp_(0, 255), outside)


def taps(place: torch.Tensor, size: int, cubic: torch.Tensor | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pixels of a line around each place, two or four, and their weights; a line goes on with its last pixel."""
    first = place.floor()
    t = place - first
    weights = [1 - t, t]
    if cubic is not None:
        chosen, zero = cubic[:, None, None], torch.zeros_like(t)
        square, cube = t * t, t * t * t
        keys = [2 * square - cube - t, cube - 2 * square + 1, t + square - cube, cube - square]
        weights = [torch.where(chosen, key, other) for key, other in zip(keys, (zero, *weights, zero))]
    offsets = range(1 - len(weights) // 2, 1 + len(weights) // 2)
    return [(first + offset).clamp(0, size - 1).long() for offset in offsets], weights


def enhancement(chosen: dict[str, torch.Tensor], level: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    """Factors (B,) of ImageEnhance: 0.1 to 1.9, or away from 1 as the level increases."""
    plain = level * 1.8 + 0.1
    increasing = (1 + signed * 0.9).clamp(min=0.1)
    return increasing if any(f'{name}Increasing' in chosen for name in ENHANCE) else plain


def grey_tables(
    images: torch.Tensor, chosen: dict[str, torch.Tensor], level: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """What becomes of each grey level (B, C or 1, 256)."""
    grey = torch.arange(256.0, device=images.device)[None, None]
    level, factor = level[:, None, None], factor[:, None, None]
    tables = grey.expand(len(images), 1, -1)

    def put(name: str, values: torch.Tensor) -> None:
        nonlocal tables
        if name in chosen:
            tables = torch.where(chosen[name][:, None, None], values, tables)

    put('Invert', 255 - grey)
    solarized, posterized = (256 * level).floor().clamp(max=256), (4 * level).floor()
    put('Solarize', torch.where(grey < solarized, grey, 255 - grey))
    put('SolarizeIncreasing', torch.where(grey < 256 - solarized, grey, 255 - grey))
    added = (110 * level).floor().clamp(max=128)
    put('SolarizeAdd', torch.where(grey < 128, (grey + added).clamp(max=255), grey))
    for name, bits in (('Posterize', posterized), ('PosterizeIncreasing', 4 - posterized)):
        step = torch.exp2(8 - bits).round()
        put(name, (grey / step).floor() * step)
    for end in ('', 'Increasing'):
        put(f'Brightness{end}', (grey * factor).floor().clamp(0, 255))
        if f'Contrast{end}' in chosen:
            mean = (grey_of(images).mean((2, 3)) + 0.5).floor()[..., None]
            put(f'Contrast{end}', (mean + factor * (grey - mean)).clamp(0, 255).floor())
    if 'AutoContrast' in chosen:
        low, high = (part[..., None] for part in (images.amin((2, 3)), images.amax((2, 3))))
        stretched = ((grey - low) * 255 / (high - low).clamp(min=1) + 1e-4).floor().clamp(0, 255)
        put('AutoContrast', torch.where(high > low, stretched, grey))
    if 'Equalize' in chosen:
        put('Equalize', equalizing(images))
    return tables


def equalizing(images: torch.Tensor) -> torch.Tensor:
    """Tables (B, C, 256) of Pillow's equalize."""
    places = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, places, torch.ones_like(places))
    last = counts.gather(2, places.amax(2, keepdim=True))
    step = (places.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    tables = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    grey = torch.arange(256, device=images.device)
    return torch.where(step > 0, tables, grey).float()


def blended(images: torch.Tensor, chosen: dict[str, torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
    """Saturation, a blend with the grey image, and sharpness, one with the smoothed image."""
    result, factor = images, factor[:, None, None, None]
    for end in ('', 'Increasing'):
        for name, base in ((f'Color{end}', grey_of), (f'Sharpness{end}', smoothed)):
            if name in chosen:
                other = base(images)
                blend = torch.addcmul(other, images - other, factor).clamp_(0, 255).floor_()
                result = torch.where(chosen[name][:, None, None, None], blend, result)
    return result


def smoothed(images: torch.Tensor) -> torch.Tensor:
    """Pillow's SMOOTH filter, which leaves the outermost pixels as they are."""
    if min(images.shape[2:]) < 3:
        return images
    inner = F.avg_pool2d(images, 3, 1, divisor_override=1) + 4 * images[:, :, 1:-1, 1:-1]
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = (inner / 13 + 0.5).floor_()
    return result
