"""The `cpu` backend: a native kernel that needs no torch headers, one library for every Python and torch.

`kernel.c` is compiled once per instruction set and `library` opens the best one; `scan`, `conv`, `norm`, `mixer`,
`ssd`, `grid_mixer`, `linear` and `swiglu` wrap it as torch operators. float32 state and arithmetic; bfloat16 and
float16 tensors are converted around the call.
"""

from vim_timm.ops.cpu.conv import conv, conv_limit
from vim_timm.ops.cpu.grid_mixer import grid_mixer, grid_mixer_limit
from vim_timm.ops.cpu.library import problem as unavailable
from vim_timm.ops.cpu.linear import linear, linear_limit
from vim_timm.ops.cpu.mixer import mixer, mixer_limit
from vim_timm.ops.cpu.norm import rms_norm, rms_norm_limit
from vim_timm.ops.cpu.scan import scan, scan_limit
from vim_timm.ops.cpu.ssd import ssd, ssd_limit
from vim_timm.ops.cpu.swiglu import swiglu, swiglu_limit

__all__ = [
    'conv',
    'conv_limit',
    'grid_mixer',
    'grid_mixer_limit',
    'linear',
    'linear_limit',
    'mixer',
    'mixer_limit',
    'rms_norm',
    'rms_norm_limit',
    'scan',
    'scan_limit',
    'ssd',
    'ssd_limit',
    'swiglu',
    'swiglu_limit',
    'unavailable',
]
