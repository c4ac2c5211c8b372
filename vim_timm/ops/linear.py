"""The product of a linear layer."""

from typing import Optional

from torch import Tensor

from vim_timm.ops.backends import find
from vim_timm.ops.operands import Linear


def linear(given: Linear) -> Optional[Tensor]:
    """x weight^T + bias.

    Args:
        given: See `operands.Linear`.

    Returns:
        (..., D); None where no backend has it, and the layer is called.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    run = find('linear', given, given.x)
    return None if run is None else run(given)
