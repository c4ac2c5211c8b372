"""The inside of a bidirectional Mamba block fused for NVIDIA GPUs: convolution, projections, scan and gate.

Covers what is run on GPUs: two-byte tensors (autocast, or weights of that type), d_state 16, channels in multiples of
64. Everything else is a composition of `ops.triton_kernels` and torch's operators. The kernels are CUDA C++, compiled
at the first call by the NVRTC that PyTorch brings along; measured on compute capability 9.0 only.
"""

from typing import Optional

import torch
from torch import Tensor

from .. import operands
from . import mixer_op  # noqa: F401  defines the operator
from .nvrtc import missing

__all__ = ['mixer', 'mixer_limit', 'unavailable']

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


def mixer_limit(given: operands.Mixer) -> str:
    """Why the kernels cannot run such a block, in one sentence, or ''."""
    xz, forward, backward, *_ = given
    (dim, *_, width), rank, state = forward.conv.shape, forward.dt.shape[1], forward.A_log.shape[1]
    if (forward.conv_bias is None) != (backward.conv_bias is None) or forward.conv.shape != backward.conv.shape:
        return 'The fused CUDA kernels take convolutions of the same width in both directions, and both a bias or none.'
    if forward.dt_bias is None or backward.dt_bias is None:
        return 'The fused CUDA kernels take step size projections with a bias.'
    if not xz.is_cuda:
        return f'The fused CUDA kernels run on CUDA tensors, not on {xz.device.type}.'
    if xz.dtype not in (torch.bfloat16, torch.float16):
        return f'The fused CUDA kernels take bfloat16 and float16, not {xz.dtype}.'
    if state != 16 or rank > MAX_RANK or width > 4 or dim % 64 != 0:
        return (
            f'The fused CUDA kernels take d_state 16, dt_rank up to {MAX_RANK}, d_conv up to 4 and channels in '
            f'multiples of 64, not {state}, {rank}, {width} and {dim}.'
        )
    if xz.numel() == 0:
        return 'The fused CUDA kernels need at least one token.'
    batch, length, channels = xz.shape
    if batch > 32767:
        return f'The fused CUDA kernels take batches up to 32767 (the grid of a GPU), not {batch}.'
    if length * channels >= 2**30:
        return f'The fused CUDA kernels take sequences of up to {(2**30 - 1) // channels} tokens, not {length}.'
    return ''


def mixer(given: operands.Mixer) -> Tensor:
    """`reference.mixer` on the kernels, with out_proj inside: its operand need not be kept for the backward pass.

    States and sums are float32, the projections' products of two-byte numbers. Gradients of float32 parameters are
    views of one tensor.
    """
    return torch.ops.vim_timm.cuda_mixer.default(*given.flat())
