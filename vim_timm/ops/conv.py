"""The depthwise causal convolution with SiLU, in one direction or both."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from vim_timm.ops.backends import require
from vim_timm.ops.operands import Conv, Taps
from vim_timm.ops.plain import export
from vim_timm.ops.registration import autocast_off


def bidirectional_conv(x: Tensor, forward: Taps, backward: Taps) -> Tuple[Tensor, Tensor]:
    """SiLU of x's depthwise causal convolution, from the first token forward and from the last token backward.

    Args:
        x: Tokens (B, L, D).
        forward: See `operands.Taps`.
        backward: The same.

    Returns:
        Two (B, L, D) in x's dtype.
    """
    if torch.jit.is_scripting():
        y, y_b = export.conv(Conv(x, forward, backward, True))
    else:
        y, y_b = run(Conv(x, forward, backward))
    assert y_b is not None
    return y, y_b


def causal_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The forward direction of `bidirectional_conv` alone, (B, L, D) -> (B, L, D)."""
    if torch.jit.is_scripting():
        y, _ = export.conv(Conv(x, Taps(weight, bias), None, True))
    else:
        y, _ = run(Conv(x, Taps(weight, bias)))
    return y


def run(conv: Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """`reference.conv` on the chosen backend."""
    cell = require('conv', conv, conv.x)
    with autocast_off(conv.x):
        return cell(conv)
