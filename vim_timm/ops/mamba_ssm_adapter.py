"""The `mamba_ssm` backend: an installed mamba-ssm (and causal-conv1d), never needed, never imported unless asked for.

Only the public functions `selective_scan_fn` and `causal_conv1d_fn` are called, after a look at their signatures. The
layout changes between (B, L, D) and (B, D, L) and the flips of the backward direction that they need are paid here.
"""

import inspect
from functools import partial
from typing import Callable, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from vim_timm.ops import reference

_SCAN_ARGUMENTS = ['u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'delta_softplus', 'return_last_state']
_CONV_ARGUMENTS = ['x', 'weight', 'bias', 'activation']


class _Functions(NamedTuple):
    scan: Optional[Callable]
    conv: Optional[Callable]  # None: causal-conv1d is not usable, torch's convolution stands in
    why: str  # why scan is None


_found: Optional[_Functions] = None


def _find() -> _Functions:
    global _found
    if _found is None:
        _found = _import_functions()
    return _found


def _import_functions() -> _Functions:
    # a build for another torch shows itself as ImportError or OSError (undefined symbol)
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError) as e:
        why = f"mamba-ssm does not import ({type(e).__name__}: {e}); pip install 'vim-timm[cuda]'"
        return _Functions(None, None, why)
    if list(inspect.signature(selective_scan_fn).parameters) != _SCAN_ARGUMENTS:
        return _Functions(None, None, "this mamba-ssm's selective_scan_fn takes other arguments: install mamba-ssm 2.x")
    try:
        from causal_conv1d import causal_conv1d_fn

        if not set(_CONV_ARGUMENTS) <= set(inspect.signature(causal_conv1d_fn).parameters):
            causal_conv1d_fn = None
    except (ImportError, OSError):
        causal_conv1d_fn = None
    return _Functions(selective_scan_fn, causal_conv1d_fn, '')


def unavailable() -> str:
    if not torch.cuda.is_available():
        return 'mamba-ssm needs a CUDA device, and torch sees none'
    return _find().why


def unsupported(u: torch.Tensor, A: torch.Tensor) -> str:
    if u.device.type != 'cuda':
        return f'mamba-ssm runs on CUDA tensors only, not on {u.device.type}'
    if u.dtype == torch.float64:
        return 'mamba-ssm has no float64'
    if A.shape[-1] > 256:
        return f'mamba-ssm takes at most d_state 256, not {A.shape[-1]}'
    return ''


def _one_direction(u, delta, A, B, C, D, delta_bias, delta_softplus, A_is_log, reverse) -> torch.Tensor:
    def to_BDL(x_BLD: torch.Tensor) -> torch.Tensor:
        return (x_BLD.flip(1) if reverse else x_BLD).to(u.dtype).transpose(1, 2).contiguous()

    scan_fn = _find().scan
    assert scan_fn is not None
    A = -torch.exp(A.float()) if A_is_log else A.float()
    y = scan_fn(
        to_BDL(u),
        to_BDL(delta),
        A,
        to_BDL(B),
        to_BDL(C),
        None if D is None else D.float(),
        None,
        None if delta_bias is None else delta_bias.float(),
        delta_softplus,
    ).transpose(1, 2)
    return (y.flip(1) if reverse else y).float()


scan = partial(reference.scan, one_direction=_one_direction)


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    weight_b: Optional[torch.Tensor],
    bias_b: Optional[torch.Tensor],
    silu: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The same function as `reference.conv`; widths other than 2 to 4 are torch's."""

    def one_direction(weight: torch.Tensor, bias: Optional[torch.Tensor], reverse: bool) -> torch.Tensor:
        x_BDL = (x.flip(1) if reverse else x).transpose(1, 2)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        conv_fn = _find().conv
        if conv_fn is not None and weight.shape[1] in (2, 3, 4):
            y = conv_fn(x_BDL.contiguous(), weight, bias, activation='silu' if silu else None)
        else:
            width = weight.shape[1]
            y = F.conv1d(F.pad(x_BDL, [width - 1, 0]), weight.unsqueeze(1), bias, groups=weight.shape[0])
            y = F.silu(y) if silu else y
        y = y.transpose(1, 2)
        return (y.flip(1) if reverse else y).contiguous()

    y = one_direction(weight, bias, False)
    return y, None if weight_b is None else one_direction(weight_b, bias_b, True)
