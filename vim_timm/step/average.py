"""timm's moving average of the weights in a few multi-tensor launches, left alone where the device says so."""

from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, unwrap_model


class Average:
    """The average of a task's weights.

    Attributes:
        waits: whether whoever calls it must know on the host that the update is good: it is kept on another device, in
            two bytes with random rounding, or updated by a method of the task's own.
    """

    def __init__(self, task: TrainingTask):
        self.task = task
        average: Any = task.get_trainable_module(ema=True)
        self.pairs: list[list[torch.Tensor]] | None = None
        plain = type(task).update_ema is TrainingTask.update_ema and type(average) is ModelEmaV3
        if plain and average.foreach and not average.exclude_buffers:
            model: Any = unwrap_model(task.get_trainable_module())
            # in timm's order; a task that is its own trainable module has its average behind it
            values = zip(average.module.state_dict().values(), model.state_dict().values())
            self.pairs = [list(tensors) for tensors in zip(*values)]
            floating = [tensor for tensors in self.pairs for tensor in tensors if tensor.is_floating_point()]
            if len({(tensor.device, tensor.dtype) for tensor in floating} | {(floating[0].device, torch.float32)}) > 1:
                self.pairs = None
        self.waits = average is not None and self.pairs is None

    def weight(self, number: int) -> float:
        """How far update `number` moves the average towards the weights; 0 where there is none."""
        average: Any = self.task.get_trainable_module(ema=True)
        return 0.0 if self.pairs is None else 1 - average.get_decay(number)

    @torch.no_grad()
    def update(self, number: int, weight: float | torch.Tensor, bad: torch.Tensor) -> None:
        """Move the average by `weight` after update `number`, unless `bad` () is 1."""
        if self.pairs is None:
            if self.waits:
                average: Any = self.task.get_trainable_module(ema=True)
                rounding = getattr(average, '_sr_generator', None)
                if rounding is not None:  # a resumed run has none of the draws before it
                    rounding.manual_seed(average.stochastic_rounding_seed + number)
                self.task.update_ema(step=number)
            return
        averages, weights = ([t for t in tensors if t.is_floating_point()] for tensors in self.pairs)
        steps = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(steps, weight * (1 - bad))
        torch._foreach_add_(averages, steps)
        for mine, theirs in zip(*self.pairs):
            if not mine.is_floating_point():
                mine.copy_(torch.where(bad > 0, mine, theirs))
