"""What becomes of a batch on the device, mixup, cutmix and erasing, is timm's, and no step waits for the device."""

import traceback

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.utils._python_dispatch import TorchDispatchMode

from vim_timm import train
from vim_timm.data import Loader, make_dataset, train_loader
from vim_timm.data.device_erasing import Erasing
from vim_timm.engine.loop import Trainer
from vim_timm.errors import UserError
from vim_timm.settings import Process
from vim_timm.step import update
from vim_timm.tasks import mixing

BASE = '--dataset digits --device cpu --epochs 1 --warmup-epochs 0 --workers 0 --batch-size 128 --log-interval 1000'
SMALL = '--model vim_nano_patch4_32 --img-size 16 --model-kwargs depth=1'
TINY = '--model test_vit --img-size 16'

KINDS = {
    'mixup': dict(mixup_alpha=0.8),
    'cutmix': dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    'both': dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7),
    'minmax': dict(mixup_alpha=0.8, cutmix_minmax=[0.2, 0.8]),
    'uncorrected': dict(mixup_alpha=0.8, cutmix_alpha=1.0, correct_lam=False),
}


def mixed(mixup, images, targets):
    numbers = torch.from_numpy(mixing.draw(mixup, len(images), images.shape[2:]))
    return *mixing.mix(mixup, numbers, images, targets), numbers


