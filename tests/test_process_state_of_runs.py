"""What a run computes does not depend on the state of its process: torch's defaults, hash seed, locale, folder, ..."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from logs import log_of, settled
from PIL import Image
from process_state import STATES

from vim_timm import predict, train, validate
from vim_timm.engine.saved import open_saved

FLAGS = (
    '--dataset digits --model test_vim --img-size 16 --in-chans 1 --device cpu --workers 0 --batch-size 718 '
    '--opt adamw --lr 1e-3 --epochs 1 --mixup 0.2 --reprob 0.3 --model-ema'
).split()
ROOT = Path(__file__).parents[1]
every_state = pytest.mark.parametrize('state', STATES)


def rows_of(folder, *more):
    arguments = [*FLAGS, '--output', str(folder), '--experiment', 'a', *more]
    return settled(train.train(train.parse_args(arguments)).rows)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run, and its log."""
    folder = tmp_path_factory.mktemp('run')
    return folder / 'a', rows_of(folder)


@pytest.fixture(scope='module')
def run_in_memory(tmp_path_factory):
    """The log of a run with its data in memory."""
    return rows_of(tmp_path_factory.mktemp('memory'), '--data-in-memory')


@every_state
def test_training(state, run, tmp_path):
    with STATES[state]():
        assert rows_of(tmp_path) == run[1]


@every_state
def test_training_in_memory(state, run_in_memory, tmp_path):
    with STATES[state]():
        assert rows_of(tmp_path, '--data-in-memory') == run_in_memory


@every_state
def test_evaluation_and_prediction(state, run, tmp_path):
    path = f'{run[0]}/last.pth.tar'
    Image.new('L', (16, 16), 99).save(tmp_path / 'a.png')

    def results():
        assert validate.main(['--checkpoint', path, '--workers', '0', '--results-file', str(tmp_path / 'row.csv')]) == 0
        (prediction,) = predict.predictor(checkpoint=path, device='cpu')(str(tmp_path / 'a.png'))
        weights = open_saved(path).model.state_dict()
        return (tmp_path / 'row.csv').read_text(), prediction, weights

    row, prediction, weights = results()
    with STATES[state]():
        again = results()
    assert again[:2] == (row, prediction)
    assert all(value.dtype == weights[name].dtype for name, value in again[2].items())


ENVIRONMENT = dict(
    PYTHONHASHSEED='12345', LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LANGUAGE='tr', TZ='Asia/Kathmandu',
    COLUMNS='20', TERM='dumb',
)  # fmt: skip


def test_another_hash_seed_locale_folder_and_terminal(run, tmp_path):
    folder, _ = run
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **ENVIRONMENT}
    arguments = [*FLAGS, '--output', str(tmp_path), '--experiment', 'a']
    code = 'import sys; from vim_timm import train; sys.exit(train.main(sys.argv[1:]))'
    command = [sys.executable, '-c', code, *arguments]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr.decode(errors='replace')
    assert log_of(tmp_path / 'a') == log_of(folder)
    ours, theirs = (yaml.safe_load((path / 'args.yaml').read_text()) for path in (tmp_path / 'a', folder))
    assert {**ours, 'output': ''} == {**theirs, 'output': ''}
    weights, expected = (torch.load(path / 'last.pth.tar')['state_dict'] for path in (tmp_path / 'a', folder))
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
