"""Loading processes: how they begin, and how their end, in whatever way it shows itself, becomes one sentence."""

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing import queues
from typing import Any, TypeVar

from ..errors import TrainingStopped, lost_worker, quiet_pillow

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
T = TypeVar('T')


def usual_workers(args: Any) -> int:
    """The number of loading processes: `--workers`, but where nobody chose it no more than this rank has cores."""
    if 'workers' in getattr(args, 'chosen', ()):
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(args.workers, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def start_worker(_: int) -> None:
    """Set up a new loading process; a DataLoader's `worker_init_fn`."""
    # A signal is the training process's to handle: torchrun and terminals send theirs to the whole process group, and a
    # worker that died of it would take the run down before its state is saved.
    for name in ('SIGTERM', 'SIGUSR1', 'SIGINT'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if hasattr(os, 'setpgid'):
        os.setpgid(0, 0)
    # Workers end when their parent does. torch sees to it, but not while one waits for a pipe that another holds open.
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    quiet_pillow()
    # A batch that cannot be handed over, for want of descriptors or shared memory, would be lost, and waited for.
    queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: Exception, batch: Any) -> None:
    print(f'a data loading process cannot hand over a batch: {error}', file=sys.stderr, flush=True)
    os._exit(1)


def watched(batches: Iterable[T], workers: int) -> Iterator[T]:
    """The batches of a loader.

    Raises:
        TrainingStopped: a loading process died, could not start, or cannot be reached.
    """
    try:
        yield from batches
    except TrainingStopped:
        raise
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        text = lost_worker(error) if workers else ''
        if not text:
            raise
        raise TrainingStopped(text) from error
