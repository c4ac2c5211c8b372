"""States of a process on which no number may depend."""

import contextlib

import torch


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    'float64': lambda: default_dtype(torch.float64),
    'bfloat16': lambda: default_dtype(torch.bfloat16),
    'meta device': lambda: default_device('meta'),
    'filled memory': filled_memory,
}
