"""Selective scan and causal convolution: functions on tensors, on whichever backend runs best where they are."""

from vim_timm.ops.dispatch import (
    BACKENDS,
    BackendStatus,
    auto_backend,
    explain,
    fused_mixer,
    get_scan_backend,
    probe_backends,
    set_scan_backend,
    use_scan_backend,
)
from vim_timm.ops.functional import bidirectional_conv, bidirectional_scan, causal_conv, causal_conv1d, selective_scan
from vim_timm.ops.norm import rms_norm

__all__ = [
    'BACKENDS',
    'BackendStatus',
    'auto_backend',
    'bidirectional_conv',
    'bidirectional_scan',
    'causal_conv',
    'causal_conv1d',
    'explain',
    'fused_mixer',
    'get_scan_backend',
    'probe_backends',
    'rms_norm',
    'selective_scan',
    'set_scan_backend',
    'use_scan_backend',
]
