"""Norms of a residual stream that is float32 whatever the parameters are."""

from typing import Callable, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

from vim_timm.layers.autocast import product_dtype
from vim_timm.layers.plain import is_its_class
from vim_timm.ops import AddNorm, add_norm, rms_norm
from vim_timm.ops.registration import as_dtype

# which norm runs is decided outside an FX graph, timm's or another's
register_notrace_function(rms_norm)
register_notrace_function(as_dtype)
torch.fx.wrap('rms_norm')
torch.fx.wrap('at_least_float32')
torch.fx.wrap('as_dtype')


@register_notrace_function
def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is float32 or float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


class RmsNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 at least, returned in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = at_least_float32(x)
        assert self.eps is not None  # nn.RMSNorm allows it
        weight = self.weight  # asked once: a module's attributes cost the host more than the casts
        return as_dtype(rms_norm(x, as_dtype(weight, x.dtype), self.eps), weight.dtype)


def fused_add_norm(
    norm: nn.Module, x: torch.Tensor, y: Optional[torch.Tensor], for_product: bool
) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
    """x + y, or x itself without y, and its norm, by one operator; None where there is none.

    Args:
        for_product: Whether the norm may come in the dtype to which autocast would cast it for a product.
    """
    if type(norm) is not RmsNorm or not is_its_class(norm) or norm.eps is None:
        return None
    weight = norm.weight
    return add_norm(AddNorm(x, y, weight, norm.eps, product_dtype(weight) if for_product else weight.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, in float32 at least, returned in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = at_least_float32(x)
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


NORM_LAYERS: Dict[str, Type[nn.Module]] = {'rmsnorm': RmsNorm, 'layernorm': LayerNorm}


def get_norm_layer(name: str) -> Callable[..., nn.Module]:
    """The norm named 'rmsnorm' or 'layernorm'.

    Raises:
        ValueError: another name.
    """
    if name not in NORM_LAYERS:
        raise ValueError(f'norm_layer must be one of {", ".join(NORM_LAYERS)}, not {name!r}')
    return NORM_LAYERS[name]
