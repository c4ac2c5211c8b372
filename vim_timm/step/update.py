"""An update of the weights that the device takes or leaves, without the host."""

import functools

import torch
import torch.distributed as dist
from timm.utils import dispatch_clip_grad

from ..settings import Process, Settings
from ..tasks import Task
from .average import Average
from .optimizers import prepare, skips_on_device


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm () of all gradients together, in float32 at least."""
    dtype = functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype)))


HOST = ('cpu',)  # devices that the host does not wait for


class Update:
    """`update(finite, number, stop)`: guard, clipping, optimizer, loss scale and average of one update.

    If the loss or a gradient of any rank is not finite, no rank changes its weights, the optimizer's state or the
    average. Where optimizer and average can, the device decides that alone; else the host waits for it, as it does
    where the device is its own.
    """

    def __init__(
        self, settings: Settings, process: Process, task: Task, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ):  # fmt: skip
        self.process, self.task, self.optimizer, self.scaler = process, task, optimizer, scaler
        self.clip, self.clip_mode = settings.clip_grad, settings.clip_mode
        self.average = Average(task)
        self.waits = process.device.type in HOST or self.average.waits or not skips_on_device(optimizer)
        mine = {parameter for group in optimizer.param_groups for parameter in group['params']}
        clipped = {p for p in task.get_clip_parameters(exclude_head='agc' in self.clip_mode) if p.requires_grad}
        self.clips_all = self.clip_mode == 'norm' and clipped == mine
        self.prepared = False
        self.keeps = False  # the gradients' memory, from one update to the next

    @torch.no_grad()
    def __call__(self, finite: torch.Tensor, number: int | torch.Tensor, stop: bool | torch.Tensor) -> torch.Tensor:
        """Update, unless a number is not finite; gradients are gone afterwards.

        Args:
            finite: () bool, whether this rank's losses are.
            number: of updates with this one; or how far the average is to move, () on the device.
            stop: whether this rank is to stop; or the same, 0 or 1, () on the device.

        Returns:
            (2,) float32 on the device, each 0 or 1: whether the update was skipped, whether any rank is to stop.
        """
        if not self.prepared:  # by now a resumed run has loaded its state
            prepare(self.optimizer)
            self.prepared = True
        weight = number if isinstance(number, torch.Tensor) else self.average.weight(number)
        optimizer = self.optimizer
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        norm = total_norm(gradients) if gradients else torch.zeros((), device=finite.device)
        stops = stop if isinstance(stop, torch.Tensor) else torch.full_like(norm, stop)
        flags = torch.stack([(~(finite & torch.isfinite(norm))).float(), stops.float()])
        if self.process.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if not (self.waits and flags[0]):
            self._clip(gradients, norm)
            if not self.waits:
                optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
            optimizer.step()
            self.average.update(int(number) if self.average.waits else 0, weight, flags[0])
        self.scaler.update()
        self.clear()
        return flags

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=not self.keeps)

    def _clip(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        if self.clip is None:
            return
        if self.clips_all:  # torch's clip_grad_norm_, by the norm that is known
            torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        else:
            parameters = self.task.get_clip_parameters(exclude_head='agc' in self.clip_mode)
            dispatch_clip_grad(parameters, self.clip, mode=self.clip_mode)
