"""A residual block over any mixer of tokens.

A mixer is an nn.Module (B, L, C) -> (B, L, C), or (B, L, C), `Layout` -> (B, L, C) if its forward has a parameter named
`layout`. What is its own it may say by methods:

* `init_weights(depth, scheme)` draws its parameters anew, for a model of `depth` blocks; '' is the usual scheme;
* `no_weight_decay()` is the set of its parameters that weight decay must leave alone;
* `casts_operand()` says that its first product is a plain one, so that the normed tokens may come in the dtype to which
  autocast would cast them, and nobody need hold them in another. An MLP may say that too.
"""

import inspect
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerScale

from vim_timm.layers.autocast import as_product_operand
from vim_timm.layers.norm import fused_add_norm
from vim_timm.layers.token_order import Layout

torch.fx.wrap('as_product_operand')  # it decides by a tensor, which a tracer has not


def wants_layout(mixer: nn.Module) -> bool:
    """Whether a mixer's forward takes the layout of its tokens."""
    return 'layout' in inspect.signature(mixer.forward).parameters


class Block(nn.Module):
    """x + drop_path(scale(mixer(norm(x)))), then the same with the MLP if there is one; x is the residual stream."""

    __constants__ = ['wants_layout']  # a subclass's own annotations would hide Final ones

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: Optional[nn.Module] = None,
        norm_layer: Callable[..., nn.Module] = nn.RMSNorm,
        init_values: Optional[float] = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Width C of the tokens.
            mixer: Mixes tokens, see the module.
            mlp: Maps every token, (B, L, C) -> (B, L, C), None for none.
            norm_layer: Makes a norm from a width.
            init_values: Initial layer scale, None for none.
            drop_path: Rate at which an image skips the mixer, and the MLP, in training.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values=init_values, **dd)

        def drop() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.wants_layout = wants_layout(mixer)
        self.norm = norm_layer(dim, **dd)
        self.mixer = mixer
        self.ls = scale()
        self.drop_path = drop()
        self.norm2 = None if mlp is None else norm_layer(dim, **dd)
        self.mlp = mlp
        self.ls2 = None if mlp is None else scale()
        self.drop_path2 = None if mlp is None else drop()

    def _normed(
        self, norm: nn.Module, x: torch.Tensor, y: Optional[torch.Tensor], layer: Any
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """x + y, or x itself without y, and its norm for a layer that follows."""
        asked = getattr(layer, 'casts_operand', None)
        for_product = asked is not None and asked()
        if not isinstance(x, torch.fx.Proxy):
            fused = fused_add_norm(norm, x, y, for_product)
            if fused is not None:
                return fused
        x = x if y is None else x + y
        return x, as_product_operand(norm(x)) if for_product else norm(x)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        if not torch.jit.is_scripting():
            layers: Any = self._modules  # each as an attribute costs the host several times as much
            mixer, mlp = layers['mixer'], layers.get('mlp')
            x, y = self._normed(layers['norm'], x, None, mixer)
            y = mixer(y, layout) if self.wants_layout else mixer(y)
            y = layers['drop_path'](layers['ls'](y))
            if mlp is None:
                return x + y
            x, y = self._normed(layers['norm2'], x, y, mlp)
            return x + layers['drop_path2'](layers['ls2'](mlp(y)))
        y = self.norm(x)
        if self.wants_layout:
            y = self.mixer(y, layout)
        else:
            y = self.mixer(y)
        x = x + self.drop_path(self.ls(y))
        if self.mlp is not None and self.norm2 is not None and self.ls2 is not None and self.drop_path2 is not None:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x
