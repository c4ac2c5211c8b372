"""A checkpoint says which model it holds, nothing else, and is read without trust: docs/security.md."""

import collections
import datetime
import decimal
import enum
import json
import os
import pathlib
import re
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from vim_timm import train, validate
from vim_timm.engine import build, saved
from vim_timm.errors import UserError
from vim_timm.hub import convert
from vim_timm.models.checkpoint import read_checkpoint, select_weights
from vim_timm.settings.flags import VALIDATE
from vim_timm.settings.inherited import INHERITED, LOCAL_DATA, data_of, settings_of

ROOT = pathlib.Path(__file__).parents[1]
SIZES = dict(num_classes=10)
COMMON = '--dataset digits --workers 0 --device cpu --model vim_nano_patch4_32 --num-classes 10'.split()


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(0)
    return timm.create_model('vim_nano_patch4_32', **SIZES).state_dict()


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert '\n' not in text and len(text) < 500
    return text


def routes(path):
    """Every way from a file to a model."""
    path = str(path)
    overlay = dict(file=path, num_classes=10)
    yield (
        'timm',
        lambda: timm.create_model('vim_nano_patch4_32', pretrained=True, pretrained_cfg_overlay=overlay, **SIZES),
    )
    for flags in (['--pretrained', '--pretrained-path', path], ['--initial-checkpoint', path]):
        args = train.parse_args([*COMMON, *flags])
        yield flags[-2], lambda args=args: train.build.make_training_model(args, train.start_process(args))

    def evaluated():
        args, content = validate.read_args([*COMMON, '--checkpoint', path])
        return validate._ready_model(args, validate.start_process(args), None, content)[0]

    yield '--checkpoint', evaluated
    yield 'convert', lambda: convert.convert(path, f'{path}.safetensors', 'vim_nano_patch4_32')


HARMLESS = {
    'a float of NumPy': np.float64(81.2), 'a number of NumPy': np.int64(3), 'a truth of NumPy': np.bool_(True),
    'an array': np.arange(3.0), 'texts': np.array(['a', 'b']), 'a dtype': np.dtype('float32'),
    'a path': pathlib.Path('out'), 'a Windows path': pathlib.PureWindowsPath('out'),
    'a version': torch.__version__, 'a defaultdict': collections.defaultdict(int, a=1),
    'a dict of lists': collections.defaultdict(list, a=[1]), 'a deque': collections.deque([1]),
    'a counter': collections.Counter('aab'), 'a time': datetime.datetime.now(),
    'a span': datetime.timedelta(1), 'a decimal': decimal.Decimal('0.1'), 'a set': frozenset({1}),
    'a namespace': types.SimpleNamespace(a=1), 'bytes': b'a', 'a device': torch.device('cpu'),
}  # fmt: skip


