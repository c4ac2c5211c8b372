"""docs/from-other-frameworks.md is true: what it writes on its right side exists, and its command lines run.

Every line of train.py, validate.py and vim_timm.original is run on tiny data, for one epoch, with its model cut to two
blocks. Lines of torchrun go through the translation and the real parser only; several processes are test_resume's.
"""

import importlib
import pickle
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import cifar

import vim_timm  # noqa: F401  registers the models
from vim_timm import doctor, original, train, validate
from vim_timm.report import curves
from vim_timm.settings.flags import TRAIN, VALIDATE

ROOT = Path(__file__).parents[1]
DOC = (ROOT / 'docs' / 'from-other-frameworks.md').read_text()
TABLE_ROWS = [
    [cell.strip().replace('\\|', '|') for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
    for line in DOC.splitlines()
    if line.startswith('|') and not line.startswith('|---')
]
HERE = ' '.join(row[1] for row in TABLE_ROWS) + ' '.join(
    line for line in DOC.splitlines() if line.startswith('A run with all of it')
)
SPANS = list(dict.fromkeys(re.findall(r'`([^`]+)`', HERE)))
TRAINING = [span for span in SPANS if span.startswith('python train.py') and '--list' not in span]
VALIDATION = [span for span in SPANS if span.startswith('python validate.py')]
ORIGINAL = [span for span in SPANS if 'vim_timm.original' in span and '--model' in span]
MODELS = [span for span in SPANS if span.startswith('timm.create_model(')]
FLAGS = {
    name.lstrip('-').replace('-', '_')
    for table in (TRAIN, VALIDATE)
    for rows in table.values()
    for row in rows
    for name in row[0].split()
} | {'recipe', 'config', 'list_recipes'}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(root):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label in range(2):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(folder / f'{i}.png')


def write_mnist(raw):
    raw.mkdir(parents=True)
    for name in ('train', 't10k'):
        for kind, shape in (('images-idx3', (8, 28, 28)), ('labels-idx1', (8,))):
            values = np.arange(np.prod(shape)) % 10
            header = struct.pack(f'>I{len(shape)}I', 0x800 + len(shape), *shape)
            (raw / f'{name}-{kind}-ubyte').write_bytes(header + values.astype(np.uint8).tobytes())


def write_cifar(folder, names, key, meta, classes):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3072)).astype(np.uint8)
    for name in names:
        count = 2 if name.startswith('data') else 4  # of five files
        (folder / name).write_bytes(pickle.dumps({'data': pixels[:count], key: [0, 1, 2, 3][:count]}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f'class{i}' for i in range(classes)]}))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder in which the names of the document exist: IMAGENET, FOLDER, DATA and a configuration."""
    root = tmp_path_factory.mktemp('place')
    write_images(root / 'IMAGENET')
    (root / 'FOLDER').symlink_to(root / 'IMAGENET')
    for name in ('MNIST', 'FashionMNIST'):
        write_mnist(root / 'DATA' / name / 'raw')
    batches = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    write_cifar(root / 'DATA' / 'cifar-10-batches-py', batches, 'labels', ('batches.meta', 'label_names'), 10)
    write_cifar(root / 'DATA' / 'cifar-100-python', ['train', 'test'], 'fine_labels', ('meta', 'fine_label_names'), 100)
    (root / 'my_custom_config.yaml').write_text('model: vim_nano_patch4_32\nopt: adamw\nlr: 1e-3\n')
    return root


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(cifar, 'check_integrity', lambda *_: True)  # of the real files' checksums


@pytest.fixture
def checkpoint(place):
    """The document's CHECKPOINT, trained once."""
    if not (place / 'CHECKPOINT').exists():
        folder = start('python train.py --recipe cifar10_tiny --data-dir DATA', 'checkpoint')
        (place / 'CHECKPOINT').symlink_to(folder / 'model_best.pth.tar')
    return place / 'checkpoint'


@pytest.fixture
def pretrained(place):
    """The document's PRETRAINED, a masked autoencoder trained once."""
    if not (place / 'PRETRAINED').exists():
        folder = start('python train.py --recipe cifar10_tiny_mae --data-dir DATA', 'pretrained')
        (place / 'PRETRAINED').symlink_to(folder / 'last.pth.tar')


def words_of(line):
    words = shlex.split(line)
    return words[next(i for i, word in enumerate(words) if word.endswith(('.py', 'vim_timm.original'))) + 1 :]


def start(line, name, arguments=None):
    """Run a line of train.py for an epoch (one more, if it resumes) with two blocks and small batches."""
    arguments = words_of(line) if arguments is None else arguments
    args = train.parse_args(arguments)
    small = ['--epochs', '2' if args.resume else '1', '--warmup-epochs', '0', '--device', 'cpu', '--workers', '0']
    small += ['--batch-size', '718' if args.dataset == 'digits' else '4', '--log-interval', '1', '--aug-repeats', '0']
    kwargs = [f'{key}={value}' for key, value in {**args.model_kwargs, 'depth': 2}.items()]
    small += ['--model-kwargs', *kwargs, '--output', '.', '--experiment', name]
    small += ['--decoder-depth', '2'] if '--decoder-depth' in arguments else []
    if 'IMAGENET' in line:
        small += ['--num-classes', '2']
    assert train.main([*arguments, *small]) == 0
    return Path(name)


def test_every_row_has_its_counterpart():
    assert len(TABLE_ROWS) > 150
    assert all(len(row) in (2, 3) and (row[1] or len(row) == 3) for row in TABLE_ROWS)


