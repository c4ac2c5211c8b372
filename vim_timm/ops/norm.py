"""The root mean square norm on the CPU kernel where that is the backend, else aten's."""

import torch
import torch.nn.functional as F

from vim_timm.ops import cpu
from vim_timm.ops.dispatch import choose, get_scan_backend


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (RMSNorm, arXiv 1910.07467, eq. 4).

    Args:
        x: (..., C).
        weight: (C), in x's dtype.
        eps: Added to the mean.

    Returns:
        The shape and dtype of x.
    """
    if not torch.jit.is_scripting():
        # torch.compile fuses aten's norm with its neighbours.
        if x.device.type == 'cpu' and not torch.compiler.is_compiling() and get_scan_backend() in ('auto', 'cpu'):
            if choose(x, weight) == 'cpu':
                return cpu.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)
