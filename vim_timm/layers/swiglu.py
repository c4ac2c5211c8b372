"""timm's SwiGLU, whose products and gate are one operator where there is one."""

from typing import Any, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import GluMlp

from vim_timm.layers.plain import is_its_class, is_plain, weights
from vim_timm.ops import SwiGlu, swiglu


class SwiGluMlp(GluMlp):
    """(..., C) -> (..., C): fc2(SiLU(a) b) for [a, b] = fc1(x), as timm's `SwiGLUPacked`, whose parameters it has."""

    def __init__(
        self, dim: int, hidden: int, drop: Union[float, Tuple[float, float]] = 0.0, device=None, dtype=None
    ) -> None:
        """
        Args:
            dim: Width C.
            hidden: Width of each of a and b.
            drop: Dropout of the hidden layer and of the output.
        """
        super().__init__(dim, 2 * hidden, act_layer=nn.SiLU, drop=drop, gate_last=False, device=device, dtype=dtype)

    @torch.jit.ignore
    def casts_operand(self) -> bool:
        """Whether fc1 is plain; one that is wrapped or quantized may want float32."""
        layers: Any = self._modules  # as an attribute it costs the host several times as much
        return is_plain(layers['fc1'])

    def _fused(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """fc2's output in one operator; None where none can."""
        layers: Any = self._modules  # each as an attribute costs the host several times as much
        fc1, act, drop1, norm, fc2 = layers['fc1'], layers['act'], layers['drop1'], layers['norm'], layers['fc2']
        if isinstance(x, torch.fx.Proxy) or not (is_plain(fc1) and is_plain(fc2)):
            return None
        if type(act) is not nn.SiLU or type(norm) is not nn.Identity or type(drop1) is not nn.Dropout:
            return None
        if not (is_its_class(act) and is_its_class(drop1) and is_its_class(norm)):
            return None
        if drop1.training and drop1.p > 0:
            return None
        return swiglu(SwiGlu(x, *weights(fc1), *weights(fc2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            fused = self._fused(x)
            if fused is not None:
                return self.drop2(fused)
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(a) * b))))
