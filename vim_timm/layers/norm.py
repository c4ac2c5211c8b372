"""Norms of a residual stream that is float32 whatever the parameters are."""
from typing import Callable, Dict, Type

import torch
import torch.nn as nn
import torch.nn.functional as F


class RmsNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 at least, returned in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, in float32 at least, returned in the weight's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return y.to(self.weight.dtype)


NORM_LAYERS: Dict[str, Type[nn.Module]] = {'rmsnorm': RmsNorm, 'layernorm': LayerNorm}


def get_norm_layer(name: str) -> Callable[..., nn.Module]:
    """The norm named 'rmsnorm' or 'layernorm'.

    Raises:
        ValueError: another name.
    """
    if name not in NORM_LAYERS:
        raise ValueError(f"norm_layer must be one of {', '.join(NORM_LAYERS)}, not {name!r}")
    return NORM_LAYERS[name]
