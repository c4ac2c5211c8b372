"""The SwiGLU, a gated MLP."""

from typing import Optional

import torch
from torch import Tensor

from vim_timm.ops import triton_kernels
from vim_timm.ops.backends import choose, find
from vim_timm.ops.operands import SwiGlu
from vim_timm.ops.registration import wants_gradient


def swiglu(given: SwiGlu) -> Optional[Tensor]:
    """(SiLU(a) b) out^T + out_bias for [a, b] = x weight^T + bias (SwiGLU, arXiv 2002.05202, eq. 6).

    Args:
        given: See `operands.SwiGlu`.

    Returns:
        (..., C); None where no backend has it, and the caller composes it.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if torch.compiler.is_compiling() and not _beats_the_compiler(given):
        return None
    run = find('swiglu', given, given.x)
    return None if run is None else run(given)


def _beats_the_compiler(given: SwiGlu) -> bool:
    """Whether a kernel does more than torch.compile, which fuses what follows a product but not with it. In training
    Triton's operator multiplies again what a compiled model keeps."""
    chosen = choose('swiglu', given, given.x)
    if chosen == 'triton':
        return (triton_kernels.gates_gradients if wants_gradient(given) else triton_kernels.gates_product)(given)
    return chosen == 'cpu'  # its products are faster
