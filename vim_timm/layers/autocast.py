"""The dtype in which autocast computes matrix products."""

import torch
from timm.layers import register_notrace_function

from vim_timm.ops.registration import autocast_dtype


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype to which autocast casts a float32 x for a product; of any other x, or without autocast, its own."""
    if x.dtype == torch.float32 and not x.is_meta:
        return autocast_dtype(x) or x.dtype
    return x.dtype


@register_notrace_function
def as_product_operand(x: torch.Tensor) -> torch.Tensor:
    """x in its `product_dtype`, if that is another by one contiguous copy.

    A linear layer casts too, but then its caller still holds x.
    """
    if not torch.jit.is_scripting():
        dtype = product_dtype(x)
        if dtype != x.dtype:
            return x.to(dtype, memory_format=torch.contiguous_format)
    return x
