"""Selective scan and causal convolution: functions on tensors, on whichever backend runs best where they are."""

from vim_timm.ops.backends import (
    BACKENDS,
    OPERATORS,
    BackendStatus,
    auto_backend,
    explain,
    get_scan_backend,
    probe_backends,
    set_scan_backend,
    use_scan_backend,
    wants_any_derivative,
)
from vim_timm.ops.conv import bidirectional_conv, causal_conv
from vim_timm.ops.linear import linear
from vim_timm.ops.mamba_compat import causal_conv1d, selective_scan
from vim_timm.ops.mixer import fused_mixer
from vim_timm.ops.norm import add_norm, rms_norm
from vim_timm.ops.operands import (
    AddNorm,
    Direction,
    GridConv,
    GridMixer,
    Linear,
    Mixer,
    Noise,
    Pixels,
    Ssd,
    SwiGlu,
    Taps,
    Visible,
    Weights,
)
from vim_timm.ops.scan import bidirectional_scan
from vim_timm.ops.ssd import fused_grid_mixer, grid_conv, symmetric_ssd
from vim_timm.ops.swiglu import swiglu
from vim_timm.ops.visible import random_mask, visible_neighbours, visible_pixels

__all__ = [
    'BACKENDS',
    'OPERATORS',
    'AddNorm',
    'BackendStatus',
    'Direction',
    'GridConv',
    'GridMixer',
    'Linear',
    'Mixer',
    'Noise',
    'Pixels',
    'Ssd',
    'SwiGlu',
    'Taps',
    'Visible',
    'Weights',
    'add_norm',
    'auto_backend',
    'bidirectional_conv',
    'bidirectional_scan',
    'causal_conv',
    'causal_conv1d',
    'explain',
    'fused_grid_mixer',
    'fused_mixer',
    'get_scan_backend',
    'grid_conv',
    'linear',
    'probe_backends',
    'random_mask',
    'rms_norm',
    'selective_scan',
    'set_scan_backend',
    'swiglu',
    'symmetric_ssd',
    'use_scan_backend',
    'visible_neighbours',
    'visible_pixels',
    'wants_any_derivative',
]
