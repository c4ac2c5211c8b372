"""The dtype in which autocast computes matrix products."""

import torch
from timm.layers import register_notrace_function


@register_notrace_function
def as_product_operand(x: torch.Tensor) -> torch.Tensor:
    """A float32 x as autocast would cast it for a product, by one contiguous copy; any other x, or without autocast, x.

    A linear layer casts too, but then its caller still holds x.
    """
    if not torch.jit.is_scripting():
        if x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type), memory_format=torch.contiguous_format)
    return x
