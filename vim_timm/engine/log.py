"""What a run tells: a line of progress, the log files, and experiment trackers."""

import datetime
import importlib
import io
import json
import os
import shutil
import sys
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..files import table, write_atomically
from ..settings import Process, Settings


def peak_memory(device: torch.device) -> str:
    """Peak memory of this process: the device's, or the host's on a CPU."""
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB'
    try:
        import resource
    except ImportError:  # Windows
        return '?'
    unit = 1 if sys.platform == 'darwin' else 1024
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB'


class Progress:
    """One line that rewrites itself in a terminal; plain lines, every `interval` steps, in a file."""

    def __init__(self, primary: bool, interval: int):
        self.primary, self.interval = primary, max(1, interval)
        self.terminal = primary and sys.stdout.isatty()

    def due(self, step: int) -> bool:
        """Whether a line is to be shown at this step."""
        return self.primary and step % self.interval == 0

    def show(self, text: str) -> None:
        """Print a line that the next one may replace."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
            print(f'\r\x1b[K{text[:width]}', end='', flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.primary:
            print(f'\r\x1b[K{text}' if self.terminal else text, flush=True)


class Speed:
    """Images a second on all ranks and the time left, from after the first step: that one waits for workers, compilers.

    Args:
        steps: how many there will be.
    """

    def __init__(self, process: Process, steps: int):
        self.device, self.world_size, self.steps, self.step = process.device, process.world_size, steps, 0
        self.start, self.images = time.perf_counter(), 0

    def update(self, images: int) -> None:
        """Count a step and this rank's images in it."""
        self.step += 1
        self.images += images * self.world_size
        if self.step == 1:
            if self.device.type == 'cuda':
                torch.cuda.synchronize(self.device)
            self.first = (time.perf_counter(), self.images)
        elif self.step == 2:  # else the first step is all there is
            self.start, self.images = self.first[0], self.images - self.first[1]

    def rate(self) -> float:
        """Images a second."""
        return self.images / max(time.perf_counter() - self.start, 1e-9)

    def __str__(self) -> str:
        left = (time.perf_counter() - self.start) / max(self.step - 1, 1) * (self.steps - self.step)
        return f'{self.rate():.0f} img/s  ETA {datetime.timedelta(seconds=round(left))}'


def write_history(folder: str, rows: list[dict[str, Any]]) -> None:
    """Write all epochs to summary.csv and summary.json. A resumed run thereby cuts the log back to its checkpoint."""
    write_atomically(os.path.join(folder, 'summary.csv'), table(rows, 'epoch'))
    write_atomically(os.path.join(folder, 'summary.json'), json.dumps(rows, indent=1) + '\n')


class Trackers:
    """TensorBoard, Weights & Biases and Trackio, as far as the flags ask for them.

    Raises:
        UserError: one of them is not installed.
    """

    def __init__(self, args: Settings):
        self.args, self.board, self.loggers = args, None, []
        if args.tensorboard:
            self.board = self._import('torch.utils.tensorboard', '--tensorboard', 'tensorboard')
        for name, wanted in (('wandb', args.log_wandb), ('trackio', args.log_trackio)):
            if wanted:
                self.loggers.append(self._import(name, f'--log-{name}', name))

    @staticmethod
    def _import(module: str, flag: str, package: str) -> Any:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise UserError(f'{flag} needs `pip install {package}`') from error

    def start(self, folder: str, epoch: int) -> None:
        """Open them for the run in `folder`, which goes on at `epoch`."""
        args = self.args
        if self.board:
            self.board = self.board.SummaryWriter(os.path.join(folder, 'tensorboard'), purge_step=epoch)
        more: dict[str, Any] = dict(tags=args.wandb_tags or None, id=args.wandb_resume_id or None)
        more['resume'] = 'must' if args.wandb_resume_id else None
        for logger in self.loggers:
            logger.init(
                project=args.wandb_project or 'vim-timm', name=os.path.basename(folder), config=vars(args),
                **(more if logger.__name__ == 'wandb' else {}),
            )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        """Send one epoch's numbers."""
        for key, value in row.items():
            if self.board and key != 'epoch' and value is not None:
                self.board.add_scalar(key.replace('_', '/', 1), value, row['epoch'])
        for logger in self.loggers:
            logger.log(row)

    def picture(self, name: str, png: bytes, epoch: int) -> None:
        """Send a picture to TensorBoard."""
        if self.board:
            with Image.open(io.BytesIO(png)) as image:
                self.board.add_image(name, np.asarray(image.convert('RGB')), epoch, dataformats='HWC')

    def close(self) -> None:
        if self.board:
            self.board.close()
        for logger in self.loggers:
            logger.finish()
