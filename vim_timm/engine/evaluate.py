"""Evaluation that counts every sample exactly once, on any number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..data import Batch, Loader
from ..errors import Preempted
from ..settings import Process
from ..tasks import Task
from .log import Progress, Speed
from .process import any_rank

Metric = Callable[[torch.Tensor, torch.Tensor], float]
Predicted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # outputs, targets, places in the data set


class Watch(NamedTuple):
    """Who follows an evaluation while it runs.

    Attributes:
        progress: where to show how far it is.
        speed: counts the samples.
        signals: of `catch_signals`; the evaluation ends early when one comes to any rank.
    """

    progress: Progress
    speed: Speed
    signals: Sequence[int] = ()


def readable(batch: Batch) -> Batch:
    """The samples of a batch that could be read."""
    if batch.complete:
        return batch
    known = batch.places >= 0
    return Batch(batch.images[known], batch.targets[known], batch.keys[known])


def predict(task: Task, batch: Batch, process: Process, ema: bool = False) -> Any:
    """What the task predicts for a batch; tensors in float32."""
    with torch.inference_mode(), process.autocast():
        output = task.predict(batch, ema)
    return output.float() if isinstance(output, torch.Tensor) else output


def predictions(task: Task, loader: Loader, process: Process, ema: bool = False) -> Iterator[tuple[Any, Batch]]:
    """What the task predicts for this rank's samples (float32, for tensors), and the batches, in order.

    Samples that could not be read are left out.

    Args:
        ema: predict with the average of the weights.
    """
    task.eval()
    for batch in loader.epoch(0):
        batch = readable(batch)
        if len(batch.keys):
            yield predict(task, batch, process, ema), batch


def _gather(parts: Sequence[Predicted], world_size: int) -> Predicted:
    """Outputs, targets and places of all ranks on the CPU, in the data set's order."""
    mine = tuple(torch.cat(tensors) for tensors in zip(*parts))
    everything: list[Any] = [mine]
    if world_size > 1:
        everything = [None] * world_size
        dist.all_gather_object(everything, mine)
    shares = filter(None, everything)  # a rank may have no sample
    outputs, targets, places = (torch.cat(tensors) for tensors in zip(*shares))
    order = places.argsort()
    return outputs[order], targets[order], places[order]


def evaluate(
    task: Task, loader: Loader, process: Process, ema: bool = False, metrics: Mapping[str, Metric] | None = None,
    on_all: Callable[[Predicted], Any] | None = None, watch: Watch | None = None,
) -> dict[str, float]:  # fmt: skip
    """The task's metrics and the number of samples (`count`) over the whole split, the same on every rank.

    Args:
        ema: evaluate the average of the weights.
        metrics: further ones, each a function of all outputs (N, ...) and targets (N, ...) on the CPU.
        on_all: called once on every rank with all outputs (N, ...), targets (N, ...) and places (N,) on the CPU, in the
            data set's order.

    Where an output is no number or infinite, so is no metric a number: the largest of such outputs is any of them.

    Raises:
        Preempted: a signal came.
    """
    evaluator, steps, count = task.create_evaluator(), len(loader), 0
    broken = torch.zeros((), dtype=torch.int64, device=process.device)
    parts: list[Predicted] = []
    on_gpu = process.device.type == 'cuda'
    if watch:
        watch.progress.wait_for(f'{loader.awaited} to evaluate')
    for step, (output, batch) in enumerate(predictions(task, loader, process, ema), 1):
        evaluator.update(output, batch.targets)
        if isinstance(output, torch.Tensor):  # minus infinity is what hides a class
            broken += (~(output < torch.inf)).reshape(len(output), -1).any(1).sum()
        if metrics or on_all:
            kept = (output, batch.targets, batch.places)
            parts.append(tuple(part.to('cpu', non_blocking=on_gpu) for part in kept))  # type: ignore[arg-type]
        count += len(batch.keys)
        if watch is None:
            continue
        watch.speed.update(len(batch.keys))
        watch.progress.wait_for('') if step == 1 else None
        if watch.progress.due(step):
            known = task.describe(evaluator.summary(), [evaluator.default_metric])
            watch.progress.show('  '.join(filter(None, (f'evaluation [{step}/{steps}]', known, str(watch.speed)))))
        if watch.signals:  # the other ranks learn of it when they are done
            break
    if watch:
        watch.progress.wait_for('')
    if any_rank(bool(watch and watch.signals), process):
        raise Preempted('stopped by a signal in an evaluation: start it again')
    loader.unreadable.share(process.world_size)
    result = dict(evaluator.compute(distributed=process.world_size > 1))
    total = torch.stack([torch.full_like(broken, count), broken])
    if process.world_size > 1:
        dist.all_reduce(total)
    count, wrong = map(int, total.tolist())
    if metrics or on_all:
        if on_gpu:
            torch.cuda.synchronize(process.device)  # once, not for every batch
        outputs, targets, places = _gather(parts, process.world_size)
        if on_all:
            on_all((outputs, targets, places))
        result.update({name: float(metric(outputs, targets)) for name, metric in (metrics or {}).items()})
    if wrong:
        result = dict.fromkeys(result, math.nan)
        if watch:
            watch.progress.say(
                f'outputs are not finite for {wrong} of {count} images, and no metric counts: the weights are broken, '
                'or too large for the precision (--amp-dtype bfloat16, or none)'
            )
    return {**result, 'count': count}
