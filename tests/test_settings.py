"""Settings are read-only, and checked alike wherever they come from."""

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vim_timm import train, validate
from vim_timm.errors import UserError
from vim_timm.settings import Settings, flags
from vim_timm.settings.parse import parse

KINDS = (int, float, flags.batch_size, [int], [float], dict)
NUMBERS = [row for rows in flags.TRAIN.values() for row in rows if row[1] in KINDS]


def from_command_line(row, value, tmp_path):
    values = [str(item) for item in (value if isinstance(value, list) else [value])]
    words = [f'{key}={item}' for key, item in value.items()] if isinstance(value, dict) else values
    name = row[0].split()[0]
    return parse('train.py', flags.TRAIN, [f'{name}={words[0]}'] if len(words) == 1 else [name, *words])


def from_yaml(row, value, tmp_path):
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump({row[0].split()[0].lstrip('-'): value}))
    return parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])


def from_checkpoint(row, value, tmp_path):
    name = row[0].split()[0].lstrip('-').replace('-', '_')
    return parse('train.py', flags.TRAIN, ['x'], layer=('checkpoint x', {name: value}))


SOURCES = [from_command_line, from_yaml, from_checkpoint]


@pytest.mark.parametrize('row', NUMBERS, ids=lambda row: row[0].split()[0])
def test_numbers_are_finite(row, tmp_path):
    for source in SOURCES:
        for wrong in (math.nan, math.inf, -math.inf):
            value = {'a': [wrong]} if row[1] is dict else [wrong, wrong] if isinstance(row[1], list) else wrong
            if row[1] is dict and source is from_command_line:
                continue  # literals have no such numbers
            with pytest.raises(UserError, match=row[0].split()[0]):
                source(row, value, tmp_path)


@pytest.mark.parametrize('row', [row for row in NUMBERS if len(row) > 4], ids=lambda row: row[0].split()[0])
def test_a_range_holds_for_every_source(row, tmp_path):
    names, kind, _, _, limits = row
    number = kind[0] if isinstance(kind, list) else kind
    outside = limits.low / 2 if limits.or_zero else limits.low if limits.above else limits.low - 1
    wrong = [outside] + ([limits.high + 1] if math.isfinite(limits.high) else [])
    for value in map(number, wrong):
        value = [value, value] if isinstance(kind, list) else value
        sentences = []
        for source in SOURCES:
            with pytest.raises(UserError) as caught:
                source(row, value, tmp_path)
            sentences.append(str(caught.value).split(': ')[-1])
        assert len(set(sentences)) == 1 and sentences[0].startswith(names.split()[0])


@pytest.mark.parametrize(
    'text, taken',
    [
        ('epoch-repeats: 0', True), ('epoch-repeats: 0.5', False), ('epoch-repeats: 1.5', True),
        ('aug-repeats: 0', True), ('aug-repeats: 0.5', False), ('aug-splits: 0', True), ('aug-splits: 1', False),
        ('lr-noise: 0.5', True), ('lr-noise: [0.2, 0.5]', True), ('lr-noise: [0.5, 0.2]', False),
        ('lr-noise: [0.2, 0.5, 0.7]', False), ('lr-noise-pct: 0', False), ('lr-cycle-limit: 0', False),
        ('decay-milestones: [1, 5, 9]', True), ('decay-milestones: [5, 1]', False), ('cutmix-minmax: [0.5, 2]', False),
        ('cutmix-minmax: [0, 1]', True), ('cutmix-minmax: [0.5]', False),
        ('scale: [0.5]', False), ('scale: [1, 0.5]', False), ('input-span: [-5, -1]', True),
        ('input-span: [-1, -5]', False), ('mean: 120', False), ('std: [0.5, 58]', False), ('mean: [0, 0.5]', True),
    ],
)  # fmt: skip
def test_no_number_means_something_else_than_it_says(text, taken, tmp_path):
    (tmp_path / 'c.yaml').write_text(text)
    if taken:
        parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])
        return
    with pytest.raises(UserError, match=f'--{text.partition(":")[0]} (must|takes)'):
        parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])


