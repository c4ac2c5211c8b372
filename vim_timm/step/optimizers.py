"""Which optimizers update all tensors at once, and skip an update that the device calls bad."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import get_optimizer_info

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
CHOICES = ('fused', 'foreach', 'capturable', 'differentiable')


def fused_arguments(name: str, device: torch.device, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make timm's optimizer `name` a fused one of torch's, where it can be.

    Args:
        chosen: the optimizer's arguments that somebody chose; one that names an implementation is left in force.
    """
    if device.type not in ('cpu', 'cuda') or any(choice in chosen for choice in CHOICES) or chosen.get('dampening'):
        return {}
    try:
        kind = get_optimizer_info(name.lower().rpartition('_')[2]).opt_class  # lookahead_NAME wraps NAME
    except ValueError:
        return {}  # the factory says that there is none
    return {'fused': True} if kind in FUSED else {}


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` leaves all as it is where the tensor `optimizer.found_inf` () is 1, as torch's fused ones do."""
    return getattr(optimizer, '_step_supports_amp_scaling', False)


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Put the state of a fused optimizer as its kernel takes it, before the first update; others are left alone.

    torch's fused SGD takes new memory for its momentum and fills it in the first update, even if that is skipped. And
    its CPU kernels walk over all tensors in memory's order, which a checkpoint of another layout does not have.
    """
    if not (isinstance(optimizer, FUSED) and skips_on_device(optimizer)):
        return
    for group in optimizer.param_groups:
        for parameter in group['params']:
            state = optimizer.state[parameter] if group.get('momentum') else optimizer.state.get(parameter, {})
            if group.get('momentum') and state.get('momentum_buffer') is None:
                state['momentum_buffer'] = torch.zeros_like(parameter)
            for name, value in state.items():
                if value is not None and value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
