"""A mistake on the command line ends in one sentence and a status other than 0; nothing is written or executed."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from processes import TRAIN, Python, ranks

from vim_timm import data, train, validate
from vim_timm.data.sampling import Stream
from vim_timm.data.unreadable import Unreadable
from vim_timm.engine import build
from vim_timm.engine.build import check_optimizer, make_training_model
from vim_timm.errors import TrainingStopped, UserError
from vim_timm.files import write_atomically
from vim_timm.settings import Process

BASE = (
    '--dataset digits --model test_vit --img-size 32 --in-chans 1 --workers 0 --batch-size 64 --epochs 1 --device cpu'
)


class RunsCode:
    """A pickle that would leave a file behind when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command line and return the sentence it was refused with."""

    def check(arguments, program=train):
        output = tmp_path / 'output'
        extra = ['--output', str(output)] if program is train else []
        assert program.main([*arguments, *extra]) not in (0, None)
        lines = capsys.readouterr().err.strip().splitlines()
        sentences = [line for line in lines if 'error:' in line]
        assert len(sentences) == 1 and 'Traceback' not in ' '.join(lines)
        assert not output.exists()
        return sentences[0]

    return check


@pytest.fixture
def folder(tmp_path):
    """An image folder of 2 classes."""
    for split in ('train', 'validation'):
        for name in ('cat', 'dog'):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (32, 32), (i, 2 * i, 3 * i)).save(tmp_path / 'images' / split / name / f'{i}.png')
    return str(tmp_path / 'images')


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ('--model vim_nono_patch4_32', ['vim_nono_patch4_32', 'vim_nano_patch4_32']),
        ('--model-kwargs depht=3', ['depht']),
        ('--model-kwargs depth', ['--model-kwargs', 'depth']),
        ('--model-kwargs num_classes=9', ['--model-kwargs cannot set num_classes']),
        ('--model-kwargs features_only=True', ['--model-kwargs cannot set features_only']),
        ('--gp=', ['logits', '--gp']),
        ('--num-classes 7', ['7', '10 classes']),
        ('--class-map classes.txt', ['--class-map', 'digits']),
        ('--model vim_nano_patch4_32 --img-size 30', ['30', '28', '32']),
        ('--epochs -1', ['--epochs', '-1']),
        ('--epochs 0', ['--epochs']),
        ('--epochs many', ['--epochs', 'many']),
        ('--batch-size 0', ['--batch-size', '0']),
        ('--batch-size 100000', ['batch']),
        ('--opt adamv', ['adamv']),
        ('--sched cosin', ['cosin']),
        ('--lr -1', ['--lr']),
        ('--eval-metric top3', ['top3', 'top1']),
        ('--mixup 0.5 --batch-size 63', ['even', '63']),
        ('--aug-splits 1', ['--aug-splits']),
        ('--aa rand-q9', ['augmentation', 'RandAugment']),
        ('--aa rand-m9-inc', ['--aa needs a number', "'inc'"]),
        ('--aa augmix-b', ['--aa needs a number']),
        ('--aa rand-m9-tweight', ['--aa has one of tweights']),
        ('--aa rand-m9 --train-interpolation lanczos', ['--train-interpolation', 'lanczos']),
        ('--aa augmix-m3 --train-interpolation box --aug-splits 2', ['--train-interpolation', 'box']),
        ('--aa v0 --interpolation hamming --train-interpolation=', ['--train-interpolation', 'hamming']),
        ('--resume auto', ['--experiment']),
        ('--resume nowhere.pth.tar', ['nowhere.pth.tar']),
        ('--initial-checkpoint nowhere.pth', ['nowhere.pth']),
        ('--pretrained --pretrained-path nowhere.pth', ['nowhere.pth']),
        (f'--pretrained-path {__file__}', ['not read without --pretrained']),
        ('--recipe nothing', ['nothing', 'digits']),
        ('--config nowhere.yaml', ['nowhere.yaml']),
        ('--device tpu', ['tpu']),
        ('--dataset cifar10', ['cifar10', 'torch/NAME']),
        ('--drop-path 2', ['--drop-path', '2']),
        ('--mean 0.1 0.2', ['images', '2']),
        ('--interpolation bogus', ['--interpolation', 'bogus']),
        ('--crop-pct 0', ['--crop-pct']),
        ('--scale 1', ['--scale', '1']),
        ('--ratio 0 0', ['--ratio']),
        ('--cutmix-minmax 0.2', ['--cutmix-minmax']),
        ('--smoothing 2', ['--smoothing']),
        ('--smoothing 1', ['--smoothing must be at most']),
        ('--aug-repeats -1', ['--aug-repeats']),
        ('--aug-repeats 2 --epoch-repeats 2', ['--aug-repeats', '--epoch-repeats']),
        ('--train-num-samples 100', ['--train-num-samples', 'stream']),
        ('--val-num-samples 100', ['--val-num-samples', 'stream']),
        ('--scale 0.5 2', ['--scale', 'area']),
        ('--opt adamw --opt-betas 0.9', ['--opt-betas', '2 of them, not 1']),
        ('--opt adan --opt-betas 0.9 0.9', ['--opt-betas', '3 of them, not 2']),
        ('--opt adahessian', ['--opt adahessian', 'second derivatives']),
        ('--opt lookahead_adahessian', ['second derivatives']),
        ('--opt-kwargs lr=0.5', ['--opt-kwargs cannot set lr']),
        ('--opt-kwargs opt=adamw', ['--opt-kwargs cannot set opt']),
        ('--clip-grad 0', ['--clip-grad must be above 0']),
        ('--layer-decay 0.7 --sched none', ['--layer-decay', '--sched constant']),
        ('--split-bn', ['--split-bn', '--aug-splits']),
        ('--loss asl --bce-loss', ['asl and bce', '--bce-loss']),
        ('--jsd-loss --bce-loss --aug-splits 2', ['bce and jsd', '--jsd-loss']),
        ('--seed -1', ['--seed']),
        ('--max-unreadable -1', ['--max-unreadable']),
        ('--device-modules bogus_module', ['--device-modules', 'bogus_module']),
        ('--torchcompile bogus', ['--torchcompile', 'bogus']),
        ('--amp --model-dtype bfloat16', ['bfloat16']),
        ('--torchscript', ['--torchscript']),
    ],
)
def test_train_refuses(flags, words, refused):
    message = refused([*BASE.split(), *flags.split()])
    for word in words:
        assert word in message


def test_batch_norm_synchronized_on_cpus_is_refused():
    args = train.parse_args([*BASE.split(), '--sync-bn'])
    with pytest.raises(UserError, match='--sync-bn'):
        make_training_model(args.replace(model='test_resnet', img_size=None), Process(world_size=2))


def test_a_bias_that_a_classifier_has_not_is_refused(monkeypatch):
    model = timm.create_model('test_vit')
    model.head = torch.nn.Linear(64, 10, bias=False)
    monkeypatch.setattr(build, 'make_model', lambda *_, **__: model)
    with pytest.raises(UserError, match='--head-init-bias: .* has no bias'):
        make_training_model(train.parse_args([*BASE.split(), '--head-init-bias', '-4']), Process())


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_cuda_asked_for_and_absent(refused):
    assert 'CUDA' in refused([*BASE.split(), '--device', 'cuda'])


def test_missing_data_folder(refused, tmp_path):
    path = str(tmp_path / 'nowhere')
    assert path in refused(['--data-dir', path, '--model', 'test_vit'])
    assert path in refused(['--data-dir', path, '--model', 'test_vit', '--pretrained'], validate)


def test_a_split_without_its_folder(refused, folder):
    flags = ['--data-dir', folder, '--model', 'test_vit', '--img-size', '32', '--val-split', 'tset']
    assert 'tset' in refused(flags)


def test_empty_data_folder(refused, tmp_path):
    (tmp_path / 'train').mkdir()
    assert str(tmp_path) in refused(['--data-dir', str(tmp_path), '--model', 'test_vit'])


def test_class_count_of_a_folder(refused, folder):
    message = refused(['--data-dir', folder, '--model', 'test_vit', '--img-size', '32', '--num-classes', '10'])
    assert '10' in message and '2 classes' in message


@pytest.mark.skipif(torch.cuda.is_available(), reason='Triton can run here')
def test_forced_scan_backend_that_cannot_run(tmp_path):
    flags = [*BASE.split(), '--model', 'test_vim', '--output', str(tmp_path / 'o')]
    status, output = Python(TRAIN, *flags, output=tmp_path / 'said', environment=dict(VIM_TIMM_SCAN='triton')).wait()
    assert status == 2 and 'Traceback' not in output
    assert 'triton' in output.splitlines()[-1].lower()
    assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize('program', ['train', 'validate'])
def test_compiling_without_a_compiler(program, weights, tmp_path):
    command = [sys.executable, '-m', f'vim_timm.{program}', *COMMON, '--model', 'test_vit', '--torchcompile']
    more = {'train': ['--output', str(tmp_path / 'o'), '--epochs', '1'], 'validate': ['--checkpoint', str(weights)]}
    nowhere = dict(CXX='/nonexistent/g++', CC='/nonexistent/gcc', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    result = subprocess.run([*command, *more[program]], env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert '--torchcompile: ' in result.stderr.splitlines()[-1] and not (tmp_path / 'o').exists()


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of timm's test_vit."""
    import timm

    path = tmp_path / 'vit.pth'
    torch.save(timm.create_model('test_vit', in_chans=1, img_size=32, num_classes=10).state_dict(), path)
    return path


