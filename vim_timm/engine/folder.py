"""The folder of a run, which belongs to that run alone."""

import contextlib
import glob
import itertools
import os
import shutil
import time

import torch.distributed as dist
from timm.models import safe_model_name

from ..errors import explain
from ..settings import Process, Settings

WRITTEN = ('*.pth.tar', 'args.yaml', 'summary.*', 'curves.*', 'train-batch-*.jpg', 'tensorboard')  # by a run


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


def open_folder(folder: str, process: Process, goes_on: bool, overwrite: bool) -> str:
    """Make the folder of a run and return it, the same on every rank: `folder`, or FOLDER-2, ... if a run is in it.

    Args:
        goes_on: the run in the folder is the one that goes on.
        overwrite: the run in the folder gives way.

    Raises:
        UserError: there can be no such folder.
    """
    chosen = [folder]
    if process.primary:
        with explain('--output'):
            chosen = [folder if goes_on or overwrite else _free(folder)]
            os.makedirs(chosen[0], exist_ok=True)
            for path in files_of_a_run(folder) if overwrite and not goes_on else []:
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if process.world_size > 1:
        dist.broadcast_object_list(chosen)
    return chosen[0]


def _free(folder: str) -> str:
    """The first of FOLDER, FOLDER-2, FOLDER-3, ... in which there is no run."""
    for name in itertools.chain([folder], (f'{folder}-{number}' for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            os.makedirs(name)  # whoever makes it has it
            return name
        if os.path.isdir(name) and not files_of_a_run(name):
            return name
    raise AssertionError('numbers have no end')
