"""What mixers of state spaces share beside their operators: how step sizes begin, and what a block is told of them."""

import math
from typing import Any, Set

import torch
import torch.nn as nn

from vim_timm.layers.plain import is_plain, weights
from vim_timm.ops import Linear, linear

# range of the initial step size softplus(bias), and its floor (Mamba, arXiv 2312.00752, section 3.6)
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


def draw_step_bias(bias: torch.Tensor) -> None:
    """Fill `bias` so that step sizes softplus(bias) are log-uniform in 0.001 to 0.1."""
    dt = torch.rand_like(bias, dtype=torch.float32)
    dt = torch.exp(dt * math.log(_DT_MAX / _DT_MIN) + math.log(_DT_MIN)).clamp(min=_DT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def draw_out_proj(weight: torch.Tensor, branches: int) -> None:
    """Fill the weight of a last projection, smaller where the residual stream is the sum of more branches."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    with torch.no_grad():
        weight.div_(math.sqrt(branches))


class StateSpaceMixer(nn.Module):
    """A mixer that begins with `in_proj`, and whose own parameters are those of its state space."""

    in_proj: nn.Linear

    def project(self, x_BLC: torch.Tensor) -> torch.Tensor:
        """in_proj's output (B, L, E)."""
        if not torch.jit.is_scripting():
            in_proj: Any = self._modules['in_proj']
            if not isinstance(x_BLC, torch.fx.Proxy) and x_BLC.is_cpu and is_plain(in_proj):
                y_BLE = linear(Linear(x_BLC, *weights(in_proj)))
                if y_BLE is not None:
                    return y_BLE
            return in_proj(x_BLC)
        return self.in_proj(x_BLC)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the state space parameters, which weight decay must leave alone."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    @torch.jit.ignore
    def casts_operand(self) -> bool:
        """Whether in_proj is plain; one that is wrapped or quantized may want float32."""
        layers: Any = self._modules
        return is_plain(layers['in_proj'])