LOADS = [
    (train, '--initial-checkpoint'),
    (train, '--resume'),
    (validate, '--checkpoint'),
]
COMMON = '--dataset digits --img-size 32 --in-chans 1 --workers 0 --device cpu'.split()


@pytest.mark.parametrize(('program', 'flag'), LOADS)
def test_truncated_checkpoint(program, flag, refused, weights):
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert 'truncated' in refused([*COMMON, '--model', 'test_vit', flag, str(weights)], program)


@pytest.mark.parametrize(('program', 'flag'), LOADS)
@pytest.mark.parametrize('legacy', [False, True])
def test_pickle_that_would_run_code(program, flag, legacy, refused, tmp_path):
    trace, path = tmp_path / 'trace', tmp_path / 'evil.pth'
    if legacy:
        path.write_bytes(pickle.dumps({'state_dict': RunsCode(trace)}))
    else:
        torch.save({'state_dict': RunsCode(trace)}, path)
    assert 'would run code' in refused([*COMMON, '--model', 'test_vit', flag, str(path)], program)
    assert not trace.exists()


@pytest.mark.parametrize(('program', 'flag'), [LOADS[0], LOADS[2]])
def test_checkpoint_of_another_family(program, flag, refused, weights):
    message = refused([*COMMON, '--model', 'vim_nano_patch4_32', flag, str(weights)], program)
    assert 'vision transformer' in message


