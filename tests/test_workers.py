"""A loading process may end or fail in many ways; each ends the run in the one sentence, and none is waited for."""

import errno
import importlib
import os
import pickle
import signal
import sys
from unittest.mock import MagicMock

import pytest
import torch
from processes import TRAIN, Python, finish, ranks
from torch.utils.data import DataLoader, IterableDataset

from vim_timm import train
from vim_timm.data import loading
from vim_timm.data.batch import Collate
from vim_timm.data.sampling import Samples
from vim_timm.data.unreadable import Unreadable
from vim_timm.data.workers import start_worker, watched
from vim_timm.errors import TrainingStopped, explain
from vim_timm.settings import Process

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
    pytest.importorskip('resource')
    limited = 'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16));' + TRAIN
    flags = '--dataset digits --model test_vit --img-size 32 --in-chans 1 --workers 2 --batch-size 64 --epochs 2'
    flags = [*flags.split(), '--device', 'cpu', '--output', str(tmp_path)]
    status, output = Python(limited, *flags, output=tmp_path / 'said').wait()
    assert status == 3 and SENTENCE in output
    assert 'Traceback' not in output and output.count('rror:') == 1


@pytest.mark.parametrize('samples, ranks, workers', [(10, 3, 1), (10, 2, 2), (3, 2, 1), (8, 2, 2), (1, 2, 1)])
def test_an_evaluation_of_a_tfds_stream_counts_each_sample_once(samples, ranks, workers, monkeypatch):
    """timm's reader itself, on a split that is dealt to the workers of all ranks as tfds deals it."""
    for name in ('tensorflow', 'tensorflow_datasets'):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, 'timm.data.readers.reader_tfds', raising=False)
    kind = importlib.import_module('timm.data.readers.reader_tfds').ReaderTfds
    monkeypatch.delitem(sys.modules, 'timm.data.readers.reader_tfds')

    class Streamed(IterableDataset):
        def __len__(self):
            return len(self.reader)

        def __iter__(self):
            return ((picture, label) for picture, label in self.reader)

    seen, args = [], train.parse_args(['--dataset', 'tfds/x', '--workers', '0', '--device', 'cpu'])
    images = dict(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), interpolation='bicubic', crop_pct=1.0)
    for place in range(ranks * workers):
        dataset, reader = Streamed(), kind.__new__(kind)
        for name, value in dict(
            num_samples=samples, repeats=0, num_workers=workers, global_num_workers=ranks * workers, batch_size=4,
            dist_num_replicas=ranks, is_training=False, subsplit='a part', reinit_each_iter=False, input_key='image',
            target_key='label', target_keys=None, input_img_mode='', target_img_mode='', remap_class=False,
            ds=[{'image': number, 'label': number} for number in range(place, samples, ranks * workers)],
        ).items():  # fmt: skip
            setattr(reader, name, value)
        dataset.reader = reader
        process = Process(torch.device('cpu'), rank=place // workers, world_size=ranks)
        loader = loading.eval_loader(args, process, dataset, images)
        here = [label for _, label in reader]
        assert len(loader.dataset) >= len(here)  # torch warns of more
        seen += here
    assert sorted(seen) == list(range(samples))


RESTS = """
import os, sys
import torch.distributed as dist
from vim_timm import train
from vim_timm.engine import process
rests = []
process.time.sleep = rests.append

def child():
    if not os.fork():
        os._exit(0)
    os.wait()

process.start_process(train.parse_args(['--dataset', 'digits', '--device', 'cpu']))
child()
dist.destroy_process_group()
child()
assert rests == [process.REST], rests
assert (process.REST > 0) == (sys.version_info < (3, 12))
"""


def test_the_threads_of_a_process_group_rest_before_a_process_is_forked(tmp_path):
    finish(ranks(RESTS, count=2, folder=tmp_path))
