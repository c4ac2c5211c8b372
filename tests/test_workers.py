"""A loading process may end or fail in many ways; each ends the run in the one sentence, and none is waited for."""

import errno
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from vim_timm.data.batch import Collate
from vim_timm.data.sampling import Samples
from vim_timm.data.unreadable import Unreadable
from vim_timm.data.workers import start_worker, watched
from vim_timm.errors import TrainingStopped, explain

SENTENCE = 'a data loading process died or cannot be reached'
pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='POSIX')


class Deadly(torch.utils.data.Dataset):
    """Items that end the process, or cannot be handed over."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if isinstance(self.how, signal.Signals):
            os.kill(os.getpid(), self.how)
        elif self.how == 'exit':
            os._exit(1)
        return self

    def __reduce__(self):
        raise OSError(errno.EMFILE, 'Too many open files')


def same(batch):
    return batch


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGBUS, signal.SIGTERM, 'exit', 'hand over'], ids=str)
def test_a_process_that_ends(how):
    loader = DataLoader(Deadly(how), num_workers=2, worker_init_fn=start_worker, collate_fn=same)
    with pytest.raises(TrainingStopped, match=SENTENCE):
        list(watched(loader, 2))


BROKEN = [
    ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer'),
    BrokenPipeError(errno.EPIPE, 'Broken pipe'),
    ConnectionRefusedError(errno.ECONNREFUSED, 'Connection refused'),
    FileNotFoundError(errno.ENOENT, 'No such file or directory'),  # the socket of a process that is gone
    EOFError(),
    pickle.UnpicklingError('pickle data was truncated'),
    OSError(errno.EMFILE, 'Too many open files'),
    BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable'),  # no further process may be started
    RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader\'s workers '
                 'are out of shared memory.'),
    RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly'),
    RuntimeError('Pin memory thread exited unexpectedly'),
    RuntimeError('received 0 items of ancdata'),
    RuntimeError('unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12)'),
    RuntimeError('Too many open files. Communication with the workers is no longer possible.'),
    RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file'),
]  # fmt: skip


def failing(error):
    yield 0
    raise error


@pytest.mark.parametrize('error', BROKEN, ids=lambda error: f'{type(error).__name__} {error}'[:60])
def test_a_broken_connection(error):
    batches = watched(failing(error), 2)
    assert next(batches) == 0
    with pytest.raises(TrainingStopped, match=SENTENCE):
        next(batches)
    with pytest.raises(type(error)):  # without processes it is something else
        list(watched(failing(error), 0))


@pytest.mark.parametrize(
    'error',
    [RuntimeError('CUDA error'), ValueError('a transform'),
     OSError('Caught OSError in DataLoader worker process 0.\nOSError: [Errno 5] Input/output error')],
)  # fmt: skip
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error).splitlines()[0][:10]):
        list(watched(failing(error), 2))


def test_the_consumers_own_errors_are_not_the_loaders():
    with pytest.raises(ConnectionResetError):
        for _ in watched(iter([1, 2]), 2):
            raise ConnectionResetError('of a tracker')


def test_news_of_a_death_may_come_anywhere():
    with pytest.raises(TrainingStopped, match=SENTENCE), explain('model'):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')


def test_a_shortage_of_descriptors_makes_no_image_unreadable():
    class Short(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise OSError(errno.EMFILE, 'Too many open files')

    with pytest.raises(OSError, match='Too many open files'):
        Samples(Short(), None, '', 0, True, Unreadable(5), 0)[0, 0, 0]


def test_batches_are_in_shared_memory_before_they_are_handed_over():
    """torch would move them there in a thread whose errors nobody hears of."""

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.zeros(2), index, (0, index, index)

    def stacked(samples):
        return torch.stack([image for image, _ in samples]), None

    images, labels = next(iter(DataLoader(Numbers(), 4, num_workers=1, collate_fn=Collate(stacked))))
    assert images.is_shared() and labels.targets.is_shared() and labels.keys.is_shared()
    assert not Collate(stacked)([Numbers()[0]])[0].is_shared()


def test_a_run_without_descriptors_ends_in_the_sentence_alone(tmp_path):
    resource = pytest.importorskip('resource')
    command = [sys.executable, '-m', 'vim_timm.train', *'--dataset digits --model test_vit --img-size 32'.split()]
    command += [*'--in-chans 1 --workers 2 --batch-size 64 --epochs 2 --device cpu --output'.split(), str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16)),
    )  # fmt: skip
    assert result.returncode == 3 and SENTENCE in result.stderr
    assert 'Traceback' not in result.stderr and result.stderr.count('rror:') == 1