@pytest.mark.parametrize('kind', KINDS)
def test_a_mixed_batch_is_timms(kind):
    torch.manual_seed(0)
    mixup = Mixup(**KINDS[kind], num_classes=5)
    for seed in range(30):
        images, targets = torch.randn(6, 3, 12, 17), torch.randint(5, (6,))
        np.random.seed(seed)
        result = mixed(mixup, images, targets)
        np.random.seed(seed)
        expected = mixup(images.clone(), targets)
        for mine, theirs in zip(result, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_several_labels_are_mixed_as_timms():
    mixup = Mixup(mixup_alpha=0.8, num_classes=4, multi_label=True)
    images, targets = torch.randn(4, 3, 8, 8), torch.randint(2, (4, 4)).float()
    np.random.seed(1)
    result = mixed(mixup, images, targets)
    np.random.seed(1)
    for mine, theirs in zip(result, mixup(images.clone(), targets)):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_sizes_of_a_box_that_leave_none_are_refused():
    mixup = Mixup(0.0, cutmix_minmax=[0.5, 0.52], num_classes=5)
    assert mixing.draw(mixup, 6, (64, 64)).any()
    with pytest.raises(UserError, match='--cutmix-minmax 0.5 0.52 leaves no box in images of 16 x 64 pixels'):
        mixing.draw(mixup, 6, (64, 16))


@pytest.mark.parametrize('kind', ['both', 'minmax', 'uncorrected'])
@pytest.mark.parametrize('mode', ['elem', 'pair'])
def test_images_mixed_one_by_one_are_spread_as_timms(mode, kind):
    np.random.seed(0)
    mixup, count = Mixup(**KINDS[kind], num_classes=2, mode=mode, label_smoothing=0.0), 2000
    images = torch.arange(count).view(-1, 1, 1, 1) % 2 * torch.ones(1, 1, 16, 16)  # each has another counterpart
    targets = torch.arange(count) % 2
    shares = []
    for images_after, soft in (mixed(mixup, images, targets)[:2], mixup(images.clone(), targets)):
        pixels = images_after.mean((1, 2, 3))
        if mixup.correct_lam or mixup.cutmix_minmax:
            torch.testing.assert_close(pixels, soft[:, 1], rtol=0, atol=1e-5)
        mine = torch.where(targets > 0, soft[:, 1], soft[:, 0])
        if mode == 'pair':
            assert torch.equal(mine, mine.flip(0))
        whole = (images_after.flatten(1) == images_after[:, 0, 0, :1]).all(1).float()  # not cut
        shares.append(torch.stack([mine.mean(), mine.std(), (mine == 1).float().mean(), whole.mean()]))
    assert (shares[0] - shares[1]).abs().max() < 0.05


def erased(count, mode, images=3000, size=(24, 32)):
    """Masks (B, H, W) of what ours and timm's erase, and the filled images."""
    ours, theirs = Erasing(0.6, mode, count), RandomErasing(0.6, mode=mode, max_count=count, device='cpu')
    plain = torch.full((images, 3, *size), 100.0)
    for result in (ours(plain, torch.rand(images, ours.draws)), theirs(plain.clone())):
        assert result.shape == plain.shape and result.dtype == plain.dtype
        yield (result != 100).any(1), result


@pytest.mark.parametrize('count, size', [(1, (24, 32)), (3, (24, 32)), (1, (8, 96))])
def test_erased_boxes_are_spread_as_timms(count, size):
    torch.manual_seed(0)
    found = []
    for mask, _ in erased(count, 'const', size=size):
        area, some = mask.float().mean((1, 2)), mask.any(2).any(1)
        rows, columns = mask.any(2).sum(1).float(), mask.any(1).sum(1).float()
        first = mask.any(2).float().argmax(1).float(), mask.any(1).float().argmax(1).float()
        parts = (some, area[some] * 32, rows[some], columns[some], first[0][some], first[1][some])
        found.append(torch.tensor([value for part in parts for value in (part.float().mean(), part.float().std())]))
    assert ((found[0] - found[1]).abs() < 0.08 * found[1] + 0.1).all(), found


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_what_fills_erased_boxes_is_timms(mode):
    torch.manual_seed(0)
    for mask, result in erased(1, mode, images=400):
        filled = result.permute(0, 2, 3, 1)[mask]
        colours = len(filled.unique(dim=0))
        if mode == 'const':
            assert (filled == 0).all()
            continue
        assert abs(filled.mean()) < 0.3 and abs(filled.std() - 1) < 0.2
        assert colours == (int(mask.any(2).any(1).sum()) if mode == 'rand' else len(filled))


@pytest.mark.parametrize('more', ['', '--aa rand-m9-mstd0.5-inc1'])
def test_the_augmentation_is_compiled_as_one_function(more):
    config = dict(input_size=(3, 16, 16), mean=(0.3,) * 3, std=(0.4,) * 3, interpolation='bicubic', crop_pct=1.0)
    flags = '--reprob 0.5 --remode const --vflip 0.2 --train-interpolation random --batch-size 256'
    args = train.parse_args([*BASE.split(), *TINY.split(), '--data-in-memory', *flags.split(), *more.split()])
    loader = train_loader(args, Process(), make_dataset(args, 'train', True, 3), config)
    expected, graphs = list(loader.epoch(0)), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    loader.compile(backend)
    for batch, same in zip(loader.epoch(0), expected, strict=True):
        assert torch.equal(batch.images, same.images)
    assert len(graphs) == 1
    torch._dynamo.reset()


# Waits


class Waits(TorchDispatchMode):
    """Notes where the host would ask a GPU for something, or copy a number of its own there and wait.

    A CPU shows them as well: reading a number, sizes that depend on values, tensors made of a list, other devices.
    """

    READS = ('aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten.equal', 'aten.unique')
    ALLOWED = ('copies.py', 'arrivals.py')  # in pinned memory

    def __init__(self):
        super().__init__()
        self.watches, self.seen, self.steps = False, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = name.startswith('aten.index') and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if self.watches and (by_mask or name.startswith((*self.READS, 'aten.lift_fresh'))):
            stack = [frame for frame in traceback.extract_stack() if 'vim_timm' in frame.filename]
            if stack and not stack[-1].filename.endswith(self.ALLOWED):
                self.seen.add(f'{name} {stack[-1].filename}:{stack[-1].lineno}')
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Watches from the fourth step of an epoch on, in the loop, the loader and what they call; the CPU is a device."""
    mode, load, step = Waits(), Loader.unfinished, Trainer._forward_backward

    def unfinished(loader, *args):
        batches = load(loader, *args)
        while True:
            mode.watches = loader.training and mode.steps >= 3
            batch = next(batches, None)
            if batch is None:
                mode.watches = False
                return
            yield batch

    def counted(trainer, *args):
        mode.steps += 1
        return step(trainer, *args)

    monkeypatch.setattr(update, 'HOST', ())
    monkeypatch.setattr(Loader, 'unfinished', unfinished)
    monkeypatch.setattr(Trainer, '_forward_backward', counted)
    with mode:
        yield mode


@pytest.mark.parametrize(
    'flags',
    [
        f'{SMALL} --data-in-memory --mixup 0.2 --reprob 0.25 --opt adamw --amp',
        f'{TINY} --data-in-memory --aa rand-m9-mstd0.5-inc1 --opt adamw',
        f'{TINY} --data-in-memory --cutmix 1 --mixup-mode elem --remode const --reprob 0.5 --recount 2 --opt nadamuon',
        f'{TINY} --workers 1 --mixup 0.2 --opt sgd --drop-path 0.1 --grad-accum-steps 2',
        f'--mae {SMALL} --decoder-dim 32 --decoder-depth 1 --decoder-heads 4 --data-in-memory --opt adamw',
    ],
)
def test_a_step_asks_the_device_for_nothing(flags, waits, tmp_path):
    more = '--lr 1e-3 --model-ema --model-ema-decay 0.9 --clip-grad 1'
    train.train(train.parse_args([*BASE.split(), *flags.split(), *more.split(), '--output', str(tmp_path)]))
    assert waits.steps == 11 and not waits.seen


@pytest.mark.parametrize('wait', ['item', 'list', 'mask'])
def test_a_wait_is_seen(wait, waits, tmp_path, monkeypatch):
    from vim_timm.data import device_augment

    def waiting(images, *_):
        if wait == 'item':
            return images * float(images[0, 0, 0, 0])
        if wait == 'list':
            return images * images.new_tensor([1.0, 2.0, 3.0])[:, None, None]
        return images * images[images > 3].mean()

    monkeypatch.setattr(device_augment, 'jitter', waiting)
    flags = [*BASE.split(), *TINY.split(), '--data-in-memory', '--opt', 'sgd', '--lr', '1e-3', '--clip-grad', '1']
    train.train(train.parse_args([*flags, '--output', str(tmp_path)]))
    assert waits.seen
