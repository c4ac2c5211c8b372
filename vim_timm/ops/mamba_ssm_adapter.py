"""The `mamba_ssm` backend: an installed mamba-ssm (and causal-conv1d), never needed, never imported unless asked for.

Only the public functions `selective_scan_fn` and `causal_conv1d_fn` are called, after a look at their signatures. The
layout changes between (B, L, D) and (B, D, L) and the flips of the backward direction that they need are paid here.
"""

import inspect
from functools import partial
from typing import Callable, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.operands import Direction, Taps
from vim_timm.ops.plain import reference

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


def limit(x: Tensor) -> str:
    if x.device.type != 'cuda':
        return f'mamba-ssm runs on CUDA tensors only, not on {x.device.type}'
    if x.dtype == torch.float64:
        return 'mamba-ssm has no float64'
    return ''


def scan_limit(given: operands.Scan) -> str:
    state = given.forward.A_log.shape[-1]
    return f'mamba-ssm takes at most d_state 256, not {state}' if state > 256 else limit(given.forward.u)


def conv_limit(given: operands.Conv) -> str:
    return limit(given.x)


def _one_direction(direction: Direction, delta_softplus: bool, A_is_log: bool, reverse: bool) -> Tensor:
    u, delta, A, B, C, D, delta_bias = direction

    def to_BDL(x_BLD: Tensor) -> Tensor:
        return (x_BLD.flip(1) if reverse else x_BLD).to(u.dtype).transpose(1, 2).contiguous()

    scan_fn = _find().scan
    assert scan_fn is not None
    A = reference.state_matrix(A, A_is_log, torch.float32)
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


def conv(given: operands.Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """The same function as `reference.conv`; widths other than 2 to 4 are torch's."""
    x, forward, backward, silu = given

    def one_direction(taps: Taps, reverse: bool) -> Tensor:
        x_BDL = (x.flip(1) if reverse else x).transpose(1, 2)
        weight, bias = taps.weight.to(x.dtype), None if taps.bias is None else taps.bias.to(x.dtype)
        conv_fn = _find().conv
        if conv_fn is not None and weight.shape[1] in (2, 3, 4):
            y = conv_fn(x_BDL.contiguous(), weight, bias, activation='silu' if silu else None)
        else:
            width = weight.shape[1]
            y = F.conv1d(F.pad(x_BDL, [width - 1, 0]), weight.unsqueeze(1), bias, groups=weight.shape[0])
            y = F.silu(y) if silu else y
        y = y.transpose(1, 2)
        return (y.flip(1) if reverse else y).contiguous()

    return one_direction(forward, False), None if backward is None else one_direction(backward, True)
