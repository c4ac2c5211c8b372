"""The symmetric state space dual: both directions of a Mamba-2 head as one masked product."""

from typing import Any, List, Optional

import torch
from torch import Tensor

from vim_timm.ops.backends import find, run_if_there
from vim_timm.ops.operands import GridConv, GridMixer, Ssd
from vim_timm.ops.plain import ssd as plain
from vim_timm.ops.registration import autocast_off


def symmetric_ssd(operands: Ssd) -> Tensor:
    """y_i = sum_j (C_i . B_j) M_ij dt_j x_j + D x_i with M_ij = mean over orders of exp(-|s_i - s_j|).

    s is the cumulated sum of dt exp(A_log), 88 of a token at most, in the order of a visit, and dt = softplus(delta +
    delta_bias). It is a forward and a backward recurrence of Mamba-2 (arXiv 2405.21060, eq. 16) with shared parameters;
    the diagonal counts once.

    Args:
        operands: See `operands.Ssd`. Sums are float32 at least.

    Returns:
        (B, L, H, P) in x's dtype.

    Raises:
        ValueError: shapes do not fit together, or A_log has another number of rows than there are orders.
        RuntimeError: a forced backend cannot run.
    """
    x, B = operands.x, operands.B
    vectors = [operands.D, operands.delta_bias]
    fit = operands.delta.shape == x.shape[:3] and B.shape == operands.C.shape and B.shape[:2] == x.shape[:2]
    for vector in vectors:
        fit = fit and (vector is None or vector.shape == x.shape[2:3])
    if not fit:
        raise ValueError(
            f'x {list(x.shape)}, delta {list(operands.delta.shape)}, B {list(B.shape)}, C {list(operands.C.shape)}, '
            'D and delta_bias do not fit together'
        )
    orders = int(operands.rows) + int(operands.columns is not None)
    if operands.A_log.shape[0] != orders:
        raise ValueError(f'A_log has {operands.A_log.shape[0]} rows for {orders} orders of tokens')
    if not torch.jit.is_scripting():
        run = find('ssd', operands, operands.x) or plain.by_length  # of a forced backend that has none
        with autocast_off(operands.x):
            return run(operands)
    return plain.by_length(operands)


def grid_conv(conv: GridConv) -> Optional[Tensor]:
    """SiLU of a depthwise 3 x 3 convolution on a grid of tokens; one before the grid meets the middle tap alone.

    Args:
        conv: See `operands.GridConv`.

    Returns:
        (B, L, D) in x's dtype; None where no backend has it, and torch's convolution serves.

    Raises:
        ValueError: a backend has it, and the tokens are no such grid, or taps or bias do not fit them.
        RuntimeError: a forced backend cannot run.
    """
    return run_if_there('grid_conv', conv, conv.x)


def fused_grid_mixer(mixer: GridMixer) -> Optional[Tensor]:
    """RMSNorm(ssd) * SiLU(z), then out_proj if given; ssd is `symmetric_ssd` of SiLU(conv(x, B, C)) for zxbcdt =
    [z, x, B, C, delta].

    The depthwise 3 x 3 convolution is on the grid; a token before the grid meets the middle tap alone. Of a masked
    image it sees the patches that are there among zeros, and the orders visit them alone.

    Args:
        mixer: See `operands.GridMixer`; out_proj is cast to zxbcdt's dtype.

    Returns:
        (B, L, D), or (B, L, C) with out_proj, in zxbcdt's dtype; None where no backend computes it whole, and it is to
        be composed of convolution, `symmetric_ssd` and norm.

    Raises:
        ValueError: a backend computes it, and the tokens are no such grid, or places of them are twice or not on it; on
            a GPU, which would be waited for, such an image is NaN instead.
        RuntimeError: a forced backend cannot run.
    """
    operator = 'grid_mixer' if mixer.keep is None else 'masked_grid_mixer'
    run = find(operator, mixer, mixer.zxbcdt)
    if run is None:
        return None
    if mixer.out_proj is not None:
        fields: List[Any] = list(mixer)  # torch 2.6 compiles no `_replace`
        fields[-1] = mixer.out_proj.to(mixer.zxbcdt.dtype)
        mixer = GridMixer(*fields)
    with autocast_off(mixer.zxbcdt):
        return run(mixer)
