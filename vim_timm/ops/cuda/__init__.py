"""The inside of a bidirectional Mamba block fused for NVIDIA GPUs: convolution, projections, scan and gate.

Covers what is run on GPUs: two-byte tensors (autocast, or weights of that type), d_state 16, channels in multiples of
64. Everything else is a composition of `ops.triton_kernels` and torch's operators. The kernels are CUDA C++, compiled
at the first call by the NVRTC that PyTorch brings along; measured on compute capability 9.0 only.
"""

from typing import Optional

import torch
from torch import Tensor

from .nvrtc import missing

__all__ = ['mixer', 'unavailable', 'unsupported']

MAX_RANK = 48
_reason: Optional[str] = None


def unavailable() -> str:
    """Why this process cannot use the kernels, in one sentence, or ''."""
    global _reason
    if _reason is None:
        if torch.version.cuda is None or not torch.cuda.is_available():
            _reason = 'The fused CUDA kernels need an NVIDIA GPU and a CUDA build of PyTorch.'
        elif torch.cuda.get_device_capability() < (8, 0):
            _reason = 'The fused CUDA kernels need an NVIDIA GPU of compute capability 8.0 or newer (Ampere).'
        else:
            _reason = missing()
    return _reason


def unsupported(xz: Tensor, state: int, rank: int, width: int) -> str:
    """Why the kernels cannot run a block of these sizes, in one sentence, or ''.

    Args:
        xz: in_proj's output (B, L, 2 D).
        state: d_state.
        rank: dt_rank.
        width: d_conv.
    """
    if xz.device.type != 'cuda':
        return f'The fused CUDA kernels run on CUDA tensors, not on {xz.device.type}.'
    if xz.dtype not in (torch.bfloat16, torch.float16):
        return f'The fused CUDA kernels take bfloat16 and float16, not {xz.dtype}.'
    if state != 16 or rank > MAX_RANK or width > 4 or xz.shape[-1] % 128 != 0:
        return (
            f'The fused CUDA kernels take d_state 16, dt_rank up to {MAX_RANK}, d_conv up to 4 and channels in '
            f'multiples of 64, not {state}, {rank}, {width} and {xz.shape[-1] // 2}.'
        )
    if xz.numel() == 0:
        return 'The fused CUDA kernels need at least one token.'
    if xz.shape[0] > 32767:
        return f'The fused CUDA kernels take batches up to 32767 (the grid of a GPU), not {xz.shape[0]}.'
    if xz.shape[1] * xz.shape[2] >= 2**30:
        return f'The fused CUDA kernels take sequences of up to {(2**30 - 1) // xz.shape[2]} tokens, not {xz.shape[1]}.'
    return ''


def mixer(
    xz: Tensor,
    conv: Tensor,
    conv_bias: Optional[Tensor],
    x_proj: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    conv_b: Tensor,
    conv_bias_b: Optional[Tensor],
    x_proj_b: Tensor,
    dt_b: Tensor,
    dt_bias_b: Tensor,
    A_b_log: Tensor,
    D_b: Tensor,
    scale: float,
    out_proj: Optional[Tensor] = None,
    out_bias: Optional[Tensor] = None,
) -> Tensor:
    """scale * SiLU(z) * (forward scan + backward scan of SiLU(conv(x))) for xz = [x, z], then out_proj if given.

    Source: Vision Mamba, arXiv 2401.09417, algorithm 1, lines 3 to 21.

    Args:
        xz: (B, L, 2 D), bfloat16 or float16.
        conv: Taps (D, W).
        conv_bias: (D).
        x_proj: (R + 32, D): to step size, B and C.
        dt: Step size projection (D, R).
        dt_bias: (D).
        A_log: (D, 16).
        D: Skip weight (D).
        conv_b: The same seven of the backward direction.
        scale: 0.5 averages the directions.
        out_proj: (C, D). Inside, its operand need not be kept for the backward pass.
        out_bias: (C).

    Returns:
        (B, L, D), or (B, L, C) with out_proj, in xz's dtype; states and sums are float32, the projections' products of
        two-byte numbers. Gradients of float32 parameters are views of one tensor.

    Raises:
        ValueError: the directions' convolutions differ in width, or only one has a bias.
    """
    from . import mixer_op  # noqa: F401  defines the operator

    if (conv_bias is None) != (conv_bias_b is None) or conv.shape != conv_b.shape:
        raise ValueError('The convolutions of both directions must have the same width, and both a bias or none.')

    return torch.ops.vim_timm.cuda_mixer.default(
        xz, conv, conv_bias, x_proj, dt, dt_bias, A_log, D,
        conv_b, conv_bias_b, x_proj_b, dt_b, dt_bias_b, A_b_log, D_b, out_proj, out_bias, scale,
    )  # fmt: skip
