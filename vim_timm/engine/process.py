"""The processes of a run: device, process group, signals."""

import contextlib
import dataclasses
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from timm.layers import set_fast_norm
from timm.utils import is_distributed_env, world_info_from_env

from ..errors import UserError, explain
from ..settings import Process, Settings

# Before Python 3.12 a forked process hangs if a thread of the process group, done with a collective, asked for the
# interpreter as it was forked (python/cpython#112275): so long its threads are given to come to rest.
REST = 0.05 if sys.version_info < (3, 12) else 0.0  # s


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Give torch its own default dtype and device in this block, whatever the caller's are: images, weights, random
    numbers and sums of timm and torchvision follow them."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.nullcontext() if device.type == 'cpu' else torch.device('cpu'):
            yield
    finally:
        torch.set_default_dtype(dtype)


def start_process(settings: Settings) -> Process:
    """Choose the device, join the process group, and set what torch has for all of the process.

    Raises:
        UserError: there is no such device, or the other processes cannot be reached.
    """
    name = settings.device
    if name.partition(':')[0] == 'cuda' and not torch.cuda.is_available():
        if 'device' in settings.chosen:
            raise UserError('there is no CUDA device here: leave --device out, or give --device cpu')
        name = 'cpu'
    local_rank, rank, world_size = world_info_from_env() if is_distributed_env() else (0, 0, 1)
    if world_size > 1:
        _join(settings, 'nccl' if name.startswith('cuda') else 'gloo', local_rank, rank, world_size)
        name = f'cuda:{local_rank}' if name.startswith('cuda') else name
    with explain(f'--device {name}'):
        device = torch.device(name)
        torch.empty(0, device=device)
    if settings.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if settings.fast_norm:
        set_fast_norm()
    return in_precision(Process(device, rank=rank, local_rank=local_rank, world_size=world_size), settings)


def in_precision(process: Process, settings: Settings) -> Process:
    """The same process with the dtypes of other settings."""
    dtype = getattr(torch, settings.model_dtype or 'float32')
    autocast_dtype = getattr(torch, settings.amp_dtype) if settings.amp else None
    return dataclasses.replace(process, dtype=dtype, autocast_dtype=autocast_dtype)


def _join(settings: Settings, backend: str, local_rank: int, rank: int, world_size: int) -> None:
    for name, value in (('RANK', rank), ('WORLD_SIZE', world_size), ('LOCAL_RANK', local_rank)):
        os.environ[name] = str(value)  # SLURM sets none of these
    with explain('cannot join the other processes'):
        timeout = datetime.timedelta(seconds=settings.dist_timeout)
        # Else NCCL's watchdog keeps the process for a minute more, for a dump that nobody asked for.
        os.environ.setdefault('TORCH_NCCL_DUMP_ON_TIMEOUT', '0')
        os.environ.setdefault('TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC', '1000')
        dist.init_process_group(backend, timeout=timeout)
    if hasattr(os, 'register_at_fork'):
        os.register_at_fork(before=_rest)


def _rest() -> None:
    if dist.is_initialized():
        time.sleep(REST)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1, by which schedulers announce the end of a job, and Ctrl-C land in the list and kill nobody.

    A second Ctrl-C, a moment after the first, ends the process: launchers repeat at once what the terminal sent.
    """
    caught: list[int] = []
    first = 0.0

    def catch(number: int, _: object) -> None:
        nonlocal first
        if number != signal.SIGINT or number not in caught:
            first = first if number in caught else time.monotonic()
            caught.append(number)
            if number == signal.SIGINT and os.environ.get('RANK', '0') == '0':
                os.write(2, b'\nCtrl-C: stopping after this step; once more ends at once\n')
        elif time.monotonic() - first > 0.5:
            os.write(2, b'\nended at once\n')
            os._exit(130)

    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT') if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()  # no other may handle them
    before = {number: signal.signal(number, catch) for number in numbers if main}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_rank(flag: bool, process: Process) -> bool:
    """Whether the flag is set on any rank; every rank must ask."""
    flags = torch.tensor(int(flag), device=process.device)
    if process.world_size > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
