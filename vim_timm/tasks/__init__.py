"""What a run trains: a task owns its loss, what is evaluated, and the names and direction of the metrics.

`make_task` builds the one that the settings name; `base.Task` says what the loop asks of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import TrainingTask

from ..settings import Process, Settings
from . import classification, masked
from .base import Task, adopt

__all__ = ['Task', 'adopt', 'make_task']


def make_task(
    settings: Settings, process: Process, model: torch.nn.Module, data_config: dict[str, Any],
    loss: torch.nn.Module | None = None, custom: Callable[[torch.nn.Module, Any], TrainingTask] | None = None,
) -> Task:  # fmt: skip
    """The task that the settings name, around a model on its device.

    Args:
        data_config: input_size, mean and std of the images.
        loss: called with (output, target), in place of the one that the settings name.
        custom: `custom(model, settings)` returns a task in place of all this.
    """
    if custom:
        task = adopt(custom(model, settings))
    elif settings.mae:
        return masked.make_task(settings, process, model, data_config)
    else:
        task = classification.make_task(settings, process, model, data_config, loss)
    task.linear_probe = settings.linear_probe
    if task.mixup is None:
        task.mixup = classification.make_mixup(settings, multi_label=getattr(task, 'multi_label', False))
        task.mixup_off_epoch = settings.mixup_off_epoch
    return task
