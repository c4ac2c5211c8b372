"""`--validation-batch-size auto`: the batch fits, all ranks have the same one, and the numbers do not depend on it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logs import log_of
from processes import finish, ranks
from torch.utils.data import IterableDataset

from vim_timm import data, train, validate
from vim_timm.data.loading import Loader
from vim_timm.data.unreadable import Unreadable
from vim_timm.engine import Hooks, eval_batch, loop
from vim_timm.engine.eval_batch import MOST_BYTES, MOST_PIXELS, SHARE, largest_batch, most_images
from vim_timm.errors import UserError
from vim_timm.report import reconstruction
from vim_timm.settings import Process
from vim_timm.settings.flags import TRAIN, VALIDATE
from vim_timm.settings.parse import parse

RUN = (
    '--dataset digits --model test_vit --img-size 16 --in-chans 1 --device cpu --batch-size 64 --workers 0 --no-aug '
    '--opt sgd --lr 0.05 --warmup-epochs 0 --validation-batch-size auto'
)
QUANTUM = 20 * 2**20  # bytes that an allocator asks for at once
PROGRAMS = pytest.mark.parametrize(
    'program, table, flag',
    [('train.py', TRAIN, '--validation-batch-size'), ('train.py', TRAIN, '-vb'), ('validate.py', VALIDATE, '-b')],
)


@PROGRAMS
def test_a_number_or_auto(program, table, flag, tmp_path):
    name = 'batch_size' if flag == '-b' else 'validation_batch_size'
    for text, value in (('auto', 'auto'), ('48', 48)):
        assert getattr(parse(program, table, ['x', flag, text]), name) == value
        (tmp_path / 'c.yaml').write_text(f'{name}: {text}\n')
        assert getattr(parse(program, table, ['-c', str(tmp_path / 'c.yaml')]), name) == value


@PROGRAMS
@pytest.mark.parametrize(
    'text, sentence', [('0', 'must be at least 1, not 0'), ('many', "'many'"), ('-3', 'must be at'), ('1.5', "'1.5'")]
)
def test_nothing_else(program, table, flag, text, sentence):
    with pytest.raises(UserError, match=f'batch-size.*{sentence}'):
        parse(program, table, ['x', flag, text])


def test_training_has_no_batch_of_its_own_choice():
    with pytest.raises(UserError, match='--batch-size'):
        parse('train.py', TRAIN, ['x', '--batch-size', 'auto'])


@given(
    fixed=st.integers(0, 2**29), image=st.integers(1, 2**27), room=st.integers(2**28, MOST_BYTES),
    most=st.integers(1, 10**6),
)  # fmt: skip
def test_the_batch_fits_and_four_times_as_many_do_not(fixed, image, room, most):
    tried = []

    def memory(size):
        tried.append(size)
        return -(-(fixed + size * image) // QUANTUM) * QUANTUM

    size = largest_batch(memory, room, most, 1)
    assert size & (size - 1) == 0 and 1 <= size <= most
    assert memory(size) <= room / SHARE or size == 1  # never beyond what is free
    assert all(memory(n) <= room for n in tried[1:-1]) and tried[0] == 1
    assert max(tried[:-1]) <= most
    if fixed + image <= room / 8:  # else the first image alone says little of the next ones
        assert 2 * size > most or memory(4 * size) > room


def test_few_batches_are_tried():
    tried = []
    assert largest_batch(lambda size: tried.append(size) or 2**20 * size, 2**30, 10**9, 1) == 1024
    assert tried == [1, 4, 16, 64, 256]


def test_images_that_seem_to_take_nothing_take_their_own_bytes():
    assert largest_batch(lambda size: QUANTUM, 2**30, 10**9, 2**22) == 256  # 4 + (1 GiB - 20 MiB) / 4 MiB


def test_no_more_than_is_of_use():
    assert most_images(10_000, 0, 28 * 28) == 16384  # all at once
    assert most_images(50_000, 8, 224 * 224) == MOST_PIXELS // 224**2
    assert most_images(10_000, 4, 32 * 32) == 2500  # a batch for each process
    assert most_images(3, 8, 32 * 32) == most_images(0, 0, 32 * 32) == most_images(9, 0, 2**30) == 1


class Stream(IterableDataset):
    """Twenty images without an index."""

    image_mode, floating = '', True

    def __len__(self):
        return 20

    def __iter__(self):
        return ((self.transform(torch.full((1, 4, 4), float(i))), i % 3) for i in range(20))


def numbered(args, prefetch):
    dataset, config = Stream(), dict(input_size=(1, 4, 4), mean=(0.0,), std=(1.0,))
    dataset.floating = not prefetch
    transform = (lambda image: image.numpy().astype('uint8')) if prefetch else (lambda image: image)
    return Loader(dataset, transform, args, Process(), config, False, Unreadable(0))


@pytest.mark.parametrize('flags', ['', '--data-in-memory', '--workers 2', 'stream', 'stream with prefetcher'])
def test_another_batch_has_the_same_images_in_the_same_order(flags):
    stream = flags.startswith('stream')
    words = [*RUN.split(), *(['--num-classes', '10'] if stream else flags.split())]
    args = train.parse_args(words)
    if stream:
        loader = numbered(args, prefetch='prefetcher' in flags)
    else:
        config = dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,), interpolation='bicubic', crop_pct=1.0)
        loader = data.eval_loader(args, Process(), data.make_dataset(args, 'validation', False, 1), config)
    assert loader.batch_size == 64 and loader.readers == (2 if '2' in flags else 0)
    before = [(batch.images, batch.targets, batch.places) for batch in loader.epoch(0)]
    total = sum(len(part[1]) for part in before)
    for size in (7, 512):
        loader.rebatch(size)
        assert loader.batch_size == size and len(loader) == -(-total // size)
        after = [(batch.images, batch.targets, batch.places) for batch in loader.epoch(0)]
        assert [len(part[1]) for part in after] == [size] * (total // size) + [total % size] * (total % size > 0)
        for old, new in zip(zip(*before), zip(*after)):
            assert torch.equal(torch.cat(old), torch.cat(new))


def start(folder, name, *flags, hooks=None):
    return train.train(
        train.parse_args([*RUN.split(), '--output', str(folder), '--experiment', name, *flags]), hooks or Hooks()
    )


def test_metrics_do_not_depend_on_the_batch(tmp_path, few, monkeypatch):
    rows = {}
    for size in (64, 16, 3):
        monkeypatch.setattr(eval_batch, 'choose', lambda *_, size=size: (size, 'so'))
        rows[size] = start(tmp_path, str(size), '--epochs', '1').rows[0]
    for size in (16, 3):
        assert rows[size]['eval_top1'] == rows[64]['eval_top1'] and rows[size]['eval_top5'] == rows[64]['eval_top5']
        assert rows[size]['eval_loss'] == pytest.approx(rows[64]['eval_loss'], rel=1e-5)


def test_on_a_cpu_it_is_the_usual_one_and_said_once(tmp_path, few, capsys):
    trainer = start(tmp_path, 'a', '--epochs', '2', '--model-ema')
    output = capsys.readouterr().out
    assert output.count('evaluation in batches of 64 images: auto looks for larger ones on CUDA') == 1
    assert trainer.eval_data.batch_size == trainer.eval_batch == 64
    flags = ['--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    rows = [validate.validate(validate.parse_args([*flags, *more]), Process()) for more in ([], ['-b', 'auto'])]
    assert rows[0] == rows[1]
    assert capsys.readouterr().out.count('evaluation in batches of 256 images: auto') == 1


class Cut(Exception):
    """The end of a run that nobody expects."""


def test_a_resumed_run_keeps_the_batch(tmp_path, few, monkeypatch):
    """It is in the checkpoint; another one, as the memory may now say, would round otherwise."""
    monkeypatch.setattr(eval_batch, 'choose', lambda *_: (16, 'so'))
    start(tmp_path, 'whole', '--epochs', '3')

    def cut(trainer):
        raise Cut

    with pytest.raises(Cut):
        start(tmp_path, 'cut', '--epochs', '3', hooks=Hooks(callback=cut))
    monkeypatch.setattr(eval_batch, 'choose', lambda *_: pytest.fail('it was chosen'))
    trainer = start(tmp_path, 'cut', '--epochs', '3', '--resume', 'auto')
    assert trainer.eval_batch == trainer.eval_data.batch_size == 16
    assert log_of(tmp_path / 'cut') == log_of(tmp_path / 'whole')
    trainer = start(tmp_path, 'cut', '--epochs', '4', '--resume', 'auto', '--validation-batch-size', '5')
    assert trainer.eval_data.batch_size == 5 and len(trainer.rows) == 4


def test_a_damaged_batch_is_refused(tmp_path, few):
    start(tmp_path, 'a', '--epochs', '1')
    path = tmp_path / 'a' / 'last.pth.tar'
    content = torch.load(path, weights_only=True)
    for wrong in (-1, 2.5, 'many', True):
        content['progress']['eval_batch'] = wrong
        torch.save(content, path)
        with pytest.raises(UserError, match='is damaged: its eval_batch is'):
            start(tmp_path, 'a', '--epochs', '2', '--resume', 'auto')


AGREE = """
import os
import torch
from vim_timm.engine.eval_batch import agreed
from vim_timm.settings import Process
rank = int(os.environ['RANK'])
torch.distributed.init_process_group('gloo')
print('agreed on', agreed([512, 128][rank], Process(rank=rank, world_size=2)))
torch.distributed.destroy_process_group()
"""


def test_ranks_agree_on_the_smallest(tmp_path):
    assert finish(ranks(AGREE, count=2, folder=tmp_path)).count('agreed on 128') == 2
    assert eval_batch.agreed(512, Process()) == 512


UNEQUAL = """
import os, sys
import torch
from types import SimpleNamespace
from vim_timm.engine import eval_batch
from vim_timm.errors import out_of_memory, run
from vim_timm.settings import Process
rank, most = int(os.environ['RANK']), int(sys.argv[1])
torch.distributed.init_process_group('gloo')
torch.cuda.memory_reserved, torch.cuda.mem_get_info = (lambda _: 0), (lambda _: (2**30, 2**31))
eval_batch.choose = lambda *given: (eval_batch.try_batches(*given)[0], 'so')

