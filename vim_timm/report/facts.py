"""How an evaluation came about: its speed, hardware, data and versions."""

import time
from typing import Any

from ..engine.log import peak_memory
from ..engine.provenance import hardware, versions
from ..settings import Process, Settings


def facts(args: Settings, process: Process, rate: float) -> dict[str, Any]:
    """What a report says about how it came about, by name."""
    return {
        'images_per_second': round(rate, 1),
        'peak_memory': peak_memory(process.device),
        'device': hardware(process),
        'precision': process.precision,
        'batch_size': args.batch_size,
        'data': ', '.join(filter(None, (args.dataset or args.data_dir, args.split))),
        'weights': f'{args.checkpoint or "published"}{" (moving average)" if args.use_ema else ""}',
        **({'accuracy_by': f'ReaL labels, {args.real_labels}'} if args.real_labels else {}),
        'versions': versions(),
        'date': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    }
