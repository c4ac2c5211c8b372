"""Images of 13 bands made from colour photographs, for masked autoencoders of many channels.

    python -m benchmarks.bands CIFAR10 BANDS --images 10000

Reads `CIFAR10/{train,validation}/CLASS/*` and writes `BANDS/{train,validation}/CLASS/*.npy`, 16 bits, (13, H, W). It
imitates Sentinel-2's multispectral tiles as far as three colours allow:

1. mixing: a band at wavelength w takes red (620 nm), green (550) and blue (465) by Gaussians of 60 nm around w, in
   linear light. Beyond 700 nm, where there is no colour, it takes fixed mixtures with products of two colours, so that
   bands differ by more than a factor;
2. blur: bands of 20 and 60 m a pixel are averaged over 2 x 2 and 4 x 4 pixels and enlarged again;
3. noise: Gaussian, of deviation 0.01 at 10 m, 0.015 at 20 m, 0.02 at 60 m.

BANDS is there when all of it is: until then it is BANDS.part.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WAVELENGTHS = (443, 490, 560, 665, 705, 740, 783, 842, 865, 945, 1375, 1610, 2190)  # nm
PIXELS = (60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 60, 20, 20)  # m
FACTOR, NOISE = {10: 1, 20: 2, 60: 4}, {10: 0.01, 20: 0.015, 60: 0.02}
COLOURS = (620, 550, 465)
# weights of r, g, b, r * g, g * b, r * b for the bands beyond 700 nm
BEYOND = (
    (0.3, 0.4, 0.0, 0.3, 0.0, 0.0), (0.1, 0.7, -0.2, 0.4, 0.0, 0.0), (0.0, 0.8, -0.4, 0.6, 0.0, 0.0),
    (-0.1, 0.9, -0.4, 0.5, 0.1, 0.0), (-0.1, 0.8, -0.3, 0.4, 0.2, 0.0), (0.0, 0.3, 0.2, 0.2, 0.3, 0.0),
    (0.0, 0.0, 0.1, 0.0, 0.3, 0.6), (0.7, 0.1, -0.3, 0.2, 0.0, 0.3), (0.8, -0.1, -0.2, 0.0, 0.0, 0.5),
)  # fmt: skip


def mixing() -> np.ndarray:
    """Weights (13, 6) of the three colours and their products."""
    rows = []
    for wavelength in WAVELENGTHS[:4]:
        weights = np.exp(-0.5 * ((wavelength - np.array(COLOURS)) / 60) ** 2)
        rows.append([*(weights / weights.sum()), 0, 0, 0])
    return np.array([*rows, *BEYOND])


def bands(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W, 3) of 8 bits -> 13 bands (13, H, W) of 16 bits; sides are multiples of 4."""
    red, green, blue = (image.astype(np.float64) / 255).transpose(2, 0, 1) ** 2.2
    features = np.stack([red, green, blue, red * green, green * blue, red * blue])
    mixed = np.tensordot(mixing(), features, 1).clip(0, 1)
    for band, metres in zip(mixed, PIXELS):
        factor = FACTOR[metres]
        height, width = band.shape
        small = band.reshape(height // factor, factor, width // factor, factor).mean((1, 3))
        band[:] = np.kron(small, np.ones((factor, factor))) + rng.normal(0, NOISE[metres], band.shape)
    return (mixed.clip(0, 1) * 65535).round().astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder of images, SPLIT/CLASS/*')
    parser.add_argument('target', type=Path, help='folder to make, which is not there yet')
    parser.add_argument('--images', type=int, default=10000, help='images of the training split; of others a fifth')
    args = parser.parse_args()
    if args.target.exists():
        sys.exit(f'{args.target} is there: images that were made before would stay in it')
    unfinished = args.target.with_name(f'{args.target.name}.part')
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split in sorted(path for path in args.source.iterdir() if path.is_dir()):
        files = sorted(split.glob('*/*'))
        count = args.images if split.name == 'train' else args.images // 5
        for file in rng.permutation(np.array(files))[:count]:
            with Image.open(file) as picture:
                image = np.asarray(picture.convert('RGB'))
            image = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4]
            path = unfinished / split.name / file.parent.name / f'{file.stem}.npy'
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, bands(image, rng))
    unfinished.rename(args.target)


if __name__ == '__main__':
    main()
