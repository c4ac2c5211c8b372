"""Checkpoints in timm's format that are written whole or not at all, and read without running code."""

import glob
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from ..errors import UserError, explain
from ..models.checkpoint import has_average, read_checkpoint, select_weights

EXTENSION = '.pth.tar'


def write_atomically(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it: `path` is never half a file."""
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    if os.name == 'posix':  # the rename itself
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def duplicate(source: str, path: str) -> None:
    """Give a finished file a second name (a copy, where the file system has no hard links), atomically."""
    temporary = f'{path}.tmp'
    if os.path.exists(temporary):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    if os.path.exists(temporary):  # POSIX renames nothing when both names are the same file
        os.remove(temporary)


def read(path: str) -> dict[str, Any]:
    """What `read_checkpoint` reads.

    Raises:
        UserError: what is wrong with the file.
    """
    with explain():
        return read_checkpoint(path)


def load_weights(model: torch.nn.Module, path: str, use_ema: bool) -> None:
    """Load a training checkpoint, a state dict or a safetensors file strictly into a model.

    Args:
        use_ema: take the moving average, where the checkpoint has one.

    Raises:
        UserError: as `read`, or the weights belong to another model.
    """
    content = read(path)
    state = select_weights(content, use_ema and has_average(content))
    with explain(f'checkpoint {path}'):
        own = model.state_dict()
        if state.keys() != own.keys():
            # The model's filter may know the file as an original or older layout, or name the family it belongs to.
            filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
            state = filter_fn(state, model) if filter_fn else state
        check_fit(model, state, path)
        model.load_state_dict(state)


def check_fit(model: torch.nn.Module, state: dict[str, Any], path: str) -> None:
    """Raise a UserError unless the state dict of `path` has the names and shapes of the model's."""
    own = model.state_dict()
    foreign, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if foreign or missing:
        example = f'it has {foreign[0]!r}' if foreign else f'it lacks {missing[0]!r}'
        raise UserError(f'checkpoint {path} belongs to another model than {type(model).__name__} ({example})')
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise UserError(
                f'checkpoint {path} does not fit this model: {key} is {tuple(tensor.shape)} there and '
                f'{tuple(own[key].shape)} here (other --num-classes, --img-size or --in-chans?)'
            )


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """(epoch, step) at which training goes on; for timm's own checkpoints the epoch after theirs."""
    progress = checkpoint.get('progress')
    return (progress['epoch'], progress['step']) if progress else (checkpoint.get('epoch', -1) + 1, 0)


def newest(folder: str) -> str:
    """The checkpoint in a run's folder that is furthest on, or ''."""
    paths = [os.path.join(folder, f'last{EXTENSION}'), *glob.glob(os.path.join(folder, f'recovery-*{EXTENSION}'))]
    return max((path for path in paths if os.path.isfile(path)), key=lambda path: progress_of(read(path)), default='')


class Saver:
    """A run's checkpoints: last, model_best, the best `history`, every `every`-th epoch, and recovery in between.

    Which files there must be follows from the rows of the log alone, so that a resumed run has the same ones.
    """

    def __init__(self, folder: str, history: int, every: int, metric: str, decreasing: bool):
        self.folder, self.history, self.every = folder, max(1, history), every
        self.metric, self.sign = metric, (1 if decreasing else -1)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f'{name}{EXTENSION}')

    def ranking(self, rows: list[dict[str, Any]]) -> list[int]:
        """Evaluated epochs, best first; the earlier one where they tie."""
        known = [row for row in rows if row.get(self.metric) is not None]
        return [row['epoch'] for row in sorted(known, key=lambda row: (self.sign * row[self.metric], row['epoch']))]

    def save_epoch(self, state: dict[str, Any]) -> None:
        """Write the state at the end of an epoch, which its last row describes."""
        last = self.path('last')
        write_atomically(last, lambda file: torch.save(state, file))
        self.tidy(state['history'])

    def tidy(self, rows: list[dict[str, Any]]) -> None:
        """Give `last` the further names that it deserves, and drop checkpoints that are no longer among the best."""
        last, epoch = self.path('last'), rows[-1]['epoch']
        ranking = self.ranking(rows)
        if ranking and ranking[0] == epoch:
            duplicate(last, self.path('model_best'))
        if epoch in ranking[: self.history]:
            duplicate(last, self.path(f'checkpoint-{epoch}'))
        if self.every and (epoch + 1) % self.every == 0:
            duplicate(last, self.path(f'milestone-{epoch + 1}'))
        for dropped in ranking[self.history :]:
            if os.path.exists(self.path(f'checkpoint-{dropped}')):
                os.remove(self.path(f'checkpoint-{dropped}'))
        for path in glob.glob(os.path.join(self.folder, f'recovery-*{EXTENSION}')):
            os.remove(path)

    def save_recovery(self, state: dict[str, Any]) -> str:
        """Write the state in the middle of an epoch; it takes the place of the recovery checkpoint before it."""
        before = glob.glob(os.path.join(self.folder, f'recovery-*{EXTENSION}'))
        path = self.path('recovery-{epoch}-{step}'.format(**state['progress']))
        write_atomically(path, lambda file: torch.save(state, file))
        for old in before:
            if old != path:
                os.remove(old)
        return path