@pytest.mark.parametrize('extra', HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize('legacy', [False, True])
def test_values_that_are_nothing_but_data_may_stand_beside_weights(extra, legacy, weights, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'model': weights, 'best': extra}, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(select_weights(read_checkpoint(path))['norm.weight'], weights['norm.weight'])


class Colour(enum.Enum):
    RED = 1


class Runs:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


CODE = {
    'a folder': (os.mkdir, 'executed'),
    'a shell': (os.system, 'touch executed'),
    'an evaluation': (eval, '1'),
    'an import': (__import__, 'antigravity'),
    'a file': (open, 'executed', 'w'),
    'an enumeration': (Colour, 1),
    'an attribute': (getattr, 1, 'real'),
    'much memory': (range, 10**12),
}


@pytest.mark.parametrize('call', CODE.values(), ids=CODE)
def test_a_pickle_that_would_run_code_is_refused_by_every_route(call, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': weights, 'best': Runs(*call)}, 'evil.pth')
    for name, load in routes(tmp_path / 'evil.pth'):
        assert 'would run code' in refusal(load), name
    assert not os.path.exists('executed')


def test_every_route_chooses_alike_between_trained_weights_and_their_average(weights, tmp_path):
    """timm starts a training from the average of its own checkpoints, and so do we."""
    average = {name: value + 1 for name, value in weights.items()}
    for number, (one, other) in enumerate([('model', 'model_ema'), ('state_dict', 'state_dict_ema')]):
        path = tmp_path / f'{number}.pth'
        torch.save({other: average, one: weights}, path)
        for name, load in routes(path):
            starts = other == 'state_dict_ema' and name not in ('--checkpoint', 'convert')
            assert torch.equal(load().norm.weight, (average if starts else weights)['norm.weight']), (one, name)


def odd_weights(weights):
    name = 'blocks.0.mixer.out_proj.weight'
    value = weights[name]
    yield 'int', {name: value.long()}
    yield 'bool', {name: value > 0}
    yield 'complex', {name: value.cfloat()}
    yield 'not finite', {name: value.clone().fill_(float('nan'))}
    yield 'not finite', {name: torch.where(value == value.max(), float('inf'), value)}
    yield 'sparse', {name: value.to_sparse()}
    yield 'repeats', {name: torch.zeros(1).expand(10**9, 10**5)}
    yield 'not a tensor', {name: [1.0]}
    yield 'no state dict', {1: value}
    yield 'it brings', {'\x1b[31mred\n': value}
    yield 'another size', {name: value[:, :1].clone()}


def test_what_is_no_weight_is_named_by_every_route(weights, tmp_path):
    for number, (word, change) in enumerate(odd_weights(weights)):
        path = tmp_path / f'{number}.pth'
        torch.save({'state_dict': {**weights, **change}}, path)
        for name, load in routes(path):
            text = refusal(load)
            assert word in text and '\x1b' not in text, (name, text)


def test_a_flipped_bit_is_found_where_the_format_has_a_checksum(weights, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'model': weights}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = [entry.header_offset + 200 for entry in archive.infolist() if entry.file_size > 1000]
    for place in places[:: len(places) // 8]:
        content[place] ^= 1
        path.write_bytes(content)
        for name, load in routes(path):
            assert 'checksum' in refusal(load), name
        content[place] ^= 1
    path.write_bytes(content)
    read_checkpoint(path)


def test_an_entry_that_says_it_is_a_folder_is_refused(weights, tmp_path):
    """torch reads nothing of it, and takes what memory holds for its numbers."""
    path = tmp_path / 'a.pth'
    torch.save({'model': weights}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        name = max(archive.infolist(), key=lambda entry: entry.file_size).filename
    header = content.rindex(f'{name}PK'.encode()) - 46  # in the directory at the end of the file, another follows
    content[header + 38] |= 0x10
    path.write_bytes(content)
    for route, load in routes(path):
        assert f'{name} is a folder' in refusal(load), route


def test_a_file_saved_without_checksums_loads(weights, tmp_path):
    set_crc32_options = pytest.importorskip('torch.serialization').set_crc32_options
    set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / 'a.pth')
    finally:
        set_crc32_options(True)
    assert read_checkpoint(tmp_path / 'a.pth').keys() == weights.keys()


def test_a_compressed_bomb_is_refused(weights, tmp_path):
    torch.save({'model': {**weights, 'zeros': torch.zeros(1 << 24)}}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as plain, zipfile.ZipFile(tmp_path / 'b.pth', 'w') as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert os.path.getsize(tmp_path / 'b.pth') < 1 << 23
    for name, load in routes(tmp_path / 'b.pth'):
        assert 'compressed' in refusal(load), name


def test_a_scripted_model_is_said_to_be_one(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / 'a.pth')
    assert 'scripted' in refusal(read_checkpoint, tmp_path / 'a.pth')


def test_a_file_is_what_its_content_says(weights, tmp_path):
    safetensors.torch.save_file(weights, tmp_path / 'a.pth')
    torch.save(weights, tmp_path / 'b.safetensors')
    for name in ('a.pth', 'b.safetensors'):
        assert torch.equal(read_checkpoint(tmp_path / name)['norm.weight'], weights['norm.weight'])


# What a file may say

MODEL = {
    'model', 'model_kwargs', 'num_classes', 'gp', 'img_size', 'in_chans', 'input_size', 'crop_pct', 'mean', 'std',
    'interpolation', 'crop_mode',
}  # fmt: skip
PRECISION = {'amp', 'amp_dtype', 'model_dtype', 'channels_last', 'fast_norm'}
MASKED = {
    'mae', 'mask_ratio', 'norm_pix_loss', 'mae_loss', 'channel_drop', 'decoder', 'decoder_dim', 'decoder_depth',
    'decoder_heads', 'decoder_pos_embed',
}  # fmt: skip
DATA = {'data_dir', 'class_map', 'dataset', 'val_split', 'val_fraction', 'input_img_mode', 'input_span'}
VALUES = {'input_img_mode', 'input_span'}
ALL = MODEL | PRECISION | MASKED | VALUES


def test_nothing_is_inherited_that_is_not_in_these_lists_and_in_the_document():
    """To add a setting, think about who wrote the file; then write it down here and in docs/security.md."""
    assert set(INHERITED) == ALL
    assert set(LOCAL_DATA) == DATA
    document = (ROOT / 'docs' / 'security.md').read_text()
    rows = [line for line in document.splitlines() if line.startswith('| `')]
    named = {name for row in rows for name in re.findall(r'`(\w+)`', row.split('|')[1])}
    assert named == ALL | DATA


def test_no_other_setting_of_a_checkpoint_reaches_an_evaluation(weights, tmp_path):
    path = tmp_path / 'a.pth'
    names = [row[0].split()[0].lstrip('-').replace('-', '_') for rows in VALIDATE.values() for row in rows]
    hostile = {name: 'hostile' for name in names if name not in ALL | DATA | {'split'}}
    model_kwargs = dict(depth=12, embed_dim=96)
    torch.save({'state_dict': weights, 'args': {**hostile, 'model': 'vim_nano_patch4_32', 'num_classes': 10,
                                                'model_kwargs': model_kwargs}}, path)  # fmt: skip
    args = validate.parse_args(['--checkpoint', str(path)])
    assert args.model == 'vim_nano_patch4_32' and args.model_kwargs == model_kwargs
    assert 'hostile' not in map(str, vars(args).values())


WRONG = {
    'model': ['hf-hub:evil/model', 'local-dir:/tmp', 'a/b', '', 3, ['a'], None.__class__],
    'model_kwargs': [
        {'checkpoint_path': 'x'}, {'pretrained_cfg_overlay': {'file': 'x'}}, {'pretrained_cfg': 'x'},
        {'cache_dir': 'x'}, {'pretrained': True}, {'norm_layer': '/etc/passwd'}, {'a': 'https://x'},
        {'embed_dim': 1 << 40}, {1: 2}, {'a': float('nan')}, {'a': object}, [1], {'a b': 1},
    ],
    'num_classes': [0, -1, 2.5, '10', True, 1 << 40],
    'gp': [3, 'a/b'],
    'img_size': [0, -32, 1 << 20, '32', [32], [32, 32, 32], 32.0, True],
    'in_chans': [0, 1 << 20, 'RGB'],
    'input_size': [32, [3, 32], [3, 0, 32], [3, 32, 1 << 20], [1 << 20, 32, 32], 'abc'],
    'crop_pct': [0, 1.5, 'y', float('nan'), float('inf'), True],
    'mean': ['a', [], [float('nan')], 0.5, [[0.5]]],
    'std': [[0], [-1], [float('inf')], 'a'],
    'interpolation': [3, 'a/b'], 'crop_mode': ['a', 3],
    'amp': ['yes', 1], 'amp_dtype': ['Tensor', 16], 'model_dtype': ['Tensor', 'int8'],
    'channels_last': ['x'], 'fast_norm': ['x'], 'mae': [1], 'mask_ratio': [2, '0.5'], 'decoder_depth': [10**9, 0],
    'decoder': ['a/b'], 'input_img_mode': ['Tensor', ''], 'input_span': [[0], 'ab', [0, float('nan')]],
}  # fmt: skip


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_of_another_type_or_range_is_refused_where_the_file_is_read(name, value):
    text = refusal(settings_of, {'state_dict': {}, 'args': {name: value}})
    assert f'its setting {name} cannot be' in text


@pytest.mark.parametrize('name', ['input_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'interpolation'])
def test_the_data_configuration_is_checked_as_settings_are_and_comes_first(name):
    for value in WRONG[name]:
        text = refusal(settings_of, {'state_dict': {}, 'args': {}, 'data_config': {name: value}})
        assert f'its setting {name} cannot be' in text
    good = dict(input_size=[3, 32, 32], crop_pct=0.9, crop_mode='squash', mean=[0.1], std=[0.2], interpolation='box')
    content = {'state_dict': {}, 'args': {'mean': [0.5], 'model': 'vim'}, 'data_config': {**good, 'file': '/tmp/x'}}
    assert settings_of(content) == {**good, 'model': 'vim'}
    assert settings_of({**content, 'data_config': [1]}) == {'model': 'vim', 'mean': [0.5]}


def test_values_of_ordinary_runs_pass():
    args = dict(model='vim_tiny_patch16_224.hustvl_in1k', model_kwargs=dict(scan='shared', stride=(8, 8), halve=True),
                num_classes=10, gp='avg', img_size=224, input_size=[3, 224, 224], crop_pct=1, mean=[0.5] * 3,
                std=(0.5,), interpolation='', amp=True, amp_dtype='bfloat16', in_chans=np.int64(3))  # fmt: skip
    assert settings_of({'state_dict': {}, 'args': args}) == {**args, 'in_chans': 3}
    assert settings_of({'model': {}, 'args': types.SimpleNamespace(model='vim', input_size=224, lr=1)}) == {
        'model': 'vim', 'img_size': 224
    }  # fmt: skip
    assert settings_of({'a': torch.zeros(1)}) == {}


@pytest.mark.parametrize('change', [
    dict(dataset='wds/x', data_dir='pipe:touch executed'), dict(dataset='hfds/a/b'), dict(data_dir='nowhere'),
    dict(dataset='tfds/x'), dict(data_dir='//server/share'), dict(data_dir='file:.'), dict(data_dir=['.']),
    dict(dataset='digits', val_split='../x'), dict(data_dir='.', class_map='nowhere.txt'), dict(dataset='torch/../x'),
    dict(data_dir='.', input_img_mode='Tensor'),
], ids=str)  # fmt: skip
def test_data_that_a_file_must_not_choose_are_refused(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert '--data-dir' in refusal(data_of, {'args': change})


def test_local_data_of_a_run_are_taken(tmp_path):
    args = dict(data_dir=str(tmp_path), dataset='', val_split='val', input_img_mode='L', class_map='')
    assert data_of({'args': args}) == dict(data_dir=str(tmp_path), split='val', input_img_mode='L')
    assert data_of({'args': dict(dataset='digits')}) == dict(dataset='digits')
    assert data_of({}) == data_of({'args': {}}) == {}


@pytest.mark.parametrize('model_kwargs', [
    dict(depth=1_000_000), dict(embed_dim=100_000), dict(d_state=1_000_000), dict(expand=100_000),
], ids=str)  # fmt: skip
def test_a_model_far_larger_than_its_file_is_not_built(model_kwargs, weights, tmp_path):
    path = tmp_path / 'a.pth'
    args = dict(model='vim_nano_patch4_32', model_kwargs=model_kwargs, num_classes=10)
    torch.save({'state_dict': weights, 'args': args}, path)
    assert 'larger model' in refusal(validate.parse_args, ['--checkpoint', str(path)])


def test_a_checkpoint_is_read_once(weights, tmp_path, monkeypatch, capsys):
    path, read = tmp_path / 'a.pth', []
    args = dict(model='vim_nano_patch4_32', num_classes=10)
    torch.save({'state_dict': weights, 'args': args}, path)
    load = torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: read.append(args) or load(*args, **kwargs))
    assert validate.main(['--checkpoint', str(path), '--workers', '0', '--device', 'cpu']) == 0
    assert len(read) == 1
    assert json.loads(capsys.readouterr().out.split('--result')[1])['count'] > 0


@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    """A function that writes a published model's folder with changes of its config.json, and gives its name."""

    def write(**changes) -> str:
        folder = tmp_path_factory.mktemp('hub')
        model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, num_classes=10)
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        config = json.loads((folder / 'config.json').read_text())
        for name, value in changes.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        (folder / 'config.json').write_text(json.dumps(config))
        return f'local-dir:{folder}'

    return write


HOSTILE = [
    (dict(model_args=dict(depth=200_000)), 'larger model'),
    (dict(model_args=dict(embed_dim=100_000)), 'larger model'),
    (dict(model_args=dict(num_classes=1_000_000)), 'larger model'),
    (dict(model_args=dict(checkpoint_path='/tmp/x')), 'model_kwargs cannot be'),
    (dict(model_args=dict(depth=1 << 40)), 'model_kwargs cannot be'),
    (dict(pretrained_cfg=dict(mean='a')), 'mean cannot be'),
    (dict(pretrained_cfg=dict(crop_pct=1e9)), 'crop_pct cannot be'),
    (dict(architecture='hf-hub:evil/model'), 'model cannot be'),
]


@pytest.mark.parametrize(('changes', 'words'), HOSTILE, ids=str)
def test_the_configuration_of_a_published_model_is_checked_before_it_is_built(changes, words, hub_folder, monkeypatch):
    name = hub_folder(**changes)
    folder, flags = name.partition(':')[2], ['--model', name, '--pretrained', '--workers', '0', '--device', 'cpu']
    for module, make in ((saved, 'create_model'), (build, 'model_of')):  # minutes, and more memory than there is
        monkeypatch.setattr(module, make, lambda *_, **__: pytest.fail('it was built'))
    for load in (
        lambda: saved.open_published(name),
        lambda: saved.open_saved(folder),
        lambda: build.make_model(validate.parse_args(flags)),
    ):
        text = refusal(load)
        assert words in text and 'config.json' in text


def test_the_configuration_of_an_ordinary_model_passes(hub_folder):
    assert saved.open_published(hub_folder()).model.num_classes == 10


@pytest.mark.parametrize('name', ['resnet18', 'test_vit', 'mae_vim_tiny_patch4_32'])
def test_timm_models_and_autoencoders_open_from_a_folder(name, tmp_path):
    kwargs = {} if name.startswith('mae') else dict(num_classes=0)
    timm.models.save_for_hf(timm.create_model(name, **kwargs), str(tmp_path), safe_serialization=True)
    assert saved.open_published(f'local-dir:{tmp_path}').architecture == name
