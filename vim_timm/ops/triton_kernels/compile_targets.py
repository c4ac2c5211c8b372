"""Compiles every kernel for every supported GPU, without one: `python -m vim_timm.ops.triton_kernels.compile_targets`.

Prints registers, spills and shared memory, and fails where a kernel asks for more shared memory than the target has.
"""
import argparse
import re
import subprocess
import tempfile
from types import ModuleType
from typing import Any, Callable, Dict, List, Tuple

import torch

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block's limit, CUDA C++ Programming Guide
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}


class Recorder:
    """Stands in for a module of kernels: a launch compiles for the target instead."""

    def __init__(self, kernels: ModuleType, capability: int, seen: Dict[Tuple[Any, ...], Any]) -> None:
        self.kernels, self.capability, self.seen = kernels, capability, seen

    def __getattr__(self, name: str) -> 'Launcher':
        return Launcher(getattr(self.kernels, name), name, self.capability, self.seen)


class Launcher:
    def __init__(self, kernel: Any, name: str, capability: int, seen: Dict[Tuple[Any, ...], Any]) -> None:
        self.kernel, self.name, self.capability, self.seen = kernel, name, capability, seen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        named = dict(zip(self.kernel.arg_names, args), **constants)
        signature, constexprs, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params)):
            value = named[name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
                signature[name] = 'constexpr'
                constexprs[(i,)] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    attributes[(i,)] = [['tt.divisibility', 16]]
            elif isinstance(value, float):
                signature[name] = 'fp32'
            else:
                signature[name] = 'i32'
                if special and value % 16 == 0:
                    attributes[(i,)] = [['tt.divisibility', 16]]
        key = (self.name, self.capability, num_warps, num_stages, str(signature), str(constexprs), str(attributes))
        if key not in self.seen:
            source = ASTSource(self.kernel, signature, constexprs, attributes)
            self.seen[key] = triton.compile(
                source, target=GPUTarget('cuda', self.capability, 32), options={'num_warps': num_warps, 'num_stages': num_stages})


def resources(cubin: bytes) -> str:
    """Registers and stack bytes (spills) that the assembler reports."""
    import triton

    path = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([path, '-res-usage', file.name], capture_output=True, text=True).stdout
    found = re.search(r'REG:(\d+) STACK:(\d+)', text)
    return f'{found[1]} registers, {found[2]} bytes of stack' if found else ''


def launches(capability: int, seen: Dict[Tuple[Any, ...], Any], dims: List[int], states: List[int]) -> None:
    """Every kernel, as a bfloat16 and a float32 model of these sizes launches it."""
    from . import conv_kernels, scan_kernels
    from .conv_op import BACKWARD_TILE, Conv, backward_launch, forward_launch
    from .launch import Plan
    from .scan_op import Scan

    length = 512
    for dtype in (torch.bfloat16, torch.float32):
        for dim in dims:
            for state in states:
                rank = dim // 32
                xz = torch.empty([2, length, 2 * dim], dtype=dtype, device='meta')
                x, z = xz[..., :dim], xz[..., dim:]
                row = torch.empty([2, length, rank + 2 * state], dtype=dtype, device='meta')
                B, C = row[..., rank:rank + state], row[..., rank + state:]
                u = torch.empty([2, length, dim], dtype=dtype, device='meta')
                A, D = torch.empty([dim, state], device='meta'), torch.empty([dim], device='meta')
                one = (u, u, A, B, C, D, D)
                scan: Any = Scan(*one, *one, z, 0.5, True, True)
                scan.kernels = Recorder(scan_kernels, capability, seen)
                print()
    del Conv, Plan, BACKWARD_TILE, conv_kernels, backward_launch, forward_launch


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
