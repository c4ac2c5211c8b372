"""The folder of a run, which belongs to that run alone."""

import contextlib
import glob
import itertools
import os
import shutil
import time
from collections.abc import Iterator

import torch.distributed as dist
from timm.models import safe_model_name

from ..errors import UserError, explain
from ..settings import Process, Settings
from .lock import FolderLock

# by a run
WRITTEN = (
    '*.pth.tar', 'args.yaml', 'summary.*', 'curves.*', 'train-batch-*.jpg', 'reconstruction*.png', 'tensorboard',
)  # fmt: skip


def planned_folder(args: Settings, image_size: int) -> str:
    """The folder that the settings name for a run."""
    name = args.experiment or '-'.join([time.strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(image_size)])
    return os.path.join(args.output or os.path.join('.', 'output', 'train'), name)


def files_of_a_run(folder: str) -> list[str]:
    """Files and folders in `folder` that a run has written."""
    return [path for name in WRITTEN for path in glob.glob(os.path.join(glob.escape(folder), name))]


def in_folder(path: str, folder: str) -> bool:
    """Whether there is a file, and it is in the folder."""
    return bool(path) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)


@contextlib.contextmanager
def open_folder(folder: str, process: Process, goes_on: bool, args: Settings) -> Iterator[str]:
    """Make the folder of a run and hold it in this block; the same one on every rank.

    It is `folder`, or FOLDER-2, ... where that has a run in it, other than the one that goes on or gives way to
    --overwrite, or where it has no name of the user's and another run has just taken it.

    Args:
        goes_on: the run in the folder is the one that goes on.

    Raises:
        UserError: there can be no such folder, or another run is writing to it.
    """
    chosen, lock = [folder], None
    if process.primary:
        with explain('--output'):
            chosen[0], lock = _take(folder, goes_on or args.overwrite, bool(args.experiment))
            for path in files_of_a_run(folder) if args.overwrite and not goes_on else []:
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    try:
        if process.world_size > 1:
            dist.broadcast_object_list(chosen)
        yield chosen[0]
    finally:
        if lock:
            lock.release()


def _take(folder: str, as_it_is: bool, named: bool) -> tuple[str, FolderLock]:
    """The first of FOLDER, FOLDER-2, FOLDER-3, ... in which there is no run, or `as_it_is` FOLDER itself, locked."""
    for name in itertools.chain([folder], (f'{folder}-{number}' for number in itertools.count(2))):
        os.makedirs(name, exist_ok=True)
        try:
            lock = FolderLock(name)
        except UserError:
            if named:
                raise
            continue
        if as_it_is or not files_of_a_run(name):
            return name, lock
        lock.release()
    raise AssertionError('numbers have no end')
