"""What the training loop and an evaluation ask of a task, on top of timm's `TrainingTask`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.data import Mixup
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch
from ..data.copies import to_device
from ..models.load import classifiers
from . import mixing

# of timm's evaluators
PERCENTAGES = ('top1', 'top5', 'map', 'micro_f1', 'macro_f1', 'sample_f1')
LABELS = {'top1': 'top-1', 'top5': 'top-5'}


class Task(TrainingTask):
    """timm's `TrainingTask` with what it lacks; the defaults here are those of a supervised task.

    timm's methods keep their meaning: `create_evaluator` has the metrics (`metric_names`, `default_metric`; `update`,
    `summary`, `compute`), `get_trainable_module` what the optimizer and the average see, `get_eval_model` what a
    checkpoint's `state_dict` is, `get_task_state` and `load_task_state` what a checkpoint has beside it.

    Attributes:
        lower_is_better: metrics of which less is better, besides all whose name contains `loss`.
        percentages: metrics that are written as `12.34 %`.
        mixup: timm's `Mixup`, applied to every training batch before the epoch `mixup_off_epoch` (0: in all).
        linear_probe: whether only the classifier trains, on features as evaluation has them.
    """

    lower_is_better: tuple[str, ...] = ()
    percentages: tuple[str, ...] = PERCENTAGES
    mixup: Mixup | None = None
    mixup_off_epoch = 0
    linear_probe = False

    def train(self, mode: bool = True) -> 'Task':
        """Training or evaluation mode."""
        super().train(mode)
        if self.linear_probe:
            model: Any = unwrap_model(self.get_eval_model())
            model.eval()
            for head in classifiers(model):
                head.train(mode)
        return self

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """A training batch with what is drawn on the host for all of it: the numbers of mixup.

        Python's, NumPy's and torch's generators are seeded from (seed, epoch, step, rank) before it is called. The
        images are done where a task has a method of its own in place of this one.
        """
        if self.mixup is None:
            return batch
        self.mixup.mixup_enabled = not (self.mixup_off_epoch and epoch >= self.mixup_off_epoch)
        size = batch.size or (batch.images.shape[2], batch.images.shape[3])
        numbers = mixing.draw(self.mixup, len(batch.images), size)
        return batch._replace(mixing=to_device(numbers, batch.images.device))

    def mixed(self, batch: Batch) -> Batch:
        """A prepared batch of images that are done, after mixup: work of the device alone."""
        if self.mixup is None or batch.mixing is None:
            return batch
        images, targets = mixing.mix(self.mixup, batch.mixing, batch.images, batch.targets)
        return batch._replace(images=images, targets=targets, mixing=None)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss () of a prepared, mixed batch; what is random in it and differs by sample follows `batch.keys`."""
        return self(batch.images, batch.targets)['loss']

    def predict(self, batch: Batch, ema: bool = False) -> Any:
        """What the evaluator takes as output for a batch, from the trained weights or their average."""
        model: Any = self.get_eval_model(ema=ema)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        return model(batch.images)

    def decreasing(self, metric: str) -> bool:
        """Whether less of a metric is better."""
        return 'loss' in metric or metric in self.lower_is_better

    def describe(self, result: Mapping[str, float], names: Iterable[str] | None = None) -> str:
        """Metrics in words for the console, all or some of them."""
        shown = [name for name in names or result if name in result]
        return '  '.join(f'{LABELS.get(name, name)} {self.number(name, result[name])}' for name in shown)

    def number(self, metric: str, value: float) -> str:
        """A metric's value in words."""
        return f'{value:.2f} %' if metric in self.percentages else f'{value:{".4f" if "loss" in metric else ".4g"}}'

    def end_epoch(self, trainer: Any) -> None:
        """Called on every rank when an epoch's evaluation, checkpoint and log are done, with the Trainer."""


def adopt(task: TrainingTask) -> Task:
    """Give a task of timm's library, or one written for it, the methods of `Task`."""
    if not isinstance(task, Task):
        task.__class__ = type(type(task).__name__, (type(task), Task), {})
    return task  # type: ignore[return-value]
