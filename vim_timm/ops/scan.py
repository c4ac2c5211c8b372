"""The bidirectional selective scan."""

from typing import Optional

import torch
from torch import Tensor

from vim_timm.ops.backends import require
from vim_timm.ops.operands import Direction, Scan
from vim_timm.ops.plain import export
from vim_timm.ops.registration import autocast_off


def bidirectional_scan(
    forward: Direction, backward: Optional[Direction], z: Optional[Tensor], scale: float = 1.0
) -> Tensor:
    """Gated sum of a forward and a backward selective scan (Vision Mamba, arXiv 2401.09417, algorithm 1).

    out = scale * SiLU(z) * (scan(forward) + reversed scan(backward)), where each scan computes, with A = -exp(A_log)
    and dt = softplus(delta + delta_bias), h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and y_t = C_t h_t + D u_t. The
    backward scan runs from the last token to the first.

    Args:
        forward: See `operands.Direction`; the dtype of its u is the output's.
        backward: The same, in token order too; None for a forward scan alone.
        z: Gate (B, L, D).
        scale: 0.5 averages the directions.

    Returns:
        (B, L, D). State and arithmetic are float32 (float64 for float64 inputs) under any autocast.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if torch.jit.is_scripting():
        return export.scan(Scan(forward, backward, z, scale, True, True))
    return run(Scan(forward, backward, z, scale))


def run(scan: Scan) -> Tensor:
    """`reference.scan` on the chosen backend."""
    u = scan.forward.u
    cell = require('scan', scan, u)
    with autocast_off(u):
        return cell(scan)
