"""The SwiGLU, a gated MLP."""

from typing import Optional

import torch
from torch import Tensor

from vim_timm.ops.backends import find
from vim_timm.ops.operands import SwiGlu


def swiglu(given: SwiGlu) -> Optional[Tensor]:
    """(SiLU(a) b) out^T + out_bias for [a, b] = x weight^T + bias (SwiGLU, arXiv 2002.05202, eq. 6).

    Args:
        given: See `operands.SwiGlu`.

    Returns:
        (..., C); None where no backend has it, and the caller composes it.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    if torch.compiler.is_compiling():  # torch.compile fuses what follows the product
        return None
    run = find('swiglu', given, given.x)
    return None if run is None else run(given)
