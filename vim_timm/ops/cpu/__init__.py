"""The `cpu` backend: a native kernel that needs no torch headers, one library for every Python and torch.

`kernel.c` is compiled once per instruction set and `library` opens the best one; `scan`, `conv`, `norm` and `mixer`
wrap it as torch operators. float32 state and arithmetic; bfloat16 and float16 tensors are converted around the call.
"""

from torch import Tensor

from vim_timm.ops.cpu.conv import conv
from vim_timm.ops.cpu.library import problem as unavailable
from vim_timm.ops.cpu.mixer import mixer
from vim_timm.ops.cpu.norm import rms_norm
from vim_timm.ops.cpu.scan import scan
from vim_timm.ops.cpu.tensors import DTYPES

__all__ = ['conv', 'mixer', 'rms_norm', 'scan', 'unavailable', 'unsupported']


def unsupported(u: Tensor, A: Tensor) -> str:
    """'' when the kernel runs on tensors like these, else one sentence that names the limit."""
    if u.device.type != 'cpu':
        return f'the CPU kernel runs on CPU tensors, not on {u.device.type}'
    if u.dtype not in DTYPES or A.dtype not in DTYPES:
        return (
            f'the CPU kernel computes in float32 and takes float32, bfloat16 and float16, not {u.dtype} with {A.dtype}'
        )
    return ''
