"""Fixtures of several test files, and what every worker of a run begins with."""

import os

import pytest
import torch


def pytest_configure():
    """One thread for each worker of pytest-xdist, and for its processes: there is one worker per core."""
    if 'PYTEST_XDIST_WORKER' in os.environ:
        torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))


def pytest_collection_modifyitems(items):
    """The tests that take a minute come first: the last of a run on several workers would be waited for."""
    items.sort(key=lambda item: item.name != 'test_all_of_this_in_the_interpreter')


@pytest.fixture
def poison(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: empty_like(*a, **k).fill_(float('nan')))
