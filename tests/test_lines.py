"""Every line of shell in README and docs is a command line that is understood as it stands.

Lines that train, evaluate, predict and export run besides, page by page, in a folder in which their names exist, with
two blocks, small batches and one epoch.
"""

import argparse
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from test_migration_doc import write_cifar, write_images
from torchvision.datasets import cifar

from vim_timm import export, predict, train, validate
from vim_timm.commands import COMMANDS
from vim_timm.settings import programs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# run elsewhere: installation and timm's suite (.ci/run), the hooks (tests/test_docs.py)
ELSEWHERE = ('python3 -m venv', 'source ', 'python tests/timm_suite/run.py', 'python mine.py')
MODULES = {command.module.removesuffix('.__main__'): name for name, command in COMMANDS.items()}


def lines():
    for page in PAGES:
        for block in re.findall(r'```(?:sh|bash)\n(.*?)```', page.read_text(encoding='utf-8'), re.DOTALL):
            for line in block.splitlines():
                if line.strip() and not line.startswith(ELSEWHERE):
                    yield pytest.param(line, id=f'{page.stem}: {line[:60]}')


LINES = list(lines())


def command_of(line):
    """The command and the arguments of a line, whatever starts it: python, torchrun, srun, with variables before."""
    words = [word for word in shlex.split(line, comments=True) if word != '...']
    for place, word in enumerate(words):
        if word in ('train.py', 'validate.py'):
            return word.removesuffix('.py'), words[place + 1 :]
        if word == 'vim-timm':
            return words[place + 1], words[place + 2 :]
        if word == '-m':
            return MODULES.get(words[place + 1], words[place + 1]), words[place + 2 :]
    raise AssertionError(f'{line}: what is this?')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the documents' names of data, pictures and files exist."""
    for name in 'IMAGENET FOLDER DATA data CIFAR10 photos new TILES BANDS output/train/NAME'.split():
        (tmp_path / name).mkdir(parents=True)
    for name in ('photo.jpg', 'model.onnx', 'model_best.pth.tar', 'FILE.pth', 'one.jpg'):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Read(Exception):
    """A command line was parsed; what would follow takes hours."""


