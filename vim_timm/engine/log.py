"""What a run tells: a line of progress, the log files, and experiment trackers."""

import csv
import io
import json
import os
import shutil
import sys
import time
from typing import Any

import torch

from ..errors import UserError
from .checkpoint import write_atomically


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'


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

    def due(self, step: int, last: bool) -> bool:
        """Whether a line would be shown now."""
        return self.primary and (last or step % self.interval == 0)

    def show(self, text: str, last: bool) -> None:
        """Print a line that the next one may replace."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
            print(f'\r\x1b[K{text if last else text[:width]}', end='\n' if last else '', flush=True)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.primary:
            print(f'\r\x1b[K{text}' if self.terminal else text, flush=True)


class Speed:
    """Images a second and the time left, measured from when it was made."""

    def __init__(self, steps_left: int):
        self.start, self.images, self.steps, self.steps_left = time.perf_counter(), 0, 0, steps_left

    def update(self, images: int) -> None:
        self.images += images
        self.steps += 1

    def __str__(self) -> str:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        left = seconds / max(self.steps, 1) * (self.steps_left - self.steps)
        return f'{self.images / seconds:.0f} img/s  ETA {duration(left)}'


def write_history(folder: str, rows: list[dict[str, Any]]) -> None:
    """Write all epochs to summary.csv and summary.json. A resumed run thereby cuts the log back to its checkpoint."""
    table = io.StringIO()
    names = list(dict.fromkeys(['epoch', *(name for row in rows for name in row)]))
    writer = csv.DictWriter(table, names, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(os.path.join(folder, 'summary.csv'), lambda file: file.write(table.getvalue().encode()))
    text = json.dumps(rows, indent=1) + '\n'
    write_atomically(os.path.join(folder, 'summary.json'), lambda file: file.write(text.encode()))


class Trackers:
    """TensorBoard, Weights & Biases and Trackio, as far as the flags ask for them."""

    def __init__(self, args: Any, folder: str, start_epoch: int):
        self.writer, self.loggers = None, []
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError('--tensorboard needs `pip install tensorboard`') from error
            self.writer = SummaryWriter(os.path.join(folder, 'tensorboard'), purge_step=start_epoch)
        for flag, name in (('log_wandb', 'wandb'), ('log_trackio', 'trackio')):
            if getattr(args, flag):
                self.loggers.append(self._start(name, flag, args, folder))

    @staticmethod
    def _start(name: str, flag: str, args: Any, folder: str) -> Any:
        try:
            module = __import__(name)
        except ImportError as error:
            raise UserError(f'--{flag.replace("_", "-")} needs `pip install {name}`') from error
        options: dict[str, Any] = dict(
            project=args.wandb_project or 'vim-timm', name=os.path.basename(folder), config=args.settings
        )
        if name == 'wandb':
            options.update(tags=args.wandb_tags or None, id=args.wandb_resume_id or None)
            options.update(resume='must' if args.wandb_resume_id else None)
        module.init(**options)
        return module

    def log(self, row: dict[str, Any]) -> None:
        """Send one epoch's numbers."""
        for key, value in row.items():
            if self.writer is not None and key != 'epoch' and value is not None:
                self.writer.add_scalar(key.replace('_', '/', 1), value, row['epoch'])
        for logger in self.loggers:
            logger.log(row)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        for logger in self.loggers:
            logger.finish()
