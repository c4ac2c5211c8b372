"""The root mean square norm, alone and of a sum."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops.backends import find
from vim_timm.ops.operands import AddNorm, Norm
from vim_timm.ops.registration import wants_gradient

# numbers of which aten's kernels take an H200 30 to 50 us longer, as a launch of Triton's takes the host
_MANY = 2**23
_PLAIN = (torch.Tensor, torch.nn.Parameter)


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
            both = add_norm(AddNorm(x, None, weight, eps, x.dtype))
            if both is not None:
                return both[1]
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(given: AddNorm) -> Optional[Tuple[Tensor, Tensor]]:
    """x + y, which is x itself without y, and its `rms_norm` in a dtype, in one operator for both gradients.

    Args:
        given: See `operands.AddNorm`. Sums are float32, the weight is of any dtype.

    Returns:
        Two tensors (..., C), the sum in the dtype of x + y; None where no backend has it, in inference under
        torch.compile, which fuses aten's operators, in TorchScript's traces, of tensors of other classes, such as
        sharded ones, and of few numbers in inference, or none.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if torch.jit.is_tracing():
        return None
    tensors = given.x, given.y, given.weight
    if torch.compiler.is_compiling():
        if not wants_gradient(tensors):
            return None
    else:
        numbers = given.x.numel()
        if not numbers or (numbers < _MANY and not wants_gradient(tensors)):
            return None
    for tensor in tensors:
        if tensor is not None and type(tensor) not in _PLAIN:
            return None
    run = find('add_norm', given, given.x)
    return None if run is None else run(given)