class Loader(SimpleNamespace):
    data_config, layout, batch_size, readers = {'input_size': (1, 8, 8)}, torch.contiguous_format, 1024, 0
    __len__, rebatch = lambda self: 1, lambda self, size: print('rebatched to', size)

def compute(batch):
    if rank == 1 and len(batch.images) > most:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB') if most >= 0 else KeyError('x')

def fit(_):
    try:
        eval_batch.fit_batch(*given)
    except Exception as error:
        print('again' if out_of_memory(error) else 'never', flush=True)
        raise

given = None, Loader(), Process(rank=rank, world_size=2), SimpleNamespace(say=print), compute
status = run(fit, 'validate.py', [])
torch.distributed.destroy_process_group()
sys.exit(status)
"""


def test_ranks_go_on_with_what_fits_on_the_one_that_runs_out_of_memory(tmp_path):
    assert finish(ranks(UNEQUAL, '16', count=2, folder=tmp_path)).count('rebatched to 16') == 2


def test_no_rank_waits_for_one_that_cannot_evaluate_a_single_image(tmp_path):
    ended = [process.wait(200) for process in ranks(UNEQUAL, '0', count=2, folder=tmp_path)]
    assert [(status, text.splitlines()[0]) for status, text in ended] == [(3, 'again'), (3, 'again')]
    assert ended[0][1].endswith('error: another rank of this run cannot evaluate one image, and says why\n')
    assert 'rank 1: error: out of device memory' in ended[1][1]
    ended = [process.wait(200) for process in ranks(UNEQUAL, '-1', count=2, folder=tmp_path / 'bug')]
    assert ended[0][1].startswith('never') and ended[0][0] == 3 and 'KeyError' in ended[1][1]


@pytest.fixture
def made_up(monkeypatch):
    """A device with 1 GiB free, of which a batch takes what the returned list says last."""
    reserved = [0]
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda _: sum(reserved))
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda _: (2**30, 2**31))
    monkeypatch.setattr(eval_batch, 'choose', lambda *args: (eval_batch.try_batches(*args)[0], 'so'))
    return reserved


def test_batches_of_zeros_are_evaluated_before_real_ones(tmp_path, few, made_up, monkeypatch):
    """Images that take 16 MiB each: 44 fit."""
    sizes, predict = [], eval_batch.predict

    def watched(task, batch, process):
        assert not task.training and not batch.images.any() and batch.images.shape[1:] == (1, 16, 16)
        assert len(batch.images) == len(batch.targets) == len(batch.keys)
        sizes.append(len(batch.images))
        made_up.append(2**24 * len(batch.images))
        return predict(task, batch, process)

    monkeypatch.setattr(eval_batch, 'predict', watched)
    trainer = start(tmp_path, 'a', '--epochs', '2')
    assert sizes == [1, 1, 4, 4, 16, 16] and trainer.eval_batch == trainer.eval_data.batch_size == 32
    monkeypatch.setattr(eval_batch, 'choose', lambda *_: (32, 'so'))
    start(tmp_path, 'b', '--epochs', '2')
    assert log_of(tmp_path / 'a') == log_of(tmp_path / 'b')  # it has left no trace


def test_reconstructions_are_tried_with_their_metrics(tmp_path, few, made_up, monkeypatch):
    flags = '--mae --img-size 16 --in-chans 1 --model vim_nano_patch4_32 --model-kwargs depth=1 embed_dim=32 --epochs 1'
    more = '--decoder-dim 32 --decoder-depth 1 --decoder-heads 4 --mask-ratio 0.5 --dataset digits --device cpu'
    words = [*flags.split(), *more.split(), '--batch-size', '64', '--warmup-epochs', '0', '--workers', '0']
    assert train.main([*words, '--output', str(tmp_path), '--experiment', 'a', '-vb', 'auto']) == 0
    sizes, ratios, scores = [], [], reconstruction.scores

    def watched(task, process, batch, ema=False):
        sizes.append(len(batch.images))
        ratios.append(task.autoencoder(ema).mask_ratio)
        made_up.append(2**24 * len(batch.images))
        return scores(task, process, batch, ema)

    monkeypatch.setattr(reconstruction, 'scores', watched)
    words = ['--mae', '--checkpoint', str(tmp_path / 'a' / 'last.pth.tar'), '--device', 'cpu', '--workers', '0']
    rows = [validate.validate(validate.parse_args([*words, '-b', size]), Process()) for size in ('auto', '7')]
    assert sizes[:7] == [1, 1, 4, 4, 16, 16, 32] and set(ratios) == {0.5}
    assert rows[0].pop('model') == rows[1].pop('model') and rows[0] == pytest.approx(rows[1], rel=1e-5)
    ratios.clear()
    report = ['--report', str(tmp_path / 'report'), '--mask-ratios', '0.25', '0.75']
    validate.validate(validate.parse_args([*words, '-b', 'auto', *report]), Process())
    assert ratios[:6] == [0.25] * 6 and set(ratios) == {0.25, 0.5, 0.75}  # most is visible, and takes memory, at 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('flags', ['', '--data-in-memory --cuda-graph', '--amp --amp-dtype bfloat16 --channels-last'])
def test_what_is_chosen_fits_on_a_gpu(flags, tmp_path, monkeypatch):
    """The room is a third of a GiB: the evaluation takes no more than what that is said to be a share of."""
    room = 2**30 // 3
    monkeypatch.setattr(eval_batch, 'MOST_BYTES', room)
    monkeypatch.setattr(eval_batch, 'MOST_PIXELS', 2**40)
    taken, evaluate = [], loop.evaluate

    def watched(*args, **kwargs):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        result = evaluate(*args, **kwargs)
        taken.append(torch.cuda.memory_reserved() - before)
        return result

    monkeypatch.setattr(loop, 'evaluate', watched)
    words = '--dataset digits --model vim_nano_patch4_32 --img-size 128 --opt adamw --lr 1e-3 --warmup-epochs 0'
    more = f'--device cuda --workers 0 --batch-size 32 --epochs 1 --validation-batch-size auto {flags}'
    words = [*words.split(), *more.split()]
    trainer = train.train(train.parse_args([*words, '--output', str(tmp_path), '--experiment', 'a']))
    size = trainer.eval_batch
    assert size == trainer.eval_data.batch_size and size & (size - 1) == 0 and size > 1
    assert 0 < taken[0] <= room / SHARE
    assert trainer.rows[0]['eval_top1'] is not None