@pytest.mark.parametrize(('program', 'flag'), [LOADS[0], LOADS[2]])
def test_checkpoint_with_other_classes(program, flag, refused, tmp_path):
    import timm

    path = tmp_path / 'hundred.pth'
    torch.save(timm.create_model('test_vit', in_chans=1, img_size=32, num_classes=100).state_dict(), path)
    message = refused([*COMMON, '--model', 'test_vit', flag, str(path)], program)
    assert 'head.weight' in message or 'head.bias' in message


def test_results_that_could_not_be_written_are_refused_first(refused, weights):
    flags = [*COMMON, '--model', 'test_vit', '--num-classes', '10', '--checkpoint', str(weights)]
    assert 'nowhere' in refused([*flags, '--results-file', 'nowhere/results.csv'], validate)
    assert 'is a folder' in refused([*flags, '--results-file', os.curdir], validate)


def test_repeated_augmentation_needs_an_index():
    class Reader(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    args = train.parse_args([*BASE.split(), '--aug-repeats', '3'])
    images = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation='bicubic', crop_pct=1.0)
    with pytest.raises(UserError, match='--aug-repeats needs images with an index, not the stream'):
        data.train_loader(args, Process(), Reader(), images)


@pytest.mark.parametrize('opt, betas', [('adafactor', [0.9]), ('adan', [0.9] * 3), ('lookahead_adamw', [0.9] * 2)])
def test_betas_that_an_optimizer_takes_are_not_refused(opt, betas):
    check_optimizer(opt, betas)
    timm.optim.create_optimizer_v2(torch.nn.Linear(2, 2), opt, lr=1e-3, betas=betas)