def read_benchmark(name, words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def read(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', read)
    monkeypatch.setattr(sys, 'argv', [name, *words])
    with pytest.raises(Read):
        importlib.import_module(name).main()


@pytest.mark.parametrize('line', LINES)
def test_a_line_is_understood(line, place, capsys, monkeypatch):
    name, words = command_of(line)
    if name.startswith('benchmarks.'):
        return read_benchmark(name, words, monkeypatch)
    words = [word.replace('/data/imagenet', 'IMAGENET') for word in words]
    if name in COMMANDS and '--help' not in words:
        if '--list-recipes' in words:
            with pytest.raises(SystemExit, match='0'):
                COMMANDS[name].read(words)
        else:
            COMMANDS[name].read(words)
    else:
        assert name in ('--help', 'vim_timm.report.curves') or name in COMMANDS


TRAINING = [one for one in LINES if command_of(one.values[0])[0] == 'train' and '--list' not in one.values[0]]


@pytest.mark.parametrize('line', TRAINING)
def test_the_model_of_a_training_line_can_be_made(line, place):
    """Its model takes the arguments, classes and size that the line gives."""
    args = programs.train_settings([word.replace('/data/imagenet', 'IMAGENET') for word in command_of(line)[1]])
    size = {'img_size': args.img_size} if args.img_size else {}
    channels = {'in_chans': args.in_chans} if args.in_chans else {}
    model = timm.create_model(args.model, device='meta', **size, **channels, **args.model_kwargs)
    assert not args.pretrained or args.pretrained_path or timm.is_model_pretrained(args.model)
    assert model.get_classifier() is not None or args.mae or args.model.startswith('mae_')


RUN = ('README', 'cifar10', 'evaluation', 'fast-attention', 'fine-tuning', 'masked-autoencoding', 'recipes', 'training')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with data under all of the documents' names, and a trained model in output/train/NAME."""
    root = tmp_path_factory.mktemp('home')
    for name in ('IMAGENET', 'FOLDER', 'CIFAR10', 'photos'):
        write_images(root / name)
    batches = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    for name in ('DATA', 'data'):
        write_cifar(root / name / 'cifar-10-batches-py', batches, 'labels', ('batches.meta', 'label_names'), 10)
    for split in ('train', 'val'):
        for label in range(2):
            for name, dtype in (('TILES', np.float64), ('BANDS', np.uint16)):
                folder = root / name / split / f'class{label}'
                folder.mkdir(parents=True)
                for i in range(4):
                    np.save(folder / f'{i}.npy', np.random.default_rng(i).uniform(0, 10000, (13, 40, 40)).astype(dtype))
    Image.new('RGB', (40, 40), 'red').save(root / 'photo.jpg')
    Image.new('RGB', (40, 40), 'blue').save(root / 'one.jpg')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train.main(smaller('train', '--recipe digits --experiment NAME --model-ema'.split())) == 0
    shutil.copy(root / 'output/train/NAME/model_best.pth.tar', root / 'model_best.pth.tar')
    return root


QUIET = ['--device', 'cpu', '--workers', '0']


def smaller(name, words):
    """The arguments with a small model, small batches and one epoch, on a CPU, and without published weights."""
    words = [word.replace('/data/imagenet', 'IMAGENET') for word in words if word != '--cuda-graph']
    if name == 'validate':
        return [*words, *QUIET, *(['--mask-ratios', '0.75'] if '--mae' in words else [])]
    if '--pretrained-path' not in words:
        words = [word for word in words if word != '--pretrained']
    args = programs.train_settings(words)
    digits, kwargs = args.dataset == 'digits', {**args.model_kwargs, 'depth': 2}
    words += ['--epochs', '1', '--warmup-epochs', '0', '--batch-size', '718' if digits else '4', '--aug-repeats', '0']
    words += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items()), *QUIET]
    words += ['--img-size', '64'] if 'favit' in (args.model or '') else []  # it has a token per channel of a patch
    classes = ['--num-classes', '2'] if args.data_dir in ('IMAGENET', 'FOLDER', 'CIFAR10', 'photos', 'TILES') else []
    return [*words, *([] if args.mae else classes)]


@pytest.mark.parametrize('page', RUN)
def test_lines_that_train_and_evaluate_run(page, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(cifar, 'check_integrity', lambda *_: True)  # of the real files' checksums
    ran = 0
    for line in (one.values[0] for one in LINES if one.id.startswith(f'{page}: ')):
        name, words = command_of(line)
        skipped = '--list-recipes' in words or (name == 'validate' and '--pretrained' in words)
        if name in ('train', 'validate') and not skipped:
            if page == 'fast-attention' and name == 'validate':
                words = (
                    words[: words.index('--model')] + words[words.index('--data-dir') + 2 :]
                )  # of that model there is none
            if page == 'recipes':  # the second of its runs of ImageNet starts from the first
                words = [word.replace('/NAME/', '/tiny/') for word in words]
                words += ['--experiment', 'tiny'] if 'imagenet_tiny' in words else []
            if 'output/train/cifar10' in line or 'output/train/mae/' in line:
                made = re.search(r'output/train/(\w+)', line)[1]
                assert (home / 'output/train' / made / 'last.pth.tar').exists()
            program = {'train': train, 'validate': validate}[name]
            assert program.main(smaller(name, words)) == 0, line
            ran += 1
    assert ran


def test_lines_that_predict_and_export_run(home, monkeypatch):
    monkeypatch.chdir(home)
    lines = [one.values[0] for one in LINES if one.id.startswith('predict: ')]
    found = sorted(map(command_of, lines), key=lambda one: one[0])  # exports come first: others read their file
    for name, words in found:
        if '--model' not in words:
            assert {'predict': predict, 'export': export}[name].main(words) == 0
    assert (home / 'model.onnx').exists() and (home / 'sheet.html').exists()
