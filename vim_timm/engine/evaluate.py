"""Evaluation that counts every image exactly once, on any number of ranks."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator

from ..data import Loader
from .setup import autocast

Metric = Callable[[torch.Tensor, torch.Tensor], float]


def predictions(
    model: torch.nn.Module, loader: Loader, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (B, classes) in float32 and targets (B,) of this rank's images, batch by batch, in order.

    Images that could not be read have target -1 and are left out.
    """
    model.eval()
    for images, targets in loader.epoch(0):
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(args):
            logits = model(images)
        known = targets >= 0
        yield logits.float()[known], targets[known]


def evaluate(
    model: torch.nn.Module,
    loader: Loader,
    args: argparse.Namespace,
    metrics: Mapping[str, Metric] | None = None,
    on_batch: Callable[[int, ClassificationEvaluator], Any] | None = None,
) -> dict[str, float]:
    """Loss, top-1 and top-5 (percent) and the number of images over the whole split, the same on every rank.

    Args:
        metrics: further ones, each a function of all logits (N, classes) and targets (N,) on the CPU.
        on_batch: called with the number of batches so far and the counts of this rank.
    """
    evaluator = ClassificationEvaluator(args.torch_device)
    outputs, labels = [], []
    for step, (logits, targets) in enumerate(predictions(model, loader, args), 1):
        evaluator.update(logits, targets)
        if metrics:
            outputs.append(logits.cpu())
            labels.append(targets.cpu())
        if on_batch:
            on_batch(step, evaluator)
    distributed = args.world_size > 1
    result = dict(evaluator.compute(distributed=distributed))
    count = evaluator.counts[0].clone()
    if distributed:
        dist.all_reduce(count)
    result['count'] = int(count)
    if metrics:
        everything: list[Any] = [(torch.cat(outputs), torch.cat(labels))]
        if distributed:
            everything = [None] * args.world_size
            dist.all_gather_object(everything, (torch.cat(outputs), torch.cat(labels)))
        logits, targets = (torch.cat([part[i] for part in everything]) for i in range(2))
        result.update({name: float(metric(logits, targets)) for name, metric in metrics.items()})
    return result
