"""Compilation of one block for all that are like it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from ..tasks import Task
from ..tasks.masked import MaskedImages

WHOLE = ('reduce-overhead', 'max-autotune')  # modes that record a graph of launches: one for all blocks
MOST_KINDS = 2  # of one class: torch gives up on a function after eight compilations, some of them for evaluations


class _DropPath(nn.Module):
    """timm's DropPath with its rate in a tensor: a number would be compiled anew for every block."""

    keep: torch.Tensor

    def __init__(self, like: nn.Module, device: torch.device):
        super().__init__()
        self.scales = getattr(like, 'scale_by_keep', True)
        keep = torch.tensor(1.0 - getattr(like, 'drop_prob', 0.0), device=device)
        self.register_buffer('keep', keep, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = (torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < self.keep).to(x.dtype)
        return x * (mask / self.keep.to(x.dtype) if self.scales else mask)


def _unify(blocks: list[nn.Module]) -> None:
    """Give all blocks the same kind of drop path, the first one too, whose rate is mostly 0."""
    names = {name for block in blocks for name, module in block.named_modules() if type(module) is DropPath}
    for block in blocks:
        inner = dict(block.named_modules())
        device = next(block.parameters()).device
        for name in names:
            if type(inner.get(name)) in (DropPath, nn.Identity):
                block.set_submodule(name, _DropPath(inner[name], device).train(block.training))


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What decides how often torch compiles a function of such modules: class, weights, switches but drop paths'."""
    switches = (
        (name, key, value)
        for name, inner in module.named_modules()
        for key, value in vars(inner).items()
        if isinstance(value, bool) and key != 'training' and type(inner) not in (DropPath, _DropPath)
    )
    return type(module), *((name, tensor.shape) for name, tensor in module.state_dict().items()), *switches


def regions(model: nn.Module) -> list[nn.Module]:
    """Outermost modules of lists in which at least one more is like them; [] where they are not most of the model."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        children = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            counts = Counter(map(_kind, children))
            alike = [child for child in children if counts[_kind(child)] > 1 and len(list(child.children())) > 1]
            yield from alike
            children = [child for child in children if not any(child is region for region in alike)]
        for child in children:
            yield from walk(child)

    found = list(walk(model))
    inside = sum(p.numel() for region in found for p in region.parameters())
    kinds = Counter(kind[0] for kind in {_kind(region) for region in found})
    most = inside >= 0.8 * sum(p.numel() for p in model.parameters())
    return found if most and max(kinds.values(), default=0) <= MOST_KINDS else []


def compile_task(task: Task, backend: Any, mode: str | None) -> str:
    """Compile what the task trains, block by block where its blocks are alike, and say what the first step waits for.

    torch compiles the function of a block once and takes it for all blocks of its kind.
    """
    ours = type(task).compile in (ClassificationTask.compile, MaskedImages.compile)
    model: Any = unwrap_model(task.get_trainable_module())
    blocks = regions(model) if ours and mode not in WHOLE else []
    if not blocks:
        task.compile(backend=backend, mode=mode)
        return f'the first step waits for {backend} to compile the model'
    _unify(blocks)
    for block in blocks:
        block.compile(backend=backend, mode=mode)
    kinds = len(set(map(_kind, blocks)))
    what = 'one block' if kinds == 1 else f'{kinds} kinds of block'
    return f'the first step waits for {backend} to compile {what}, for all {len(blocks)}'
