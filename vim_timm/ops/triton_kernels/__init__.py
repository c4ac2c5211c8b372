"""Fused GPU kernels in Triton: the bidirectional selective scan and the bidirectional causal convolution.

`scan` and `conv` compute what `ops.reference` defines, on NVIDIA GPUs; Triton is imported at the first call.
The kernels were measured on compute capability 9.0 only; they compile for 8.0 to 12.0 (`compile_targets`).
"""

import importlib.util
from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import reference
from .launch import INTERPRET, MAX_STATE

__all__ = ['conv', 'scan', 'unavailable', 'unsupported', 'warmup']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_reason: Optional[str] = None


def unavailable() -> str:
    """Why this process cannot use the kernels, in one sentence, or ''."""
    global _reason
    if _reason is None:
        _reason = _find_reason()
    return _reason


def _find_reason() -> str:
    if importlib.util.find_spec('triton') is None:
        return 'The triton backend needs Triton, which comes with the Linux builds of PyTorch (or: pip install triton).'
    if INTERPRET:
        return ''
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 'The triton backend needs an NVIDIA GPU and a CUDA build of PyTorch; torch.cuda.is_available() is False.'
    if torch.cuda.get_device_capability() < (8, 0):
        return 'The triton backend needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere).'
    return ''


def unsupported(u: Tensor, A: Tensor) -> str:
    """Why the kernels cannot run on tensors like these, in one sentence, or ''."""
    if u.device.type != 'cuda' and not INTERPRET:
        return f'The triton backend runs on CUDA tensors, not on {u.device.type}.'
    if u.dtype not in DTYPES:
        return f'The triton backend takes float32, bfloat16 and float16, not {u.dtype}.'
    if A.shape[-1] > MAX_STATE:
        return f'The triton backend takes d_state up to {MAX_STATE}, not {A.shape[-1]}.'
    if u.shape[0] > 32767:
        return f'The triton backend takes batches up to 32767 (the grid of a GPU), not {u.shape[0]}.'
    return ''


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    u_b: Optional[Tensor],
    delta_b: Optional[Tensor],
    A_b: Optional[Tensor],
    B_b: Optional[Tensor],
    C_b: Optional[Tensor],
    D_b: Optional[Tensor],
    delta_bias_b: Optional[Tensor],
    z: Optional[Tensor],
    scale: float,
    delta_softplus: bool,
    A_is_log: bool,
) -> Tensor:
    """`reference.scan` with float32 states, in u's dtype: (B, L, D) contiguous."""
    from .scan_op import triton_scan

    return triton_scan(
        u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z, scale, delta_softplus,
        A_is_log,
    )[0]  # fmt: skip


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    weight_b: Optional[Tensor],
    bias_b: Optional[Tensor],
    silu: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """`reference.conv` in x's dtype: (B, L, D) contiguous each. Widths over 4 run as plain aten operations."""
    from .conv_op import MAX_WIDTH, triton_conv

    if weight.shape[1] > MAX_WIDTH:
        return reference.conv(x, weight, bias, weight_b, bias_b, silu)
    y, y_b = triton_conv(x, weight, bias, weight_b, bias_b, silu)
    return y, None if weight_b is None else y_b


def warmup(
    model: torch.nn.Module, shape: Tuple[int, ...], dtype: torch.dtype = torch.bfloat16, train: bool = False
) -> None:
    """Compiles the kernels that a model needs by one pass over zeros.

    Args:
        shape: Of the model's input, batch first.
        dtype: Of autocast.
        train: Compile the backward kernels too; the parameters' gradients are cleared after it.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype), torch.set_grad_enabled(train):
        output = model(torch.zeros(shape, device=device))
    if train:
        output.float().sum().backward()
        model.zero_grad(set_to_none=True)
