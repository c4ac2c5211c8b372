"""--data-in-memory: the same images as the loader's, augmented on the device as Pillow and timm would."""

import argparse
import gzip
import itertools
import json
import struct

import numpy as np
import pytest
import torch
from logs import log_of
from PIL import Image, ImageEnhance
from timm.data.transforms import RandomResizedCropAndInterpolation

from vim_timm import data, train, validate
from vim_timm.data.device_augment import DRAWS, Augmentation, jitter, random_boxes, resampling
from vim_timm.engine import Hooks
from vim_timm.errors import Preempted, UserError
from vim_timm.settings import Process

BASE = '--model test_vit --img-size 16 --in-chans 1 --device cpu --workers 0 --batch-size 64 --log-interval 100'
DIGITS = f'{BASE} --dataset digits --opt adamw --lr 1e-3 --warmup-epochs 0'.split()
CONFIG = dict(input_size=(1, 16, 16), mean=(0.3,), std=(0.4,), interpolation='bicubic', crop_pct=1.0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(*flags):
    return train.parse_args([*DIGITS, '--data-in-memory', *flags])


def batches(*flags, epoch=0, start=0, **where):
    args = settings(*flags)
    loader = data.train_loader(args, Process(**where), data.make_dataset(args, 'train', True, 1), CONFIG)
    torch.rand(7)  # whatever else draws numbers must not matter
    return list(loader.epoch(epoch, start))


def write_mnist(root, count=32):
    """Random digits in the files of MNIST, the brighter the larger the label."""
    rng = np.random.default_rng(0)
    raw = root / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for name in ('train', 't10k'):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = (rng.integers(0, 50, (count, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape)
            (raw / f'{name}-{kind}-ubyte').write_bytes(header + array.tobytes())
            with gzip.open(raw / f'{name}-{kind}-ubyte.gz', 'wb') as file:
                file.write(header + array.tobytes())


def write_folder(root, size=(20, 24), odd=None):
    rng = np.random.default_rng(0)
    for split, label, i in itertools.product(('train', 'validation'), range(2), range(8)):
        folder = root / split / f'class{label}'
        folder.mkdir(parents=True, exist_ok=True)
        shape = odd if odd and i == 7 else size
        Image.fromarray(rng.integers(0, 255, (*shape, 3)).astype(np.uint8)).save(folder / f'{i}.png')


def test_without_augmentation_a_run_is_the_run_without_the_flag(tmp_path):
    for name, flags in (('disk', []), ('memory', ['--data-in-memory'])):
        run = ['--no-aug', '--epochs', '2', '--mixup', '0.5', '--output', str(tmp_path), '--experiment', name]
        assert train.main([*DIGITS, *run, *flags]) == 0
    assert log_of(tmp_path / 'disk') == log_of(tmp_path / 'memory')


@pytest.mark.parametrize('cubic', [False, True])
@pytest.mark.parametrize('size', [(32, 32), (16, 40), (9, 7)])
def test_crop_and_resize_are_pillows(cubic, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(90, 166, (30, 26, 3)).astype(np.uint8)  # bicubic stays within 0..255
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(20, 1, 1, 1)
    augmentation = Augmentation(size, (0.1, 1.0), (0.5, 2.0), 0.5, 0.5, 0.0, 'bicubic' if cubic else 'bilinear')
    uniform = torch.rand(20, DRAWS, generator=torch.Generator().manual_seed(0))
    result = augmentation(images, augmentation.numbers(uniform, 30, 26))
    assert result.shape == (20, 3, *size) and set(result.unique().tolist()) <= set(range(256))
    boxes = torch.stack(random_boxes(uniform, 30, 26, (0.1, 1.0), (0.5, 2.0)), 1).int().tolist()
    seen = set()
    for i, (top, left, height, width) in enumerate(boxes):
        crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
        crop = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR))
        views = {(v, h): crop[:: -1 if v else 1, :: -1 if h else 1] for v in (0, 1) for h in (0, 1)}
        worst = {key: np.abs(view - result[i].permute(1, 2, 0).numpy()).max() for key, view in views.items()}
        flips = min(worst, key=worst.get)
        assert worst[flips] <= 1
        seen.add(flips)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_crop_of_everything_changes_nothing():
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    same = Augmentation((28, 28), (1.0, 1.0), (1.0, 1.0), 0.0, 0.0, 0.0, 'random')
    assert torch.equal(same(images, same.numbers(torch.rand(4, DRAWS), 28, 28)), images.float())


@pytest.mark.parametrize(
    'size, scale, ratio',
    [((1, 1), (0.08, 1.0), (0.75, 4 / 3)), ((8, 8), (1e-3, 1e-3), (1, 1)), ((4, 1), (1, 1), (2, 3))],
)
def test_a_crop_has_a_pixel_at_least(size, scale, ratio):
    images = torch.randint(256, (16, 3, *size), dtype=torch.uint8)
    augmentation = Augmentation((5, 9), scale, ratio, 0.5, 0.5, 0.0, 'random')
    result = augmentation(images, augmentation.numbers(torch.rand(16, DRAWS), *size))
    low, high = (part[..., None, None].float() for part in (images.flatten(2).amin(2), images.flatten(2).amax(2)))
    assert ((result >= low) & (result <= high)).all()


def test_weights_do_not_look_outside_the_crop():
    start, end, step = (torch.tensor([value]) for value in (3.0, 8.0, 5 / 8))
    weights = resampling(start, end, start, step, 20, 8, torch.tensor([True]))
    assert (weights[..., :3] == 0).all() and (weights[..., 8:] == 0).all()
    assert torch.allclose(weights.sum(2), torch.ones(1, 8))


@pytest.mark.parametrize('height, width, scale', [(32, 32, (0.08, 1.0)), (20, 50, (0.5, 1.0)), (50, 20, (0.9, 1.0))])
def test_boxes_are_spread_as_timms(height, width, scale):
    count, ratio = 4000, (3 / 4, 4 / 3)
    ours = torch.stack(random_boxes(torch.rand(count, DRAWS), height, width, scale, ratio), 1)
    image = Image.new('L', (width, height))
    theirs = torch.tensor(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)], dtype=torch.float32
    )
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()
    spread = theirs.std(0).clamp(min=1)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.1 * spread).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < 0.1 * spread).all()


