"""Measuring programs write what succeeded, name what failed, and end with an exit status that says so."""

import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from PIL import Image

from benchmarks import convert_memory, cpu, equal_time, gpu
from benchmarks import train as of_train


def test_a_row_of_train_that_fails_is_named_and_the_others_are_written(monkeypatch, tmp_path):
    def run(words, **options):
        row = json.loads(words[-1])
        if row['way'] == 'in memory':
            return subprocess.CompletedProcess(words, 1, stdout='')
        row |= dict(model='m', size=8, batch=4, opt='adamw', train=9.0, raw=10.0, ratio=0.9, first=1.0)
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(row))

    monkeypatch.setattr(of_train.subprocess, 'run', run)
    monkeypatch.setattr(sys, 'argv', ['train', '--device', 'cpu', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match='^1 of 2 rows failed: in memory$'):
        of_train.main()
    assert [row['ratio'] for row in json.loads((tmp_path / 'train.json').read_text())] == [0.9]


def test_a_variant_that_fails_is_named_after_the_table(monkeypatch, tmp_path):
    for split in equal_time.SPLITS:
        (tmp_path / 'data' / split / 'a').mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / split / 'a' / '0.png')
    words = ['--data-dir', str(tmp_path / 'data'), '--output', str(tmp_path), '--variants', '64 states', 'both orders']
    monkeypatch.setattr(sys, 'argv', ['equal_time', *words])
    monkeypatch.setattr(equal_time.sys, 'executable', 'false')
    with pytest.raises(SystemExit, match='^2 of 2 variants failed, see .*: 64 states, both orders$'):
        equal_time.main()
    assert (tmp_path / 'equal_time.md').exists()


def test_a_model_that_a_gpu_cannot_run_is_named_and_the_others_are_written(monkeypatch, tmp_path):
    def build(name, *others):
        raise RuntimeError('CUDA out of memory')

    def nothing():
        pass

    monkeypatch.setattr(gpu, 'build', lambda name, *others: nothing if name.startswith('deit') else build(name))
    monkeypatch.setattr(gpu, 'median_ms', lambda run, budget: 10.0)
    for name in ('synchronize', 'reset_peak_memory_stats'):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: 0)
    words = '--tables infer --models tiny --families vim deit --sizes 224 --ways eager --output'.split()
    monkeypatch.setattr(sys, 'argv', ['gpu', *words, str(tmp_path)])
    with pytest.raises(SystemExit, match='^1 of 2 rows of models failed: vim_tiny_patch16_224 224 infer eager$'):
        gpu.main()
    rows = json.loads((tmp_path / 'gpu.json').read_text())['infer']
    assert [row.get('error') for row in rows] == ['RuntimeError CUDA out of memory', None]
    assert (tmp_path / 'gpu.png').exists()


@pytest.mark.parametrize('end, word, error', [(os._exit, 1, BrokenProcessPool), (int, 'none', ValueError)])
def test_a_process_that_fails_ends_the_measurement_of_memory(end, word, error):
    with pytest.raises(error):
        convert_memory.in_a_process(end, word)


def test_the_scan_alone_is_measured_with_each_number_of_threads(monkeypatch, tmp_path):
    measured, before = [], torch.get_num_threads()

    def in_turn(runs, repeats, budget):
        measured.append(torch.get_num_threads())
        return {name: {'best': 1.0} for name in runs}

    monkeypatch.setattr(cpu, 'in_turn', in_turn)
    monkeypatch.setattr(cpu, 'measure', lambda options: [])
    monkeypatch.setattr(cpu, 'plot', lambda rows, file: None)
    monkeypatch.setattr(sys, 'argv', ['cpu', '--threads', '1', '3', '--output', str(tmp_path)])
    try:
        cpu.main()
    finally:
        torch.set_num_threads(before)
    assert measured == [1, 3] and list(json.loads((tmp_path / 'cpu.json').read_text())['scan_alone']) == ['1', '3']
