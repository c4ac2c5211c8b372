"""The doctor tells what this machine can run, and why not."""

import subprocess
import sys

import torch

from vim_timm import doctor, ops


def test_report_names_every_backend_with_its_state():
    text = doctor.report()
    for status in ops.explain():
        state = 'available' if status.available else f'not available: {status.reason}'
        assert f'  {status.name}: {state}' in text


def test_report_names_versions_devices_and_the_choice_of_auto():
    text = doctor.report()
    assert f'torch {torch.__version__}' in text
    assert 'cpu: ' in text
    assert f'  cpu: {ops.auto_backend("cpu")}' in text


def test_report_says_what_the_environment_forces(monkeypatch):
    monkeypatch.setenv('VIM_TIMM_SCAN', 'reference')
    assert 'VIM_TIMM_SCAN=reference overrides this' in doctor.report()
    monkeypatch.setenv('VIM_TIMM_ATTN', 'math')
    assert 'VIM_TIMM_ATTN=math is forced' in doctor.report()
    for name, choice in (('VIM_TIMM_SCAN', 'reference'), ('VIM_TIMM_ATTN', 'flash')):
        monkeypatch.setenv(name, 'nope')
        assert f'{name}=nope is unknown: choose auto, {choice}, ' in doctor.report()
        monkeypatch.setenv(name, '')
        assert f'{name}=' not in doctor.report()


def test_runs_as_a_module():
    run = subprocess.run([sys.executable, '-m', 'vim_timm.doctor'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'Scan backends' in run.stdout
