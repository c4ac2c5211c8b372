"""A state space branch and an attention branch on the same tokens, mixed by a learned weight."""

from typing import Any, Literal, Set

import torch
import torch.nn as nn
from timm.layers import register_notrace_function, register_notrace_module

from vim_timm.layers.block import wants_layout
from vim_timm.layers.draw import draw_linear
from vim_timm.layers.norm import at_least_float32
from vim_timm.layers.token_order import Layout

torch.fx.wrap('blend')  # it decides by tensors, which a tracer has not


@register_notrace_function
def blend(x: torch.Tensor, y: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """w * y + (1 - w) * x with w = sigmoid(mix); in float32 where a wrapped layer keeps one so under autocast."""
    if x.dtype != y.dtype:
        x, y = at_least_float32(x), at_least_float32(y)
    return torch.lerp(x, y, mix.sigmoid().to(y.dtype))


@register_notrace_module  # its branches decide by tensors what runs
class Hybrid(nn.Module):
    """w * ssm(x) + (1 - w) * attention(x) with w = sigmoid(mix), (B, L, C) -> (B, L, C)."""

    __constants__ = ['ssm_wants_layout']

    def __init__(
        self,
        dim: int,
        ssm: nn.Module,
        attention: nn.Module,
        mix: Literal['scalar', 'channel'] = 'scalar',
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C of the tokens.
            ssm: A mixer as `layers.block` describes it.
            attention: (B, L, C) -> (B, L, C).
            mix: One learned weight ('scalar'), or one for every channel ('channel'); both begin at equal shares.

        Raises:
            ValueError: unknown `mix`.
        """
        super().__init__()
        if mix not in ('scalar', 'channel'):
            raise ValueError(f"mix must be 'scalar' or 'channel', not {mix!r}")
        self.ssm = ssm
        self.attention = attention
        self.ssm_wants_layout = wants_layout(ssm)
        self.mix = nn.Parameter(torch.empty(1 if mix == 'scalar' else dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give both branches equal shares."""
        nn.init.zeros_(self.mix)

    def init_weights(self, depth: int, scheme: str) -> None:
        """Draw the branches anew, for a model of `depth` blocks."""
        init = getattr(self.ssm, 'init_weights', None)
        if init is not None:
            init(depth, scheme)
        for module in self.attention.modules():
            if isinstance(module, nn.Linear):
                draw_linear(module)

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that weight decay must leave alone."""
        own: Any = getattr(self.ssm, 'no_weight_decay', set)
        return {'mix'} | {f'ssm.{name}' for name in own()}

    @torch.jit.ignore
    def casts_operand(self) -> bool:
        """Whether the state space branch wants tokens as autocast would cast them; attention's product casts too."""
        casts: Any = getattr(self.ssm, 'casts_operand', None)
        return casts is not None and casts()

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        if self.ssm_wants_layout:
            y = self.ssm(x, layout)
        else:
            y = self.ssm(x)
        return blend(self.attention(x), y, self.mix)
