"""The root mean square norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops.backends import find
from vim_timm.ops.operands import Norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (RMSNorm, arXiv 1910.07467, eq. 4).

    Args:
        x: (..., C).
        weight: (C), in x's dtype.
        eps: Added to the mean.

    Returns:
        The shape and dtype of x.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # torch's older exporter knows no aten norm
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        if not torch.compiler.is_compiling():  # torch.compile fuses aten's norm with its neighbours
            norm = Norm(x, weight, eps)
            run = find('rms_norm', norm, x)
            if run is not None:
                return run(norm)
    return F.rms_norm(x, weight.shape, weight, eps)
