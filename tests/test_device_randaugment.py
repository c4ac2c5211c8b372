"""RandAugment on the device: each operation is timm's and Pillow's, and drawn as often and as strongly."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import rand_augment_transform

from vim_timm import train
from vim_timm.data import device_randaugment, make_dataset, train_loader
from vim_timm.data.device_randaugment import DRAWS, FILTER, OPS, SIGN, RandAugment, supports
from vim_timm.data.loading import keep_posterizing
from vim_timm.settings import Process

FILL = (124, 116, 104)
CUBIC, LINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def policy(name, magnitude, resample=CUBIC, **more):
    hparams = dict(img_mean=FILL, translate_const=100, **more, **(dict(interpolation=resample) if resample else {}))
    return rand_augment_transform(f'rand-m{magnitude}-n1-p1', hparams, [name])


def pictures(count, size=(24, 33), channels=3):
    """Noise, smooth pictures, dark ones, and ones of a single grey level."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = rng.integers(0, 256, (*size, channels))
        ramp = np.add.outer(np.arange(size[0]) * 3, np.arange(size[1]) * 2)[..., None] + np.arange(channels) * 20
        yield ((noise, ramp, noise // 8 + 30, np.full((*size, channels), 90))[i % 4] % 256).astype(np.uint8)


def compared(name, magnitude, resample=CUBIC, channels=3):
    """Ours and timm's results (B, H, W, C) for both signs."""
    transform = policy(name, magnitude, resample)
    keep_posterizing(transform)
    ours = RandAugment(transform)
    images = list(pictures(8, channels=channels))
    for sign in (0.1, 0.9):
        uniform = torch.full((len(images), DRAWS), 0.3)
        uniform[:, SIGN] = sign
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
        result = ours(batch, uniform).permute(0, 2, 3, 1).numpy()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(random, 'random', lambda sign=sign: sign)
            expected = [np.asarray(transform(Image.fromarray(image.squeeze()))) for image in images]
        yield result, np.stack(expected).reshape(result.shape).astype(np.float32)


EXACT = ('Equalize', 'Invert', 'Posterize', 'PosterizeIncreasing', 'Solarize', 'SolarizeIncreasing', 'SolarizeAdd')


@pytest.mark.parametrize('magnitude', [0, 2, 5, 9, 10])
@pytest.mark.parametrize('name', [name for name in OPS if name not in device_randaugment.GEOMETRIC])
def test_grey_levels_are_pillows(name, magnitude):
    for result, expected in compared(name, magnitude):
        difference = np.abs(result - expected)
        assert difference.max() <= (0 if name in EXACT else 1)
        assert (difference > 0).mean() < 0.03  # ties, which float32 breaks otherwise


@pytest.mark.parametrize('magnitude', [0, 3, 9, 10])
@pytest.mark.parametrize('resample', [CUBIC, LINEAR])
@pytest.mark.parametrize('name', device_randaugment.GEOMETRIC)
def test_maps_are_pillows(name, resample, magnitude):
    for result, expected in compared(name, magnitude, resample):
        difference = np.abs(result - expected)
        assert difference.max() <= (1 if magnitude else 0)
        assert (difference > 0).mean() < 0.03  # ties, which float32 breaks otherwise


@pytest.mark.parametrize('name', OPS)
def test_grey_images_are_augmented_too(name):
    hparams = dict(img_mean=(99,), interpolation=LINEAR)
    transform = rand_augment_transform('rand-m7-n1-p1', hparams, [name])
    image = next(pictures(1, channels=1))
    result = RandAugment(transform)(torch.from_numpy(image).permute(2, 0, 1)[None].float(), torch.full((1, DRAWS), 0.3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(random, 'random', lambda: 0.3)
        expected = np.asarray(transform(Image.fromarray(image[..., 0])))
    assert np.abs(result[0, 0].numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    'config', ['rand-m9-mstd0.5-inc1', 'rand-m4-n3-p0.8', 'rand-m10-mstd101', 'rand-m15-mmax12-mstd3']
)
def test_operations_and_magnitudes_are_drawn_as_timms(config, monkeypatch):
    transform = rand_augment_transform(config, dict(img_mean=FILL, translate_const=100))
    count, drawn = 4000, []
    for op in transform.ops:
        monkeypatch.setattr(op, 'aug_fn', lambda image, *_, **__: image)
        monkeypatch.setattr(op, 'level_fn', lambda level, _, name=op.name: drawn.append((name, level)) or ())
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        transform(None)
    ours = RandAugment(transform)
    numbers = torch.rand(count * ours.layers, DRAWS, generator=torch.Generator().manual_seed(0))
    kinds, levels = ours.kinds(numbers), ours.levels(numbers[:, device_randaugment.LEVEL])
    share = len(drawn) / len(kinds)
    assert abs((kinds >= 0).float().mean() - share) < 0.03
    for place, name in enumerate(ours.names):
        theirs = sum(other == name for other, _ in drawn) / len(kinds)
        assert abs((kinds == place).float().mean() - theirs) < 0.015
    theirs = torch.tensor([float(level) for _, level in drawn])
    assert abs(levels.mean() - theirs.mean()) < 0.1 and abs(levels.std() - theirs.std()) < 0.1
    assert levels.min() >= 0 and levels.max() == pytest.approx(float(theirs.max()), abs=0.3)


@pytest.mark.parametrize('config', ['rand-m25-mmax30-n3-p1', 'rand-m30-mmax30-n2-p1-inc1', 'rand-n0'])
def test_levels_beyond_the_usual_and_no_layers_are_spread_as_timms(config):
    transform = rand_augment_transform(config, dict(img_mean=FILL, translate_const=100))
    keep_posterizing(transform)
    ours, image, count = RandAugment(transform), next(pictures(2, size=(8, 9))), 3000
    random.seed(0)
    np.random.seed(0)
    theirs = np.stack([transform(Image.fromarray(image)) for _ in range(count)]).mean(0)
    uniform = torch.rand(count, ours.draws, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(image).permute(2, 0, 1).float().expand(count, -1, -1, -1)
    assert np.abs(ours(images, uniform).mean(0).permute(1, 2, 0).numpy() - theirs).max() < 10


def test_half_of_the_images_are_bicubic_where_timm_draws_it():
    ours = RandAugment(policy('Rotate', 9, resample=None))
    both = [RandAugment(policy('Rotate', 9, resample=kind)) for kind in (CUBIC, LINEAR)]
    image = torch.from_numpy(next(pictures(1))).permute(2, 0, 1)[None].float().repeat(2, 1, 1, 1)
    uniform = torch.full((2, DRAWS), 0.3)
    uniform[:, FILTER] = torch.tensor([0.4, 0.6])
    result = ours(image, uniform)
    assert torch.equal(result[0], both[0](image, uniform)[0]) and torch.equal(result[1], both[1](image, uniform)[1])


def test_an_image_depends_on_its_own_numbers():
    transform = rand_augment_transform('rand-m9-mstd0.5-inc1', dict(img_mean=FILL, translate_const=100))
    ours = RandAugment(transform)
    images = torch.from_numpy(np.stack(list(pictures(40)))).permute(0, 3, 1, 2).float()
    uniform = torch.rand(40, ours.draws, generator=torch.Generator().manual_seed(0))
    whole = ours(images, uniform)
    assert torch.equal(whole[7:20], ours(images[7:20], uniform[7:20]))
    assert set(whole.unique().tolist()) <= set(range(256))


def test_colour_jitter_is_left_out_where_timm_leaves_it_out():
    flags = '--dataset digits --model test_vit --data-in-memory --aa rand-m9-mstd0.5-inc1'
    config = dict(input_size=(3, 16, 16), mean=(0.3,) * 3, std=(0.4,) * 3, interpolation='bicubic', crop_pct=1.0)
    args = train.parse_args(flags.split())
    loader = train_loader(args, Process(), make_dataset(args, 'train', True, 3), config)
    augmentation = loader.loader.augment
    assert augmentation.color_jitter == 0 and augmentation.policy.names == auto_augment._RAND_INCREASING_TRANSFORMS
    assert augmentation.policy.fill == [76, 76, 76] and augmentation.policy.deviation == 0.5


def test_what_it_cannot_do_it_does_not_claim():
    assert supports(rand_augment_transform('rand-m9', dict(img_mean=FILL)))
    for config in ('rand-m9-tweights', 'rand-m9-t3a'):
        assert not supports(rand_augment_transform(config, dict(img_mean=FILL)))
    assert not supports(rand_augment_transform('rand-m9', dict(img_mean=FILL, interpolation=Image.Resampling.LANCZOS)))
    assert not supports(auto_augment.auto_augment_transform('original', dict(img_mean=FILL)))