@pytest.mark.parametrize('line', TRAINING)
def test_training_runs(line, request):
    for name in ('CHECKPOINT', 'PRETRAINED'):
        if name in line:
            request.getfixturevalue(name.lower())
    folder = start(line, f'train{TRAINING.index(line)}')
    assert (folder / 'last.pth.tar').exists() and (folder / 'summary.json').exists()
    assert ('--tensorboard' in line) == (folder / 'tensorboard').exists()


@pytest.mark.parametrize('line', ORIGINAL)
def test_lines_of_the_original_are_understood(line):
    words = words_of(line)
    world_size = 8 if line.startswith('torchrun') else 1
    translated = original.translate(original.build_parser().parse_args(words), set(words), world_size)
    if translated.script == 'train':
        args = train.parse_args(translated.arguments)
        for flag in ('--batch-size', '--epochs'):
            if flag in words:
                assert getattr(args, flag[2:].replace('-', '_')) == int(words[words.index(flag) + 1])


@pytest.mark.parametrize('line', [line for line in ORIGINAL if '--eval' not in line and 'torchrun' not in line])
def test_training_of_the_original_runs(line):
    words = words_of(line)
    arguments = original.translate(original.build_parser().parse_args(words), set(words)).arguments
    folder = start(line, f'original{ORIGINAL.index(line)}', [*arguments, '--img-size', '64'])
    assert (folder / 'last.pth.tar').exists()


@pytest.mark.parametrize('line', [line for line in ORIGINAL + VALIDATION if 'ORIGINAL.pth' in line])
def test_evaluation_of_the_original_runs(line, place):
    words = words_of(line)
    arguments = words
    if 'original' in line.split('--')[0]:
        arguments = original.translate(original.build_parser().parse_args(words), set(words)).arguments
    name = re.search(r'vim_tiny_patch16_\d+', line).group()
    model = timm.create_model(name, depth=2, num_classes=2)
    torch.save({'model': model.state_dict()}, 'ORIGINAL.pth')
    small = '--device cpu --workers 0 --num-classes 2 --model-kwargs depth=2 --batch-size 4'.split()
    assert validate.main([*arguments, *small]) == 0


@pytest.mark.parametrize('line', [line for line in VALIDATION if 'CHECKPOINT' in line])
def test_evaluation_runs(line, checkpoint):
    words = words_of(line)
    assert validate.main([*words, '--device', 'cpu', '--workers', '0']) == 0
    files = {path.name for path in Path(words[words.index('--report') + 1]).iterdir()}
    assert {'report.html', 'report.json', 'per_class.csv', 'predictions.csv'} <= files
    assert {'confusion_matrix.png', 'confusion_matrix_normalized.png'} <= files


@pytest.mark.parametrize('line', [line for line in VALIDATION if 'PRETRAINED' in line])
def test_evaluation_of_reconstructions_runs(line, pretrained):
    words = words_of(line)
    assert validate.main([*words, '--device', 'cpu', '--workers', '0']) == 0
    if '--report' in words:
        files = {path.name for path in Path(words[words.index('--report') + 1]).iterdir()}
        assert {'report.html', 'report.json', 'reconstruction.csv', 'gallery_75.png'} <= files


def test_files_of_a_run_and_its_curves(checkpoint):
    names = {'summary.json', 'summary.csv', 'model_best.pth.tar', 'last.pth.tar', 'checkpoint-0.pth.tar'}
    assert names <= {path.name for path in checkpoint.iterdir()}
    assert curves.main([str(checkpoint)]) == 0
    assert (checkpoint / 'curves.png').exists() and (checkpoint / 'curves.html').exists()


@pytest.mark.parametrize('call', MODELS)
def test_models_can_be_built(call):
    names = {'timm': timm}
    if 'pretrained=True' in call:  # without the download
        name = re.search(r"'(\w+)'", call).group(1)
        assert timm.is_model_pretrained(name)
        call = call.replace('pretrained=True', 'pretrained=False')
    model = eval(call[:-1] + ", device='meta')", names)
    if 'depth=24' in call:
        assert sum(parameter.numel() for parameter in model.parameters()) == 7_148_008


def test_flags_of_the_original_have_these_counterparts():
    rows = [row for row in TABLE_ROWS if len(row) == 3 and row[0].startswith('`--')]
    assert len(rows) > 30
    for there, here, _ in rows:
        flag = original.FLAGS[there.strip('`')]
        ours = here.strip('`')
        assert not ours or ours.lstrip('-').replace('-', '_') in FLAGS
        assert not flag.train or flag.train == ours


@pytest.mark.parametrize('span', [span for span in SPANS if re.search(r'(^| )--\w', span)])
def test_flags_exist(span):
    known = {name.lstrip('-').replace('-', '_') for name in original.FLAGS} | FLAGS
    words = [word for word in span.split() if word.startswith('--')]
    if span.split()[0] in ('torchrun', 'pip', 'tensorboard'):
        words = words[1:]
    allowed = known | {'dataset_download', 'dry_run'}
    assert {word[2:].split('=')[0].replace('-', '_') for word in words} <= allowed


@pytest.mark.parametrize('span', [span for span in SPANS if re.match(r'vim_timm[./]\w', span)])
def test_names_and_files_exist(span):
    name = span.split('(')[0]
    if '/' in name:
        assert (ROOT / name).exists()
        return
    module, _, attribute = name.rpartition('.')
    if (ROOT / f'{name.replace(".", "/")}.py').exists():
        return
    assert hasattr(importlib.import_module(module), attribute)


def test_remaining_commands(capsys):
    doctor.main([])
    assert 'torch' in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train.main(['--list-recipes'])
    assert end.value.code == 0
