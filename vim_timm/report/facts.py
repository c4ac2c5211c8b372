"""How an evaluation came about: its speed, hardware, data and versions."""

import argparse
import time
from typing import Any

import timm
import torch

from ..engine.log import peak_memory
from ..version import __version__


class Stopwatch:
    """Images a second on all ranks, from after the first batch: that one waits for workers, compilers and kernels."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.world_size = args.torch_device, args.world_size
        self.start, self.before, self.batches = time.perf_counter(), 0, 0
        self.first = (self.start, 0)

    def batch(self, images: int) -> None:
        """Count a batch; `images` is the number of this rank's so far."""
        self.batches += 1
        if self.batches == 1:
            if self.device.type == 'cuda':
                torch.cuda.synchronize(self.device)
            self.first = (time.perf_counter(), images)
        elif self.batches == 2:  # else the first batch is all there is
            self.start, self.before = self.first

    def rate(self, images: int) -> float:
        """Images a second, when this rank has had so many."""
        return (images - self.before) * self.world_size / max(time.perf_counter() - self.start, 1e-9)


def facts(args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """What a report says about how it came about, by name."""
    cuda = args.torch_device.type == 'cuda'
    return {
        'images_per_second': round(rate, 1),
        'peak_memory': peak_memory(args.torch_device),
        'device': f'{args.world_size} x {torch.cuda.get_device_name(args.torch_device) if cuda else args.device}',
        'precision': f'{args.amp_dtype} AMP' if args.amp else str(args.dtype).rpartition('.')[2],
        'batch_size': args.batch_size,
        'data': ', '.join(filter(None, (args.dataset or args.data_dir, args.split))),
        'weights': f'{args.checkpoint or "published"}{" (moving average)" if args.use_ema else ""}',
        **({'accuracy_by': f'ReaL labels, {args.real_labels}'} if args.real_labels else {}),
        'versions': f'vim-timm {__version__}, timm {timm.__version__}, torch {torch.__version__}',
        'date': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    }
