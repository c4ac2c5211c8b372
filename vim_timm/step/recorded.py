"""A whole step as one CUDA graph: forward, backward, clipping, update and average in one launch."""

from collections.abc import Callable
from typing import Any

import torch
from timm.task import TrainingTask

from ..data import Batch
from ..data.copies import to_device
from ..errors import UserError, explain
from ..settings import Process, Settings
from .average import Average
from .optimizers import skips_on_device
from .update import Update

WARM = 3  # steps before the one that is recorded: kernels are tuned and states made in them


def why_not(settings: Settings, process: Process, task: TrainingTask, optimizer: torch.optim.Optimizer) -> str:
    """Why a step of this run cannot be recorded, in a sentence; '' where it can."""
    if process.device.type != 'cuda':
        return f'--cuda-graph records launches of a CUDA device, not of {process.device}'
    if process.world_size > 1:
        return '--cuda-graph records the step of one process: leave it out where there are several'
    if settings.grad_checkpointing:
        return '--cuda-graph cannot record --grad-checkpointing, which saves random states on the host'
    if not skips_on_device(optimizer):
        return f'--cuda-graph cannot record --opt {settings.opt}, for which the host waits; adamw and nadamuon it can'
    if Average(task).waits:
        return '--cuda-graph needs an average of float32 on the device: leave --model-ema-force-cpu out'
    return ''


class Recorded:
    """`recorded(*tensors)`: a function of tensors that is recorded after some calls, and from then on replayed.

    It sees copies of its arguments that stay in place; what it returns is overwritten by the next call. Its random
    numbers follow the device's generator, whose seed and offset a replay reads. On a CPU it is called every time.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.calls = function, 0
        self.inputs: list[torch.Tensor] = []
        self.output: torch.Tensor | None = None
        self.graph: Any = None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The result, a tensor on the device.

        Raises:
            UserError: the function cannot be recorded, or an argument has another shape than before.
        """
        self.inputs = self.inputs or [torch.empty_like(tensor) for tensor in tensors]
        for mine, theirs in zip(self.inputs, tensors):
            if mine.shape != theirs.shape:
                raise UserError(
                    f'--cuda-graph needs batches of one shape, not {tuple(mine.shape)} and {tuple(theirs.shape)}'
                )
            mine.copy_(theirs, non_blocking=True)
        self.calls += 1
        if self.inputs[0].device.type != 'cuda':
            return self.function(*self.inputs)
        if self.calls <= WARM:
            return self._beside()
        if self.graph is None:
            self._record()
        self.graph.replay()
        assert self.output is not None
        return self.output

    def _beside(self) -> torch.Tensor:
        """Call it on another stream, as a recording will."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.function(*self.inputs)
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    def _record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with explain('--cuda-graph cannot record this step, leave it out'):
            # threads of the loader may go on with calls of their own
            with torch.cuda.graph(self.graph, capture_error_mode='thread_local'):
                self.output = self.function(*self.inputs)


class RecordedStep:
    """`step(batch, number, stop)`: loss and flags of `Update` for a prepared batch, from one launch.

    What is still to be done of the batch's images, by its `draws` and `mixing`, is a part of it.

    Learning rates, the weight of the average and the share of a step in its update are inputs on the device; whatever
    else of the optimizer's parameter groups the host changes later is not seen.

    Args:
        forward_backward: `forward_backward(batch, group)` accumulates the gradients of a batch, one of `group` () of an
            update, and returns its loss.
        accumulates: whether an update may have several steps. Their gradients then stay in place, and a step without
            an update is a recording of its own.
    """

    def __init__(
        self, update: Update, forward_backward: Callable[[Batch, torch.Tensor], torch.Tensor], accumulates: bool = False
    ):
        self.update, self.forward_backward = update, forward_backward
        update.keeps = accumulates
        for group in update.optimizer.param_groups:
            if 'capturable' in group:
                group['capturable'] = True
        self.recorded, self.part = Recorded(self._whole), Recorded(self._part)
        self.names: list[str] = []  # of the batch's tensors
        self.size: tuple[int, int] | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; those that a checkpoint brings are others."""
        return self.update.optimizer.param_groups

    def __call__(
        self, batch: Batch, number: int, stop: bool, finite: torch.Tensor, group: int = 1, last: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss () of a step, and flags (2,) of update `number` where the step is its last.

        Args:
            finite: () bool, whether the losses of the update's steps before this one are.
            group: how many steps the update has.
        """
        rates = [float(group['lr']) for group in self.groups]
        numbers = [*rates, self.update.average.weight(number), float(stop), float(group)]
        controls = to_device(numbers, batch.images.device)
        self.names = [name for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)]
        self.size = batch.size
        recorded = self.recorded if last else self.part
        result = recorded(controls, finite, *(getattr(batch, name) for name in self.names))
        return result[0], result[1:]

    def _part(self, controls: torch.Tensor, finite: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        tensors: dict[str, Any] = dict(zip(self.names, parts))
        return self.forward_backward(Batch(**tensors, size=self.size), controls[-1]).float()[None]

    def _whole(self, controls: torch.Tensor, finite: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        loss = self._part(controls, finite, *parts)
        rates = [group['lr'] for group in self.groups]
        for group, rate in zip(self.groups, controls):
            group['lr'] = rate
        try:
            flags = self.update(finite & torch.isfinite(loss[0]), controls[-3], controls[-2])
        finally:
            for group, known in zip(self.groups, rates):
                group['lr'] = known
        return torch.cat([loss, flags])
