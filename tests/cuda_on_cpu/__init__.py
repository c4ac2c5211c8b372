"""The fused CUDA kernels compiled as plain C++, so that tests without a GPU run the kernels themselves."""

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

from vim_timm.ops.cuda import nvrtc, sizes

HERE = Path(__file__).parent


class Module(nvrtc.Module):
    """`nvrtc.Module` on the CPU."""

    def __init__(self, library):
        self.library = library

    def launch(self, name, grid, threads, *arguments, shared=0, early=False):
        arguments = ctypes.c_void_p(nvrtc.packed(arguments))
        if self.library['run_' + name]((ctypes.c_int * 3)(*grid), threads, arguments) != 0:
            raise RuntimeError(f'the threads of {name} wait for each other for ever')


@functools.lru_cache(maxsize=None)
def load(device, files, macros):
    """In place of `nvrtc.load`."""
    sources = [(nvrtc.SOURCES / name).read_text() for name in files if name != 'ptx.cuh']
    kernels = re.findall(r'__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(', sources[-1])
    text = '\n'.join([(HERE / 'device.h').read_text(), *sources, *(f'EXPORT({kernel})' for kernel in kernels)])
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, 'kernels.cpp'), Path(folder, 'kernels.so')
        source.write_text(text)
        flags = ['-std=c++17', '-O1', '-ffp-contract=off', '-fPIC', '-shared', '-w']
        flags += [f'-D{name}={value}' for name, value in sizes.macros(macros)]
        subprocess.run(['c++', *flags, str(source), '-o', str(library)], check=True)
        return Module(ctypes.CDLL(str(library)))
