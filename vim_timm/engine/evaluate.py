"""Evaluation that counts every image exactly once, on any number of ranks."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator

from ..data import Loader
from ..errors import Preempted
from .log import Progress, Speed
from .setup import any_rank, autocast

Metric = Callable[[torch.Tensor, torch.Tensor], float]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits, targets, places in the data set


def predictions(model: torch.nn.Module, loader: Loader, args: argparse.Namespace) -> Iterator[Batch]:
    """Logits (B, classes) in float32, targets (B,) and places in the data set (B,) of this rank's images, in order.

    Images that could not be read have target -1 and are left out.
    """
    model.eval()
    seen = 0
    for images, targets in loader.epoch(0):
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(args):
            logits = model(images)
        known = targets >= 0
        places = args.rank + args.world_size * torch.arange(seen, seen + len(targets), device=targets.device)
        seen += len(targets)
        yield logits.float()[known], targets[known], places[known]


def _gather(parts: Sequence[Batch], world_size: int) -> Batch:
    """Logits, targets and places of all ranks on the CPU, in the data set's order."""
    mine = tuple(torch.cat(tensors) for tensors in zip(*parts))
    everything: list[Any] = [mine]
    if world_size > 1:
        everything = [None] * world_size
        dist.all_gather_object(everything, mine)
    shares = filter(None, everything)  # a rank may have no image
    logits, targets, places = (torch.cat(tensors) for tensors in zip(*shares))
    order = places.argsort()
    return logits[order], targets[order], places[order]


def evaluate(
    model: torch.nn.Module, loader: Loader, args: argparse.Namespace, metrics: Mapping[str, Metric] | None = None,
    on_all: Callable[[Batch], Any] | None = None, progress: Progress | None = None, speed: Speed | None = None,
    signals: Sequence[int] = (),
) -> dict[str, float]:  # fmt: skip
    """Loss, top-1 and top-5 (percent) and the number of images over the whole split, the same on every rank.

    Args:
        metrics: further ones, each a function of all logits (N, classes) and targets (N,) on the CPU.
        on_all: called once on every rank with all logits (N, classes), targets (N,) and places (N,) on the CPU, in the
            data set's order.
        progress: where to show how far it is.
        speed: counts the images.
        signals: of `catch_signals`; end early when one comes to any rank.

    Raises:
        Preempted: a signal came.
    """
    evaluator, speed, steps = ClassificationEvaluator(args.torch_device), speed or Speed(args, len(loader)), len(loader)
    parts = []
    for step, (logits, targets, places) in enumerate(predictions(model, loader, args), 1):
        evaluator.update(logits, targets)
        if metrics or on_all:
            parts.append((logits.cpu(), targets.cpu(), places.cpu()))
        speed.update(len(targets))
        if progress and progress.due(step):
            progress.show(f'evaluation [{step}/{steps}]  top-1 {evaluator.summary()["top1"]:.2f} %  {speed}')
        if signals:  # the other ranks learn of it when they are done
            break
    if any_rank(bool(signals), args):
        raise Preempted('stopped by a signal in an evaluation: start it again')
    distributed = args.world_size > 1
    result = dict(evaluator.compute(distributed=distributed))
    if distributed:
        dist.all_reduce(evaluator.counts)
    result['count'] = int(evaluator.counts[0])
    if metrics or on_all:
        logits, targets, places = _gather(parts, args.world_size)
        if on_all:
            on_all((logits, targets, places))
        result.update({name: float(metric(logits, targets)) for name, metric in (metrics or {}).items()})
    return result
