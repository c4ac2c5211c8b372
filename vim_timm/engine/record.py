"""What a checkpoint says of the run that wrote it: where it stopped, and its log. The file may be anyone's."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError, shown


def progress_of(checkpoint: Mapping[str, Any], path: str) -> tuple[int, int]:
    """(epoch, step) at which training goes on; for timm's own checkpoints the epoch after theirs.

    Raises:
        UserError: the checkpoint's own words on it make no sense.
    """
    if 'progress' not in checkpoint:
        epoch = checkpoint.get('epoch', -1)
        return _counted(path, 'epoch', epoch + 1 if type(epoch) is int else epoch), 0
    progress = checkpoint['progress']
    if not isinstance(progress, dict):
        raise UserError(f'{path} is damaged: its progress is no dictionary')
    for name in ('nonfinite', 'skipped'):
        _counted(path, name, progress.get(name, 0))
    epoch, step = (_counted(path, name, progress.get(name)) for name in ('epoch', 'step'))
    if step:
        batch, losses = progress.get('batch'), progress.get('loss')
        if not (isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(losses, (list, tuple))):
            raise UserError(f'{path} is damaged: its progress lacks the batch size or the losses')
        pairs = [loss for loss in losses if isinstance(loss, (list, tuple)) and len(loss) == 2]
        values = [value for loss in pairs for value in loss]
        if len(pairs) != _counted(path, 'batch', batch[1]) or not all(type(value) in (int, float) for value in values):
            raise UserError(f'{path} is damaged: its progress has no loss for each of {batch[1]} ranks')
        steps = progress.get('steps', [1, 1])
        if not isinstance(steps, (list, tuple)) or len(steps) != 2:
            raise UserError(f'{path} is damaged: its steps are {shown(repr(steps))}')
    return epoch, step


def seconds_of(checkpoint: Mapping[str, Any], path: str) -> float:
    """Seconds that the run has taken, by the checkpoint that it wrote; 0 where that says nothing.

    Raises:
        UserError: it says something else than a time.
    """
    seconds = (checkpoint.get('progress') or {}).get('seconds', 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < float('inf'):
        raise UserError(f'{path} is damaged: its time is {shown(repr(seconds))}')
    return float(seconds)


def rate_of(checkpoint: Mapping[str, Any], path: str, default: float) -> float:
    """The learning rate of the run's last update.

    Raises:
        UserError: it is no number.
    """
    rate = (checkpoint.get('progress') or {}).get('rate', default)
    if type(rate) not in (int, float):
        raise UserError(f'{path} is damaged: its learning rate is {shown(repr(rate))}')
    return rate


def eval_batch_of(checkpoint: Mapping[str, Any], path: str) -> int:
    """The evaluation's batch that --validation-batch-size auto chose for the run; 0 where it has chosen none yet.

    Raises:
        UserError: it is no number of images.
    """
    return _counted(path, 'eval_batch', (checkpoint.get('progress') or {}).get('eval_batch', 0))


def held_out_of(checkpoint: Mapping[str, Any], settings: Any, path: str) -> dict[str, str]:
    """By which bounds (`Images.keep`) the run held out its images; {} where settings ask for others, or it did not.

    Raises:
        UserError: they are no bounds.
    """
    run, bounds = checkpoint.get('args'), checkpoint.get('held_out')
    if bounds is None or not isinstance(run, dict):
        return {}
    if any(run.get(name) != getattr(settings, name) for name in ('val_fraction', 'seed')):
        return {}
    if not isinstance(bounds, dict) or not all(isinstance(word, str) for pair in bounds.items() for word in pair):
        raise UserError(f'{path} is damaged: it does not say which images were held out')
    return bounds


def _counted(path: str, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 2**53:
        raise UserError(f'{path} is damaged: its {name} is {shown(repr(value))}')
    return value


def history_of(checkpoint: Mapping[str, Any], path: str, metric: str = '') -> list[dict[str, Any]]:
    """The log's rows in a checkpoint.

    Args:
        metric: the column by which rows are ranked.

    Raises:
        UserError: they are no rows of a log.
    """
    rows = checkpoint.get('history', [])
    for number, row in enumerate(rows if isinstance(rows, list) else [None]):
        if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
            raise UserError(f'{path} is damaged: row {number} of its history is none')
        _counted(path, 'epoch', row.get('epoch'))
        if not isinstance(row.get(metric), (int, float, type(None))):
            raise UserError(f'{path} is damaged: its {metric} is {shown(repr(row[metric]))}')
    return list(rows)
