"""How the weights of layers begin."""

from typing import Any

import torch.nn as nn


def draw_linear(layer: Any) -> None:
    """Draw the weight of a Linear from a normal of deviation 0.02; its bias is zero, if it has one."""
    nn.init.trunc_normal_(layer.weight, std=0.02)  # truncation at +-2 is absolute, which cuts nothing here
    zero_bias(layer)


def zero_bias(layer: Any) -> None:
    """Set the bias of a layer to zero, if it has one."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
