"""Registers a kernel's operator with torch: what runs, what fake tensors see, its gradient as a second operator."""

import contextlib
from typing import Any, Callable

import torch


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels decide their own precision, whatever autocast says on x's device."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def register(
    library: torch.library.Library,
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    run_backward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    refuse_second_derivative: Callable[..., Any],
) -> None:
    """Gives `vim_timm::NAME` and `vim_timm::NAME_backward`, which `library` has defined, their implementations.

    Args:
        save: Autograd's `setup_context`.
        differentiate: Autograd's `backward`, which calls NAME_backward.
    """
    backward = f'{name}_backward'
    library.impl(name, run, 'CompositeExplicitAutograd')
    library.impl(backward, run_backward, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'vim_timm::{name}', fake, lib=library)
    torch.library.register_fake(f'vim_timm::{backward}', fake_backward, lib=library)
    torch.library.register_autograd(f'vim_timm::{name}', differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(f'vim_timm::{backward}', refuse_second_derivative, lib=library)