@pytest.mark.parametrize('order', list(itertools.permutations(range(3))))
@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'LA'])
def test_colour_jitter_is_pillows(order, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).convert(mode)
    factors = [0.7, 1.3, 0.6]
    pixels = torch.from_numpy(np.array(image)).float().view(16, 16, -1).permute(2, 0, 1)[None]
    result = jitter(pixels, torch.tensor([factors]), torch.tensor([order]))
    for kind in order:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
        image = enhance(image).enhance(factors[kind])
    expected = torch.from_numpy(np.array(image)).float().view(16, 16, -1).permute(2, 0, 1)[None]
    assert (result - expected).abs().max() <= 2  # a level of grey each for the mean and the luma


ALL = ('--reprob', '0.5', '--scale', '0.5', '1', '--vflip', '0.2')


@pytest.mark.parametrize('more', [(), ('--aa', 'rand-m9-mstd0.5-inc1')])
def test_an_epoch_goes_on_where_it_stopped(more):
    whole = batches(*ALL, *more, epoch=3)
    rest = batches(*ALL, *more, epoch=3, start=5)
    assert len(rest) == len(whole) - 5
    for one, same in zip(whole[5:], rest):
        assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in ('images', 'targets', 'keys'))
    other = batches(*ALL, epoch=4)
    assert not torch.equal(whole[0][0], other[0][0])


@pytest.mark.parametrize('repeats', [[], ['--epoch-repeats', '2'], ['--aug-repeats', '2']])
def test_every_sample_has_its_own_augmentation(repeats):
    images = torch.cat([part for part, *_ in batches('--scale', '0.8', '1', *repeats)])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_processes_share_a_batch_without_changing_it():
    whole = batches('--batch-size', '32')
    halves = [batches('--batch-size', '16', rank=rank, world_size=2) for rank in range(2)]
    for (images, targets, *_), (one, one_targets, *_), (two, two_targets, *_) in zip(whole, *halves):
        assert torch.allclose(images, torch.cat([one, two]), atol=1e-5)
        assert torch.equal(targets, torch.cat([one_targets, two_targets]))


