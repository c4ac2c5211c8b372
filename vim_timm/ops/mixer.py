"""The inside of a bidirectional block, from in_proj's output to out_proj's, where a kernel has it whole."""

from typing import Optional

from torch import Tensor

from vim_timm.ops.backends import find
from vim_timm.ops.operands import Mixer


def fused_mixer(mixer: Mixer) -> Optional[Tensor]:
    """scale * SiLU(z) * (forward scan + backward scan of SiLU(conv(x))) for xz = [x, z], then out_proj if given.

    Source: Vision Mamba, arXiv 2401.09417, algorithm 1, lines 3 to 21.

    Args:
        mixer: See `operands.Mixer`.

    Returns:
        (B, L, D), or (B, L, C) with out_proj, in xz's dtype; None where no backend computes it whole, and it is to be
        composed of `bidirectional_conv`, products and `bidirectional_scan`.

    Raises:
        RuntimeError: a forced backend cannot run.
    """
    run = find('mixer', mixer, mixer.xz)
    return None if run is None else run(mixer)
