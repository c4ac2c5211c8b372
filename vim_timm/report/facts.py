"""How an evaluation came about: its speed, hardware, data and versions."""

import time
from typing import Any

import timm
import torch

from ..engine.log import peak_memory
from ..settings import Process, Settings
from ..version import __version__


def facts(args: Settings, process: Process, rate: float) -> dict[str, Any]:
    """What a report says about how it came about, by name."""
    device = process.device
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device)
    return {
        'images_per_second': round(rate, 1),
        'peak_memory': peak_memory(device),
        'device': f'{process.world_size} x {name}',
        'precision': process.precision,
        'batch_size': args.batch_size,
        'data': ', '.join(filter(None, (args.dataset or args.data_dir, args.split))),
        'weights': f'{args.checkpoint or "published"}{" (moving average)" if args.use_ema else ""}',
        **({'accuracy_by': f'ReaL labels, {args.real_labels}'} if args.real_labels else {}),
        'versions': f'vim-timm {__version__}, timm {timm.__version__}, torch {torch.__version__}',
        'date': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    }
