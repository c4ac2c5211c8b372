"""Fixtures of several test files, and what every worker of a run begins with."""

import os
import random

import numpy
import pytest
import torch

SEED = int(os.environ.get('VIM_TIMM_SEED', '0'))


def pytest_report_header():
    return f'random operands: VIM_TIMM_SEED={SEED}'


def pytest_configure():
    """One thread for each worker of pytest-xdist, and for its processes: there is one worker per core."""
    torch.manual_seed(SEED)
    if 'PYTEST_XDIST_WORKER' in os.environ:
        torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))


LONG = (
    'test_all_of_this_in_the_interpreter',
    'test_kernels_compile_within_the_shared_memory_of_every_gpu',
    'test_killed_and_resumed_run_is_the_run_never_killed',
    'test_signal_to_torchrun_saves_once',
    'test_dead_rank_ends_the_run',
    'test_ctrl_c_saves_and_prints_the_line_that_goes_on',
)


def pytest_collection_modifyitems(items):
    """The tests that take ten seconds and more come first: the last of a run on several workers would be waited for."""
    items.sort(key=lambda item: item.originalname not in LONG)


@pytest.fixture(autouse=True)
def seeded():
    """A test that fails with some operands fails again when it is asked alone."""
    torch.manual_seed(SEED)
    numpy.random.seed(SEED)
    random.seed(SEED)


@pytest.fixture(scope='session', autouse=True)
def drawn_once():
    """The curves of runs with the same columns and number of epochs: a figure takes a worker half as long as a run."""
    from vim_timm.report import plots

    draw, drawn = plots.curves, {}

    def curves(panels, xlabel='epoch'):
        kind = xlabel, *((title, line.name, len(line.x)) for title, lines in panels.items() for line in lines)
        if kind not in drawn:
            drawn[kind] = draw(panels, xlabel)
        return drawn[kind]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, 'curves', curves)
        yield


@pytest.fixture
def few(monkeypatch):
    """Every fourth of the embedded digits, for runs that need not learn."""
    from vim_timm.data import Digits

    length, get = Digits.__len__, Digits.__getitem__
    monkeypatch.setattr(Digits, '__len__', lambda digits: length(digits) // 4)
    monkeypatch.setattr(Digits, '__getitem__', lambda digits, index: get(digits, 4 * index))


@pytest.fixture
def poison(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, 'empty', lambda *a, **k: empty(*a, **k).fill_(float('nan')))
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: empty_like(*a, **k).fill_(float('nan')))


@pytest.fixture
def triton():
    """Triton's kernels on any device, with NaN in memory that nothing has written.

    Float32 products are as exact as in a new process: a run of training on a GPU leaves TF32 allowed behind it.
    """
    from vim_timm.ops import use_scan_backend

    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    torch.use_deterministic_algorithms(True)
    with use_scan_backend('triton'):
        yield
    torch.use_deterministic_algorithms(False)
    products.allow_tf32 = allowed
