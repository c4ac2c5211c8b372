"""Registers a kernel's operator with torch: what runs, what fake tensors see, its gradient as a second operator."""

import contextlib
from typing import Any, Callable

import torch


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels decide their own precision, whatever autocast says on x's device."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def differentiable(
    operator: torch._ops.OpOverload, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator as autograd calls it. `torch.library.register_autograd` does the same, but takes the host a tenth of
    a millisecond for a call with twenty operands."""
    several = isinstance(operator._schema.returns[0].type, torch.ListType)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        save(ctx, inputs, output)
        return tuple(output) if several else output  # autograd would not look into a list

    methods = {'forward': staticmethod(forward), 'backward': staticmethod(differentiate)}
    function: Any = type(operator.name(), (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            output = function.apply(*inputs)
            return list(output) if several else output
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return call


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
    """Gives `vim_timm::NAME` and `vim_timm::NAME_backward`, which `library` has defined without defaults and without
    operands that go by keyword only, their implementations.

    Args:
        save: Keeps what `differentiate` needs, from autograd's context, the operands and the output.
        differentiate: Autograd's `backward`, which calls NAME_backward.
    """
    for operator, kernel, meta, keep, gradient in (
        (name, run, fake, save, differentiate),
        (f'{name}_backward', run_backward, fake_backward, lambda *_: None, refuse_second_derivative),
    ):
        library.impl(operator, kernel, 'CompositeExplicitAutograd')
        torch.library.register_fake(f'vim_timm::{operator}', meta, lib=library)
        overload = getattr(torch.ops.vim_timm, operator).default
        library.impl(operator, differentiable(overload, keep, gradient), 'Autograd')