def test_stopped_and_resumed_run_is_the_run_never_stopped(tmp_path):
    flags = [*DIGITS, '--data-in-memory', *ALL, '--mixup', '0.5', '--epochs', '3', '--output', str(tmp_path)]

    def stop(trainer):
        if trainer.epoch == 1:  # it ends in the first step of the second epoch
            trainer.signals.append(15)

    train.train(train.parse_args([*flags, '--experiment', 'whole']))
    with pytest.raises(Preempted):
        train.train(train.parse_args([*flags, '--experiment', 'cut']), Hooks(callback=stop))
    train.train(train.parse_args([*flags, '--experiment', 'cut', '--resume', 'auto']))
    whole, cut = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('whole', 'cut'))
    for name, tensor in whole['state_dict'].items():
        assert torch.equal(tensor, cut['state_dict'][name])
    assert log_of(tmp_path / 'whole') == log_of(tmp_path / 'cut')


@pytest.mark.parametrize('dataset', ['torch/mnist', 'folder'])
def test_validate_agrees_with_itself(dataset, tmp_path):
    flags = BASE.split() + ['--data-dir', str(tmp_path), '--batch-size', '8', '--epochs', '1']
    if dataset == 'folder':
        write_folder(tmp_path)
    else:
        write_mnist(tmp_path)
        flags += ['--dataset', dataset, '--model', 'vim_nano_patch4_32', '--img-size', '28']
    assert train.main([*flags, '--data-in-memory', '--output', str(tmp_path), '--experiment', 'a']) == 0
    results = []
    for more in ([], ['--data-in-memory']):
        path = tmp_path / 'result.json'
        check = ['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), '--workers', '0', '--device', 'cpu', *more]
        assert validate.main([*check, '--results-file', str(path), '--results-format', 'json']) == 0
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    'flags',
    [
        '--aa original', '--aa rand-m9-tweights', '--color-jitter-prob 0.5', '--grayscale-prob 0.2',
        '--gaussian-blur-prob 0.2', '--train-crop-mode rkrc', '--train-interpolation lanczos', '--aug-splits 3',
        '--no-prefetcher', '--resplit --reprob 0.5',
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(flags, tmp_path, capsys):
    assert train.main([*DIGITS, '--data-in-memory', *flags.split(), '--output', str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert flags.split()[0] in message and '--data-in-memory' in message and len(message.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('workers', [0, 1])
def test_images_of_several_sizes_are_refused_in_a_sentence(workers, tmp_path, capsys):
    write_folder(tmp_path, odd=(9, 9))
    flags = BASE.split() + ['--data-dir', str(tmp_path), '--batch-size', '8', '--workers', str(workers)]
    assert train.main([*flags, '--data-in-memory', '--output', str(tmp_path / 'out')]) != 0
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'one size' in message and '(9, 9)' in message and 'resize them' in message


def test_too_much_data_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr('os.sysconf', lambda name: 100)
    with pytest.raises(UserError, match='GiB'):
        batches()


def test_unreadable_images_are_counted_as_always(tmp_path, capsys):
    write_folder(tmp_path)
    (tmp_path / 'validation' / 'class0' / '3.png').write_bytes(b'nothing')
    flags = BASE.split() + ['--data-dir', str(tmp_path), '--batch-size', '8', '--epochs', '1']
    assert train.main([*flags, '--data-in-memory', '--output', str(tmp_path / 'out')]) == 0
    output = capsys.readouterr().out
    assert '3.png, skipped' in output and '(15 images)' in output


def test_streams_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    args = settings()
    with pytest.raises(UserError, match='stream'):
        data.eval_loader(argparse.Namespace(**{**vars(args), 'dataset': 'hfids/x'}), Process(), Stream(), CONFIG)


def test_compressed_mnist_is_read_in_place(tmp_path, capsys):
    write_mnist(tmp_path)
    flags = ['--dataset', 'torch/mnist', '--data-dir', str(tmp_path)]
    sets = {}
    for kind in ('plain', 'compressed'):
        args = settings(*flags)
        sets[kind] = [data.make_dataset(args, split, split == 'train', 1) for split in ('train', 'validation')]
        for path in (tmp_path / 'MNIST' / 'raw').glob('*-ubyte'):
            path.unlink()
    for plain, compressed in zip(sets['plain'], sets['compressed']):
        assert type(plain) is not type(compressed) and len(plain) == len(compressed) == 32
        for (image, label), (same, same_label) in zip(plain, compressed):
            assert image.tobytes() == same.tobytes() and label == same_label
    (tmp_path / 'MNIST' / 'raw' / 't10k-images-idx3-ubyte.gz').write_bytes(b'nothing')
    assert train.main([*DIGITS, *flags, '--output', str(tmp_path / 'out')]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