def test_a_number_of_images_is_of_streams_alone(refused, weights):
    flags = [*COMMON, '--model', 'test_vit', '--num-classes', '10', '--checkpoint', str(weights)]
    assert '--num-samples' in refused([*flags, '--num-samples', '5'], validate)


def test_an_output_folder_that_cannot_be(weights, capsys):
    assert train.main([*BASE.split(), '--output', str(weights)]) == 2
    assert '--output' in capsys.readouterr().err


def test_validate_wants_weights(refused):
    assert '--checkpoint' in refused(['--model', 'test_vit'], validate)
    assert '--checkpoint' in refused([], validate)
    assert '--checkpoint' in refused(['--dataset', 'digits'], validate)


def test_validate_without_weights_names_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seconds, name in ((10, 'old'), (20, 'new')):
        path = tmp_path / 'output' / 'train' / name / 'model_best.pth.tar'
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    assert validate.main([]) == 2
    assert 'output/train/new/model_best.pth.tar' in capsys.readouterr().err.replace(os.sep, '/')


def test_unreadable_images_are_named_counted_and_limited(folder, tmp_path, capfd):
    broken = os.path.join(folder, 'train', 'cat', '0.png')
    with open(broken, 'r+b') as file:
        file.truncate(60)
    flags = ['--data-dir', folder, '--model', 'test_vit', '--img-size', '32', '--workers', '1', '--batch-size', '4']
    flags += [
        '--device',
        'cpu',
        '--epochs',
        '1',
        '--lr',
        '0.01',
        '--output',
        str(tmp_path / 'out'),
        '--experiment',
        'a',
    ]
    assert train.main([*flags, '--max-unreadable', '5']) == 0
    assert broken in capfd.readouterr().out
    assert train.main([*flags, '--max-unreadable', '0']) == 3
    captured = capfd.readouterr()
    assert broken in captured.err and 'Traceback' not in captured.err


@pytest.mark.skipif(not torch.distributed.is_available(), reason='needs torch.distributed')
def test_ranks_count_unreadable_images_together(tmp_path):
    for split in ('train', 'validation'):
        (tmp_path / split / 'cat').mkdir(parents=True)
        for i in range(18):
            path = tmp_path / split / 'cat' / f'{i:02}.png'
            Image.new('RGB', (32, 32)).save(path)
            if split == 'validation' and i % 3 == 1:  # three on each rank, and no stand-in among them
                path.write_bytes(b'no image')
    flags = '--model test_vit --img-size 32 --workers 1 --batch-size 4 --device cpu --epochs 1 --max-unreadable 4'
    places = ['--data-dir', str(tmp_path), '--output', str(tmp_path / 'out')]
    ended = [process.wait() for process in ranks(TRAIN, *flags.split(), *places, count=2, folder=tmp_path)]
    output = ''.join(text for _, text in ended)
    assert all(status for status, _ in ended) and output.count('unreadable image /') == 6, output
    assert 'the ranks met more than --max-unreadable 4' in output


