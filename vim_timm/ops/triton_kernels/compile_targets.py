"""Compiles every kernel for every supported GPU, without one: `python -m vim_timm.ops.triton_kernels.compile_targets`.

Prints registers, spilled bytes and shared memory, and fails where a kernel asks for more shared memory than the target
has. Needs the assembler and cuobjdump that Triton's package carries, and no TRITON_INTERPRET.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Tuple
from unittest import mock

import torch

from .. import operands
from ..operands import Direction, Taps
from .launch import Plan

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block; CUDA C++ Programming Guide
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
POINTERS = {**TYPES, torch.int32: '*i32', torch.int64: '*i64'}
Compiled = Dict[Tuple[Any, ...], Any]


class Recorder:
    """Stands in for a module of kernels: a launch compiles the kernel for a target instead."""

    def __init__(self, kernels: ModuleType, capability: int, compiled: Compiled) -> None:
        self.kernels, self.capability, self.compiled = kernels, capability, compiled

    def __getattr__(self, name: str) -> 'Launcher':
        return Launcher(getattr(self.kernels, name), name, self.capability, self.compiled)


class Launcher:
    def __init__(self, kernel: Any, name: str, capability: int, compiled: Compiled) -> None:
        self.kernel, self.name, self.capability, self.compiled = kernel, name, capability, compiled

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.compile

    def compile(
        self, *args: Any, num_warps: int = 4, num_stages: int = 3, maxnreg: Optional[int] = None, **constants: Any
    ) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        named = dict(zip(self.kernel.arg_names, args), **constants)
        signature: Dict[str, str] = {}
        constexprs: Dict[Tuple[int], Any] = {}
        attributes: Dict[Tuple[int], Any] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = named[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
                signature[parameter.name], constexprs[(i,)] = 'constexpr', value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            else:
                signature[parameter.name] = 'fp32' if isinstance(value, float) else 'i32'
                aligned = isinstance(value, int) and special and value % 16 == 0
            if aligned:
                attributes[(i,)] = [['tt.divisibility', 16]]
        options = {'num_warps': num_warps, 'num_stages': num_stages, 'maxnreg': maxnreg}
        key = (self.name, self.capability, str(signature), str(constexprs), str(attributes), str(options))
        if key not in self.compiled:
            source = ASTSource(self.kernel, signature, constexprs, attributes)
            self.compiled[key] = triton.compile(source, target=GPUTarget('cuda', self.capability, 32), options=options)


def compile_scan(capability: int, compiled: Compiled, dim: int, state: int, dtype: torch.dtype) -> None:
    """Every kernel of a scan, whole and in chunks, forward and backward."""
    from . import scan_kernels
    from .scan_op import Scan, cut_scan

    length, rank = 512, dim // 32
    rows = torch.empty([2, length, rank + 2 * state], dtype=dtype, device='meta')
    u = torch.empty([2, length, dim], dtype=dtype, device='meta')
    z = torch.empty([2, length, 2 * dim], dtype=dtype, device='meta')[..., dim:]
    A, D = torch.empty([dim, state], device='meta'), torch.empty([dim], device='meta')
    direction = Direction(u, u, A, rows[..., rank : rank + state], rows[..., rank + state :], D, D)
    scan: Any = Scan(operands.Scan(direction, direction, z, 0.5))
    scan.kernels = Recorder(scan_kernels, capability, compiled)
    scan.rows = {'ALIGN': math.gcd(16, rank * dtype.itemsize, rows.stride(1) * dtype.itemsize)}
    block, warps = cut_scan(u, A, True)[:2]
    for cut in (Plan(block, warps, length, 1), Plan(block, warps, length // 4, 4)):
        scan.cut = cut
        H, S = scan.first_states() if cut.chunks > 1 else (scan.empty(0), scan.empty(0))
        Y = scan.empty(scan.cells, length, dim, dtype=dtype)
        bounds = scan.empty(scan.cells, length // 4, state, dim)
        for kept in (None, bounds):
            scan.forward(H, S, Y, kept, local=False)
        scan.gate(Y)
        grad_y, _ = scan.gate_backward(u, Y, scan.z)
        Q = scan.last_gradients(grad_y, 1.0, S) if cut.chunks > 1 else H
        scan.backward(grad_y, 1.0, bounds, Q, scan.cut._replace(block=32))


def compile_conv(capability: int, compiled: Compiled, dim: int, dtype: torch.dtype) -> None:
    from . import conv_kernels
    from .conv_op import Conv

    x = torch.empty([2, 512, 2 * dim], dtype=dtype, device='meta')[..., :dim]
    weight, bias = torch.empty([dim, 4], device='meta'), torch.empty([dim], device='meta')
    conv: Any = Conv(operands.Conv(x, Taps(weight, bias), Taps(weight, bias)))
    conv.kernels = Recorder(conv_kernels, capability, compiled)
    y, y_b = conv.forward()
    conv.backward(y, y_b)


def mixer_of(
    dim: int, dtype: torch.dtype, length: int, side: int, neighbours: Optional[torch.Tensor] = None
) -> operands.GridMixer:
    """Operands of a Vision Mamba 2 mixer of two orders, of `length` tokens on a square grid."""
    state, heads = 64, dim // 64
    width = 2 * dim + 2 * state + 8 * math.ceil(heads / 8)
    zxbcdt = torch.empty([2, length, width], dtype=dtype, device='meta')
    shapes = ([dim + 2 * state, 9], [dim + 2 * state], [heads], [2, heads], [heads], [dim])
    given: Any = [torch.empty(shape, device='meta') for shape in shapes]
    out_proj: Any = torch.empty([dim // 2, dim], dtype=dtype, device='meta')
    given += [1e-5, state, True, 0, side, side, None, neighbours, out_proj]
    return operands.GridMixer(zxbcdt, *given)


def compile_mixer(mixer: Any, capability: int, compiled: Compiled) -> None:
    """The inside of a Vision Mamba 2 mixer, forward and backward."""
    from . import ssd_chunks

    mixer.kernels = {name: Recorder(module, capability, compiled) for name, module in mixer.kernels.items()}
    with mock.patch.object(ssd_chunks, 'major_capability', lambda device: capability // 10):
        out, *kept = mixer.forward()
        mixer.backward(out, *kept)


def compile_grid_mixer(capability: int, compiled: Compiled, dim: int, dtype: torch.dtype, side: int) -> None:
    from .grid_mixer_op import GridMixer

    compile_mixer(GridMixer(mixer_of(dim, dtype, side * side, side)), capability, compiled)


def compile_masked_grid_mixer(capability: int, compiled: Compiled, dim: int, dtype: torch.dtype) -> None:
    """Kernels of an image whose patches are hidden but for a quarter."""
    from . import masked_conv_kernels
    from .masked_conv_launch import find_neighbours
    from .masked_grid_mixer_op import MaskedGridMixer

    visible = operands.Visible(torch.empty([2, 49], dtype=torch.int64, device='meta'), 0, 14, 14)
    neighbours = find_neighbours(Recorder(masked_conv_kernels, capability, compiled), visible)
    mixer = MaskedGridMixer(mixer_of(dim, dtype, neighbours.shape[2], 14, neighbours))
    compile_mixer(mixer, capability, compiled)


def compile_visible(capability: int, compiled: Compiled, dtype: torch.dtype) -> None:
    """The choice of a quarter of the patches of an image, and their pixels in a dtype."""
    from . import visible_kernels
    from .visible_op import random_mask, visible_pixels

    recorder = Recorder(visible_kernels, capability, compiled)
    keep, _ = random_mask(recorder, torch.empty([2, 196], device='meta'), 49)
    visible_pixels(recorder, operands.Pixels(torch.empty([2, 3, 224, 224], device='meta'), keep, 16, 16, dtype))


def compile_swiglu(capability: int, compiled: Compiled, dim: int, dtype: torch.dtype) -> None:
    """A SwiGLU of dim channels and four times as many hidden units, forward and backward."""
    from . import gated_product_kernels, sum_kernels, swiglu_kernels
    from .sums import sum_of_rows
    from .swiglu_op import (
        GATED_DTYPES,
        GRADIENT_CHANNELS,
        GRADIENTS,
        WHOLE,
        WHOLE_CHANNELS,
        Gate,
        GatedProduct,
        SwiGluGradients,
        WholeSwiGlu,
        product_tile,
    )

    hidden = 4 * dim
    x, weight = (torch.empty([rows, dim], dtype=dtype, device='meta') for rows in (2 * 196, 2 * hidden))
    if dtype in GATED_DTYPES:
        recorder = Recorder(gated_product_kernels, capability, compiled)
        bias, out_bias = (torch.empty([size], device='meta') for size in (2 * hidden, dim))
        given = operands.SwiGlu(x, weight, bias, x.new_empty(dim, hidden), out_bias)
        GatedProduct(recorder, given).forward(product_tile(dim, capability // 10))
        if capability == 90 and dim in WHOLE_CHANNELS:
            for tile in WHOLE:
                WholeSwiGlu(recorder, given).forward(tile)
        if capability == 90 and dim <= GRADIENT_CHANNELS:
            gradients = SwiGluGradients(recorder, x, weight, bias)
            gradients.backward(x.new_empty(len(x), hidden), GRADIENTS)
    ab = torch.empty([2 * 196, 2 * hidden], dtype=dtype, device='meta')
    gate = Gate(Recorder(swiglu_kernels, capability, compiled), ab)
    gate.backward(gate.forward())
    sum_of_rows(Recorder(sum_kernels, capability, compiled), x)


def compile_add_norm(capability: int, compiled: Compiled, dim: int, dtype: torch.dtype) -> None:
    """The norm of a residual stream in float32 and of its sum with a branch in a dtype, forward and backward."""
    from . import add_norm_kernels
    from .add_norm_op import AddNorm

    x, y = (torch.empty([2 * 196, dim], dtype=kind, device='meta') for kind in (torch.float32, dtype))
    norm = AddNorm(Recorder(add_norm_kernels, capability, compiled), x, x.new_empty(dim), 1e-5)
    for other in (None, y):
        total, out = norm.forward(other, dtype)
        norm.backward(total, out, None if other is None else dtype)


def registers_and_stack(cubin: bytes) -> Tuple[int, int]:
    """What the assembler reports: registers of a thread and bytes of its stack (spills)."""
    import triton

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name]
        text = subprocess.run(command, capture_output=True, encoding='utf-8', check=True).stdout
    found = re.search(r'REG:(\d+) STACK:(\d+)', text)
    if found is None:
        raise RuntimeError(f'cuobjdump reports no registers: {text[:200]}')
    return int(found[1]), int(found[2])


def check(capability: int, dim: int, state: int, dtype: torch.dtype) -> bool:
    """Compiles and reports one size; False where shared memory does not fit."""
    compiled: Compiled = {}
    compile_scan(capability, compiled, dim, state, dtype)
    compile_conv(capability, compiled, dim, dtype)
    for side in (14, 32):  # the latter in chunks
        compile_grid_mixer(capability, compiled, dim, dtype, side)
    compile_masked_grid_mixer(capability, compiled, dim, dtype)
    compile_visible(capability, compiled, dtype)
    for compile_layer in (compile_swiglu, compile_add_norm):
        compile_layer(capability, compiled, dim // 2, dtype)  # 192 at D 384, as vim2_tiny has
    fits = True
    for key, kernel in compiled.items():
        registers, stack = registers_and_stack(kernel.asm['cubin'])
        shared = kernel.metadata.shared
        fits = fits and shared <= SHARED_KIB[capability] * 1024
        print(
            f'sm_{capability} D {dim} N {state} {str(dtype)[6:]:8} {key[0]:19} {registers:3} registers, '
            f'{stack:4} bytes spilled, {shared:6} bytes of shared memory',
            flush=True,
        )
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', nargs='+', type=int, default=list(SHARED_KIB), choices=list(SHARED_KIB))
    parser.add_argument('--dims', nargs='+', type=int, default=[384, 768, 1536], help='channels, D')
    parser.add_argument('--states', nargs='+', type=int, default=[16], help='d_state, N')
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16'], choices=[str(t)[6:] for t in TYPES])
    options = parser.parse_args()
    results = [
        check(target, dim, state, getattr(torch, dtype))
        for target in options.targets
        for dim in options.dims
        for state in options.states
        for dtype in options.dtypes
    ]
    if not all(results):
        sys.exit('a kernel needs more shared memory than its target has')


if __name__ == '__main__':
    main()
