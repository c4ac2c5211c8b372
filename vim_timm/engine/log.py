"""What a run tells: a line of progress, the log files, and experiment trackers."""

import datetime
import importlib
import io
import os
import shutil
import sys
import threading
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..files import table, to_json, write_atomically
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
    """What a program is at: a line that moves every second in a terminal, and every half minute a line in a file.

    `with progress:` a thread shows also what the program waits for, and how long it has.

    Args:
        interval: steps between two lines, where the user names them; they stay in a terminal, too.
    """

    SECOND, LINE, PATIENCE = 1.0, 30.0, 5.0  # seconds

    def __init__(self, primary: bool, interval: int | None = None):
        self.primary, self.interval = primary, interval
        self.terminal = primary and sys.stdout.isatty()
        self.lock, self.done = threading.Lock(), threading.Event()
        self.stays, self.text, self.awaited = False, '', ''
        self.patience = self.PATIENCE  # until a file gets its first line of what is waited for
        self.shown = self.since = time.monotonic()
        self.thread: threading.Thread | None = None

    def due(self, step: int) -> bool:
        """Whether a line is to be shown at this step."""
        if not self.primary:
            return False
        self.stays = bool(self.interval) and step % (self.interval or 1) == 0
        now, every = time.monotonic(), self.SECOND if self.terminal else self.LINE
        if self.stays or (now - self.shown >= every and not (self.interval and not self.terminal)):
            self.shown = now
            return True
        return False

    def show(self, text: str) -> None:
        """Print a line that the next one may replace."""
        if self.stays or not self.terminal:
            return self.say(text)
        with self.lock:
            self.text, self.shown = text, time.monotonic()
            self._draw(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.primary:
            with self.lock:
                self.text, self.shown = '', time.monotonic()
                print(f'\r\x1b[K{text}' if self.terminal else text, flush=True)

    def wait_for(self, what: str) -> None:
        """Say from now on that the program waits for this; '' for nothing."""
        with self.lock:
            self.awaited, self.since = what, time.monotonic()

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be rewritten
        print(f'\r\x1b[K{text[:width]}', end='', flush=True)

    def __enter__(self) -> 'Progress':
        if self.primary:
            self.done.clear()
            self.thread = threading.Thread(target=self._tick, name='progress', daemon=True)
            _progress_of_process[:] = [self]
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread:
            self.done.set()
            self.thread.join()
            self.thread = None
            _progress_of_process.clear()

    def _tick(self) -> None:
        while not self.done.wait(self.SECOND):
            with self.lock:
                now = time.monotonic()
                waited, quiet = now - self.since, now - self.shown
                if self.awaited:
                    text = f'waiting for {self.awaited}, {waited:.0f} s'
                    if self.terminal:
                        self._draw(text)
                    elif min(waited, quiet) >= self.patience:
                        print(text, flush=True)
                        self.shown, self.patience = now, self.LINE
                elif self.terminal and self.text and quiet > 1.5 * self.SECOND:
                    self._draw(f'{self.text}  (step takes {quiet:.0f} s)')


_progress_of_process: list[Progress] = []


def _hold(action: str) -> None:
    for progress in _progress_of_process:
        getattr(progress.lock, action)()


if hasattr(os, 'register_at_fork'):  # no loading process may begin while the thread holds standard output
    os.register_at_fork(
        before=lambda: _hold('acquire'),
        after_in_parent=lambda: _hold('release'),
        after_in_child=lambda: _hold('release'),
    )


class Clock:
    """Seconds that a run has taken, also before it was resumed."""

    def __init__(self) -> None:
        self.before, self.start = 0.0, time.perf_counter()

    def go_on(self, before: float) -> None:
        """Count from now on, after so many seconds."""
        self.before, self.start = before, time.perf_counter()

    def seconds(self) -> float:
        """The seconds so far, in milliseconds' steps."""
        return round(self.before + time.perf_counter() - self.start, 3)


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
    write_atomically(os.path.join(folder, 'summary.json'), to_json(rows))


class Trackers:
    """TensorBoard, Weights & Biases and Trackio, as far as the flags ask for them.

    Raises:
        UserError: one of them is not installed.
    """

    def __init__(self, args: Settings):
        self.args, self.board, self.steps, self.loggers = args, None, None, []
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

    def start(self, folder: str, epoch: int, step: int) -> None:
        """Open them for the run in `folder`, which goes on at `epoch`, `step` steps after its start."""
        args: Any = self.args
        if self.board:
            path, writer = os.path.join(folder, 'tensorboard'), self.board.SummaryWriter
            self.board = writer(path, purge_step=epoch)
            self.steps = writer(os.path.join(path, 'steps'), purge_step=step + 1)
        more: dict[str, Any] = dict(tags=args.wandb_tags or None, id=args.wandb_resume_id or None)
        more['resume'] = 'must' if args.wandb_resume_id else None
        for logger in self.loggers:
            logger.init(
                project=args.wandb_project or 'vim-timm', name=os.path.basename(folder), config=vars(args),
                **(more if logger.__name__ == 'wandb' else {}),
            )  # fmt: skip

        if self.board:
            settings = '\n'.join(f'    {name}: {value}' for name, value in sorted(vars(args).items()))
            self.board.add_text('settings', settings, epoch)

    def log(self, row: dict[str, Any]) -> None:
        """Send one epoch's numbers."""
        names = {'time': 'speed/seconds', 'images_per_second': 'speed/images_per_second'}
        for key, value in row.items():
            if self.board and key != 'epoch' and value is not None:
                self.board.add_scalar(names.get(key) or key.replace('_', '/', 1), value, row['epoch'])
        for logger in self.loggers:
            logger.log(row)

    def step(self, step: int, lr: float, speed: Speed, loss: float) -> None:
        """Send TensorBoard the numbers of a step, counted from the start of the run."""
        for name, value in (('loss', loss), ('lr', lr), ('images_per_second', speed.rate())):
            if self.steps:
                self.steps.add_scalar(f'step/{name}', value, step)

    def first_batch(self, images: torch.Tensor) -> None:
        """Send TensorBoard the first images (B, C, H, W) as the model sees them, each scaled to its own span."""
        if not self.board:
            return
        images = images[:32].detach().float().cpu()
        images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        self.board.add_images('first batch', (images - low) / (high - low).clamp(min=1e-6), 0)

    def picture(self, name: str, png: bytes, epoch: int) -> None:
        """Send a picture to TensorBoard."""
        if self.board:
            with Image.open(io.BytesIO(png)) as image:
                self.board.add_image(name, np.asarray(image.convert('RGB')), epoch, dataformats='HWC')

    def close(self) -> None:
        for board in filter(None, (self.board, self.steps)):
            board.close()
        for logger in self.loggers:
            logger.finish()