def test_unreadable_evaluation_image_is_not_counted(folder, tmp_path, capsys):
    import json

    with open(os.path.join(folder, 'validation', 'dog', '1.png'), 'r+b') as file:
        file.truncate(60)
    path = tmp_path / 'result.json'
    flags = ['--data-dir', folder, '--model', 'test_vit', '--img-size', '32', '--workers', '0', '--device', 'cpu']
    import timm

    torch.save(timm.create_model('test_vit', img_size=32, num_classes=2).state_dict(), tmp_path / 'w.pth')
    flags += ['--checkpoint', str(tmp_path / 'w.pth'), '--results-file', str(path), '--results-format', 'json']
    assert validate.main(flags) == 0
    assert json.loads(path.read_text())['count'] == 7


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='POSIX')
def test_dead_worker_ends_the_run(tmp_path):
    flags = [*BASE.split(), '--epochs', '300', '--workers', '2', '--output', str(tmp_path), '--experiment', 'a']
    process = Python(TRAIN, *flags, output=tmp_path / 'said')
    while not (tmp_path / 'a' / 'last.pth.tar').exists():
        assert process.poll() is None
        time.sleep(0.1)
    worker = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(worker), signal.SIGKILL)
    status, error = process.wait(timeout=200)
    assert status == 3
    # in place of a traceback of its own; the other worker may show one as it loses the main process
    assert 'train.py: error: a data loading process died or cannot be reached' in error
    torch.load(tmp_path / 'a' / 'last.pth.tar', weights_only=True)


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_image_of_absurd_size_is_unreadable(workers, folder, tmp_path, capfd, monkeypatch):
    """A broken header may promise more pixels than Pillow is willing to decode."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1024)
    bomb = os.path.join(folder, 'train', 'dog', '3.png')
    Image.new('RGB', (64, 64)).save(bomb)
    flags = ['--data-dir', folder, '--model', 'test_vit', '--img-size', '32', '--batch-size', '4', '--epochs', '1']
    assert train.main([*flags, '--workers', workers, '--device', 'cpu', '--output', str(tmp_path / 'out')]) == 0
    assert f'unreadable image {bomb}, skipped' in capfd.readouterr().out


def test_what_a_stream_skips_is_counted(capsys):
    """timm's reader of web data sets tells its log alone what it could not read."""

    class Reader(torch.utils.data.IterableDataset):
        def __iter__(self):
            for place in range(4):
                logging.getLogger('timm.data.readers.reader_wds').warning('shard %d is cut off', place)
                yield place, 0

    assert len(list(Stream(Reader(), seed=0, rank=0, unreadable=Unreadable(4)))) == 4
    assert capsys.readouterr().out.count('skipped') == 4
    with pytest.raises(TrainingStopped, match='--max-unreadable 2'):
        list(Stream(Reader(), seed=0, rank=0, unreadable=Unreadable(2)))


def test_a_stream_that_breaks_ends_the_run_in_a_sentence():
    class Reader(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield 0, 0
            raise OSError('image file is truncated')

    with pytest.raises(TrainingStopped, match='image file is truncated'):
        list(Stream(Reader(), seed=0, rank=0, unreadable=Unreadable(2)))


def test_a_run_on_a_full_disk_ends_in_a_sentence(tmp_path):
    """A limit on the size of a file stands for the full disk: the checkpoint is over it, the logs are not."""
    pytest.importorskip('resource')
    limited = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));' + TRAIN
    flags = [*BASE.split(), '--output', str(tmp_path), '--experiment', 'a']
    status, output = Python(limited, *flags, output=tmp_path / 'said').wait()
    assert status == 3 and 'Traceback' not in output
    assert output.splitlines()[-1].endswith(f'error: File too large: {tmp_path}/a/last.pth.tar')
    assert sorted(os.listdir(tmp_path / 'a')) == ['args.yaml', 'summary.csv', 'summary.json']


@pytest.mark.parametrize('what', ['bytes', 'checkpoint'])
def test_a_full_disk_keeps_the_last_checkpoint(what, tmp_path):
    """A limit on the size of a file stands for the full disk."""
    resource = pytest.importorskip('resource')
    path = str(tmp_path / 'last.pth.tar')
    write_atomically(path, b'good')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {'weight': torch.zeros(1000, 100)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match='File too large') as caught:
            write_atomically(path, bytes(200_000) if what == 'bytes' else lambda file: torch.save(state, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == path
    assert os.listdir(tmp_path) == ['last.pth.tar']
    assert open(path, 'rb').read() == b'good'
