"""`benchmarks.masked_autoencoding` refuses what it would pass over in silence."""

import argparse
import sys

import pytest

from benchmarks import masked_autoencoding
from vim_timm.engine.log import write_history


def test_a_case_that_the_model_has_not_is_no_empty_table(monkeypatch, tmp_path):
    words = f'ablate --data-dir {tmp_path} --output {tmp_path} --model vim2_nano_patch4_32 --cases'.split()
    monkeypatch.setattr(sys, 'argv', ['masked_autoencoding', *words, 'ratio 0.5', 'shuffled tokens'])
    with pytest.raises(SystemExit, match='^vim2_nano_patch4_32 has no shuffled tokens$'):
        masked_autoencoding.main()


def test_a_loss_that_is_not_finite_is_said_to_be(tmp_path, capsys):
    runs = masked_autoencoding.Runs(argparse.Namespace(output=tmp_path, model='m', seed=0, jobs=1), [])
    runs.path('mae').mkdir()
    (runs.path('mae') / 'done.txt').touch()
    write_history(str(runs.path('mae')), [{'epoch': 0, 'time': 3.0, 'eval_loss': float('inf')}])
    runs.table(['mae'])
    assert '| mae | 1 | 3 |  | not finite |' in capsys.readouterr().out


def test_the_result_of_another_command_line_is_not_taken_for_this_one_s(monkeypatch, tmp_path):
    runs = masked_autoencoding.Runs(argparse.Namespace(output=tmp_path, model='m', seed=0, jobs=1), [])
    runs.path('mae').mkdir()
    monkeypatch.setattr(masked_autoencoding.sys, 'executable', 'true')
    assert runs.run(['train.py', '--epochs', '1'], runs.path('mae'))
    assert runs.run(['train.py', '--epochs', '1'], runs.path('mae'))
    with pytest.raises(SystemExit, match='another command line'):
        runs.run(['train.py', '--epochs', '2'], runs.path('mae'))