@pytest.mark.parametrize(
    'text',
    [
        'epochs: 2.5', 'epochs: true', 'epochs: .inf', 'epochs: [1]', 'epochs: null', 'amp: maybe', 'amp: 1',
        'model: [a]', 'model: true', 'scale: 1', 'scale: [1, a]', 'opt-betas: []', 'model-kwargs: 3',
        'model-kwargs: {1: 2}', 'drop-path: {a: 1}', 'clip-mode: 3', f'seed: {2**32}', f'batch-size: {10**20}',
        f'epochs: {"[" * 3000}', 'lr: &a [*a]', '1: 2', 'data: x', 'config: x',
    ],
)  # fmt: skip
def test_yaml_that_no_flag_would_take(text, tmp_path):
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(UserError, match='c.yaml') as caught:
        parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize('text', ['lr: 1e-3\nepochs: 2\nlr: 1e-2', 'batch_size: 8\nbatch-size: 16'])
def test_a_setting_that_a_file_has_twice(text, tmp_path):
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(UserError, match='c.yaml: (lr|batch_size) is set 2 times'):
        parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])


def test_yaml_that_is_spelled_otherwise(tmp_path):
    (tmp_path / 'c.yaml').write_text(
        'lr: 1e-3\nepochs: 3.0\nexperiment: 2024\nopt-betas: 0.5\nmodel-kwargs: &a {b: [*a]}\ndrop-path: null\n'
    )
    args = parse('train.py', flags.TRAIN, ['-c', str(tmp_path / 'c.yaml')])
    assert (args.lr, args.epochs, args.experiment, args.opt_betas, args.drop_path) == (1e-3, 3, '2024', [0.5], None)


@pytest.mark.parametrize('word', ['true', 'True', 'no', 'OFF', 'false', 'Yes', '0.5', '[1, 2]', 'none', 'both'])
def test_a_key_has_the_value_of_a_config_file(word, tmp_path):
    (tmp_path / 'c.yaml').write_text(f'model-kwargs: {{key: {word}}}')
    sources = ['-c', str(tmp_path / 'c.yaml')], ['--model-kwargs', f'key={word}']
    first, second = (parse('train.py', flags.TRAIN, words).model_kwargs['key'] for words in sources)
    assert first == second and type(first) is type(second)


@given(st.dictionaries(st.sampled_from([row[0].split()[0] for rows in flags.TRAIN.values() for row in rows]),
                       st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
                                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)),
                       max_size=3))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_layer_is_taken_or_refused_in_a_sentence(tmp_path_factory, layer):
    path = tmp_path_factory.mktemp('yaml') / 'c.yaml'
    path.write_text(yaml.safe_dump(layer))
    try:
        parse('train.py', flags.TRAIN, ['-c', str(path)])
    except UserError as error:
        assert 'c.yaml' in str(error)


def test_settings_are_read_only():
    args = train.parse_args(['--lr', '0.5'])
    with pytest.raises(AttributeError, match='read-only'):
        args.lr = 1.0
    with pytest.raises(AttributeError, match='read-only'):
        del args.lr
    other = args.replace(lr=1.0)
    assert (args.lr, other.lr, other.chosen) == (0.5, 1.0, args.chosen) and isinstance(other, Settings)
    assert 'chosen' not in vars(other)


def test_a_run_leaves_its_settings_alone(tmp_path):
    flags = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --epochs 1 --device cpu --workers 0'
    args = train.parse_args([*flags.split(), '--batch-size', '512', '--output', str(tmp_path)])
    before = repr(args)
    trainer = train.train(args)
    assert repr(args) == before and args.num_classes is None and trainer.args.num_classes == 10


def test_a_checkpoint_with_impossible_settings_is_refused(tmp_path, capsys):
    for name, value in (('img_size', -3), ('num_classes', 'many'), ('mean', [math.nan]), ('amp', 'yes')):
        torch.save({'state_dict': {}, 'args': {'model': 'test_vit', name: value}}, tmp_path / 'c.pth.tar')
        assert validate.main(['--checkpoint', str(tmp_path / 'c.pth.tar'), '--dataset', 'digits']) == 2
        message = capsys.readouterr().err
        assert f'checkpoint {tmp_path / "c.pth.tar"}: its setting {name} cannot be ' in message


@pytest.mark.parametrize('seed', [0, 2**32 - 1])
def test_any_seed_of_32_bits(seed, tmp_path):
    flags = '--dataset digits --model test_vit --img-size 16 --in-chans 1 --epochs 1 --device cpu --workers 0'
    flags += f' --batch-size 512 --seed {seed} --reprob 0.5 --mixup 0.1'
    assert train.main([*flags.split(), '--output', str(tmp_path), '--experiment', 'a']) == 0
