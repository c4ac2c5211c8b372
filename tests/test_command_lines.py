"""A command line is read before torch is imported; what is misspelled is named with what was probably meant."""

import argparse
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm.data.auto_augment
import timm.data.dataset_factory
import timm.scheduler.scheduler_factory
import torch
from processes import Python, finish
from timm.utils import ParseKwargs

import vim_timm
from vim_timm import commands, lazy, train
from vim_timm.commands import COMMANDS
from vim_timm.errors import UserError
from vim_timm.settings import flags, programs
from vim_timm.settings.parser import KeyValues

ROOT = Path(__file__).parents[1]
QUICK = 0.3  # seconds of a quiet core
MODULES = {name: command.module.removesuffix('.__main__') for name, command in COMMANDS.items()}
MISTAKES = {
    'train': ['--epcohs', '3'],
    'validate': ['--checkpiont', 'x'],
    'predict': ['x.jpg', '--modle', 'x'],
    'export': ['--output', 'x.onnx', '--modle', 'x'],
    'data': ['--pgae', 'x'],
    'compare': ['a', 'b', '--outptu', 'x'],
    'doctor': ['--weight'],
    'convert': ['a.pth', 'b.safetensors', '--moodel', 'x'],
    'publish': ['x', '--dryrun'],
}


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def heavy(log):
    """Packages in the output of -X importtime that take long."""
    return {name for name in ('torch', 'timm', 'numpy', 'matplotlib') if re.search(rf'\| +{name}$', log, re.M)}


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.parametrize('flag', ['--help', 'mistake'])
def test_answers_without_torch(name, flag, tmp_path):
    words = MISTAKES[name] if flag == 'mistake' else [flag]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ['-X', 'importtime', '-m', MODULES[name], *words]
    result = run(*command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = [line for line in result.stderr.splitlines() if not line.startswith('import time:')]
    if flag == '--help':
        assert result.returncode == 0 and result.stdout.startswith('usage:') and not said
    else:
        assert result.returncode == 2 and not result.stdout and len(said) == 1
        assert 'did you mean --' in said[0]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < QUICK
    assert not heavy(result.stderr)


@pytest.mark.parametrize(
    'words',
    [
        'train --list-recipes',
        'train --sched cosin',
        'train --aa rnad-m9',
        'train --dataset cifar10',
        'train --dataset torch/cifar1 --data-dir .',
        'train --recipe cifar10',
        'train --epochs 0',
        'train /nowhere',
        'train --mixup 0.8 --batch-size 3',
        'validate',
        'validate --pretrained --data-dir /nowhere',
        'predict x.jpg --model y --top 0',
        'export --output x.onyx --model y',
        'data /nowhere',
        'publish x',
        'compare x',
        'compare x y --output nowhere/x.html',
    ],
)
def test_values_are_refused_without_torch(words, tmp_path, capsys):
    name, *rest = words.split()
    with pytest.raises((UserError, SystemExit)):
        COMMANDS[name].read(rest)
    log = run('-X', 'importtime', '-m', MODULES[name], *rest, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert not heavy(log.stderr)


@pytest.mark.parametrize('script', ['train.py', 'validate.py'])
def test_scripts_answer_without_torch_and_can_be_imported(script):
    if not (ROOT / script).exists():
        pytest.skip('no checkout')
    result = run('-X', 'importtime', script, '--help', cwd=ROOT)
    assert result.returncode == 0 and not heavy(result.stderr)
    # what a process does that is spawned for data loading
    assert run('-c', f'import runpy; runpy.run_path({script!r}, run_name="__mp_main__")', cwd=ROOT).returncode == 0


def test_a_program_runs_by_its_command(tmp_path):
    flags = '--dataset digits --model test_vit --img-size 32 --in-chans 1 --workers 0 --epochs 1 --device cpu'.split()
    result = run('-m', 'vim_timm.train', *flags, '--output', tmp_path, '--batch-size', '359', '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'a' / 'last.pth.tar').exists()


ORDERS = [
    'import vim_timm, timm',
    'import timm, vim_timm',
    'import vim_timm; import timm.layers',
    'import vim_timm.layers.bimamba',
    'import vim_timm.layers.attention',
    'import vim_timm.models.trunk',
    'import vim_timm.ops',
    'from vim_timm import data; data.class_names',
    'from vim_timm import hub; hub.from_original',
    'import importlib.util; importlib.util.find_spec("timm"); import vim_timm; importlib.util.find_spec("timm")',
]


@pytest.mark.parametrize('order', ORDERS)
def test_models_are_registered_in_any_order(order, tmp_path):
    code = f"""
import sys, warnings
assert not {{'timm', 'vim_timm'}} & sys.modules.keys()
warnings.simplefilter('error')
{order}
import timm, vim_timm
model = timm.create_model('vim_nano_patch4_32', device='meta')
assert isinstance(model, vim_timm.VisionMamba), type(model)
assert not [finder for finder in sys.meta_path if type(finder).__name__ == 'After']
"""
    finish([Python(code, output=tmp_path / 'output.txt')])


def test_importing_the_package_imports_nothing_else():
    assert not heavy(run('-X', 'importtime', '-c', 'import vim_timm').stderr)


def test_a_pickled_model_comes_with_its_module(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('vim_nano_patch4_32', depth=1).eval()
    (tmp_path / 'model').write_bytes(pickle.dumps(model))
    code = 'import pickle, sys; model = pickle.load(open(sys.argv[1], "rb")); print(type(model).__module__)'
    process = Python(code, str(tmp_path / 'model'), output=tmp_path / 'output.txt')
    assert finish([process]).split() == ['vim_timm.models.vision_mamba']


def test_names_of_the_package():
    assert {*vim_timm.__all__, 'hub', 'models', 'ops', 'layers'} <= set(dir(vim_timm))
    for module in (vim_timm, vim_timm.hub, importlib.import_module('vim_timm.data'), vim_timm.layers, vim_timm.ops):
        assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match='no attribute'):
        _ = vim_timm.nothing


def test_an_import_that_fails_can_be_tried_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'late_one.py').write_text('raise ImportError("not yet")')
    (tmp_path / 'late_two.py').write_text('')
    finder = lazy.After('late_one', 'late_two')
    with pytest.raises(ImportError, match='not yet'):
        importlib.import_module('late_one')
    assert finder in sys.meta_path and 'late_two' not in sys.modules
    (tmp_path / 'late_one.py').write_text('value = "another length"')
    importlib.invalidate_caches()
    assert importlib.import_module('late_one').value and 'late_two' in sys.modules and finder not in sys.meta_path


@pytest.mark.parametrize(
    ('words', 'proposed'),
    [
        ('--epcohs 3', '--epochs'),
        ('--batch_size 8', '--batch-size'),
        ('-epochs 3', '--epochs'),
        ('--amp-dtype bfloat', 'bfloat16'),
        ('--sched cosin', 'cosine'),
        ('--aa rnad-m9', 'rand'),
        ('--aa augmx', 'augmix'),
        ('--recipe cifar10_tny', 'cifar10_tiny'),
        ('--dataset digit', 'digits'),
        ('--dataset cifar10', 'torch/cifar10'),
        ('--dataset torch/cifar11', 'torch/cifar10'),
        ('--dataset digits --opt admw', 'adamw'),
        ('--dataset digits --opt lookahead_adm', 'adam'),
        ('--dataset digits --model vim_nono_patch4_32', 'vim_nano_patch4_32'),
    ],
)
def test_the_nearest_name_is_proposed(words, proposed, capsys):
    assert (commands.main('train', [*words.split(), '--device', 'cpu'])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf'did you mean (\S+ or )*{proposed}( |\?)', line)


def test_a_setting_of_a_file_is_proposed_too(tmp_path, capsys):
    (tmp_path / 'a.yaml').write_text('batchsize: 8')
    assert train.main(['-c', str(tmp_path / 'a.yaml')]) == 2
    assert 'did you mean batch_size' in capsys.readouterr().err


def test_names_known_without_timm_are_timms():
    source = inspect.getsource(timm.scheduler.scheduler_factory)
    used = set(re.findall(r"sched == '(\w+)'", source))
    used |= {name for names in re.findall(r'sched in \(([^)]*)\)', source) for name in re.findall(r"'(\w+)'", names)}
    assert used <= set(flags.SCHEDULES) and set(flags.SCHEDULES) - used == {'none'}
    policies = re.findall(r"name == '(\w+)'", inspect.getsource(timm.data.auto_augment.auto_augment_policy))
    assert {*policies, 'rand', 'augmix'} == set(flags.POLICIES.known)
    sets = re.findall(r"name == '(\w+)'", inspect.getsource(timm.data.auto_augment.rand_augment_choices))
    assert set(sets) == set(flags.POLICIES.sets)
    source = inspect.getsource(timm.data.dataset_factory.create_dataset)
    others = re.findall(r"name == '(\w+)'", source)
    assert {*others, *timm.data.dataset_factory._TORCH_BASIC_DS} == set(flags.TORCH_DATASETS)


@pytest.mark.parametrize('words', ['a=1 b=2.5 c=x d=(1,2) e=a.b', 'a=1e-3 b=None c=True d=x=y e='])
def test_key_value_pairs_are_read_as_by_timm(words):
    found = []
    for action in (KeyValues, ParseKwargs):
        parser = argparse.ArgumentParser()
        parser.add_argument('--kwargs', nargs='*', action=action)
        found.append(parser.parse_args(['--kwargs', *words.split()]).kwargs)
    assert found[0] == found[1]


@pytest.mark.parametrize('name', ['train', 'validate'])
def test_help_is_short_and_help_all_has_every_flag(name, capsys):
    table = {'train': flags.TRAIN, 'validate': flags.VALIDATE}[name]
    texts = []
    for words in (['--help'], ['--help', 'all'], ['-h']):
        with pytest.raises(SystemExit, match='0'):
            COMMANDS[name].read(words)
        texts.append(capsys.readouterr().out)
    short, everything, brief = texts
    rows = [row for rows in table.values() for row in rows]
    assert short == brief and all(re.search(rf'(?m)^  {row[0].split()[0]}\b', everything) for row in rows)
    shown = [row for row in rows if re.search(rf'(?m)^  {row[0].split()[0]}[ ,\n]', short)]
    assert 20 < len(shown) < 60 and not [row for row in shown if row[1] is flags.refused]
    assert '(default: ' in short and 'cpu) (default' not in short and f'{name}.py --help all' in short
    rows = [row for table in (flags.TRAIN, flags.VALIDATE) for part in table.values() for row in part]
    known = {flag for row in rows for flag in row[0].split()}
    assert flags.USUAL <= known | {'--recipe', '--list-recipes', '--config'}


def test_the_console_script_lists_its_commands(capsys, monkeypatch):
    for words in ([], ['--help']):
        with pytest.raises(SystemExit, match='0'):
            commands.console(words)
        text = capsys.readouterr().out
        assert all(re.search(rf'(?m)^ +{name} +\w', text) for name in COMMANDS)
    for start, name in (('/usr/bin/vim-timm', 'vim-timm'), (f'{ROOT}/vim_timm/__main__.py', 'python -m vim_timm')):
        monkeypatch.setattr(sys, 'argv', [start])
        assert commands.console(['tran']) == 2
        error = capsys.readouterr().err
        assert error.startswith(f'{name}: error: there is no command') and 'did you mean train?' in error
    assert commands.console(['--hlep']) == 2
    for name in commands.MODULES:
        assert commands.console([name, '--model', 'x']) == 2
        assert f'it is python -m vim_timm.{name}' in capsys.readouterr().err
        assert importlib.util.find_spec(f'vim_timm.{name}')
    assert all(hasattr(importlib.import_module(command.module), 'main') for command in COMMANDS.values())


@pytest.mark.parametrize('name', ['', *COMMANDS])
def test_the_module_says_the_same(name, tmp_path):
    result = run('-X', 'importtime', '-m', 'vim_timm', *name.split(), '--help', cwd=ROOT)
    assert result.returncode == 0 and not heavy(result.stderr)
    assert result.stdout.startswith(f'usage: python -m vim_timm {name}'.rstrip())


def test_a_line_to_go_on_with_begins_as_the_program_did(monkeypatch, tmp_path):
    for name in ('train.py', 'validate.py'):
        (tmp_path / name).touch()
    monkeypatch.chdir(ROOT / 'docs')
    module = ['python', '-m', 'vim_timm.validate']
    for started, words in (
        ('/usr/bin/vim-timm', ['vim-timm', 'validate']),
        (f'{ROOT}/vim_timm/train.py', module),  # python -m vim_timm.train
        (f'{tmp_path}/train.py', ['python', f'{tmp_path}/validate.py']),
        ('/nowhere/train.py', module),
        ('train.py', module),  # of a folder that is not this one
        ('notebook', ['python', 'validate.py']),
    ):
        monkeypatch.setattr(sys, 'argv', [started])
        assert programs.start('validate.py') == words, started


def test_completion_in_a_shell(tmp_path, capsys):
    pytest.importorskip('shtab')
    assert commands.console(['--print-completion', 'bash']) == 0
    script = capsys.readouterr().out
    function = re.search(r'(?m)^complete .*-F (\w+) vim-timm$', script)[1]
    tries = [('vim-timm tra', 'train'), ('vim-timm train --epoc', '--epochs'), ('vim-timm train --sched cos', 'cosine')]
    for line, expected in tries:
        words = line.split()
        ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function}; echo "${{COMPREPLY[@]}}"'
        answer = subprocess.run(['bash', '-c', f'{script}\n{ask}'], capture_output=True, text=True, check=True)
        assert expected in answer.stdout.split()
    assert commands.console(['--print-completion', 'zsh']) == 0 and '#compdef vim-timm' in capsys.readouterr().out


def test_completion_needs_a_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert commands.console(['--print-completion', 'bash']) == 2
    assert 'pip install shtab' in capsys.readouterr().err
