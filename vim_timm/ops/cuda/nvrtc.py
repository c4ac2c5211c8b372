"""CUDA C++ compiled at run time by NVRTC, through the bindings that PyTorch's CUDA builds bring along."""

import ctypes
import functools
import importlib.util
import struct
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Sequence, Tuple

import torch

from . import sizes

SOURCES = Path(__file__).parent
MAX_ARGUMENTS = 64
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def missing() -> str:
    """Why nothing can be compiled here, in one sentence, or ''."""
    try:
        found = importlib.util.find_spec('cuda.bindings') is not None
    except ModuleNotFoundError:
        found = False
    return '' if found else 'The fused CUDA kernels need cuda-bindings, which comes with PyTorch 2.10 and later.'


def checked(result: Sequence[Any]) -> Any:
    """A binding's answer without its error code.

    Raises:
        RuntimeError: the call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f'CUDA call failed: {error!r}')
    return values[0] if len(values) == 1 else tuple(values)


def compile_cubin(files: Tuple[str, ...], capability: int, macros: Tuple[Tuple[str, int], ...]) -> bytes:
    """Machine code of the concatenated sources for a compute capability (90 for 9.0), with `sizes.macros` of `macros`.

    Raises:
        RuntimeError: NVRTC refused; its log is in the message.
    """
    from cuda.bindings import nvrtc

    source = ''.join((SOURCES / name).read_text(encoding='utf-8') for name in files)
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), files[-1].encode(), 0, [], []))
    options = [f'--gpu-architecture=sm_{capability}', '-std=c++17']
    options += [f'-D{name}={value}' for name, value in sizes.macros(macros)]
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(error) != 0:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f'NVRTC cannot compile {files[-1]}: {log.decode(errors="replace")}')
        cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


class Module:
    """The kernels of one translation unit, loaded into a device's primary context."""

    def __init__(self, cubin: bytes, capability: int, device: int) -> None:
        from cuda.bindings import driver

        self.driver, self.device = driver, device
        # The only GPU that this was measured on; edges of this kind in a captured graph are as old as CUDA 12.3.
        self.overlaps = capability == 90 and checked(driver.cuDriverGetVersion()) >= 12030
        self.module = self.in_context(driver.cuModuleLoadData, cubin)
        self.functions: Dict[str, Any] = {}

    def find(self, name: str, shared: int) -> None:
        """Puts a kernel, which may have so many bytes of dynamic shared memory, among `functions`."""
        function = self.in_context(self.driver.cuModuleGetFunction, self.module, name.encode())
        limit = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(self.driver.cuFuncSetAttribute(function, limit, shared))
        self.functions[name] = function

    def in_context(self, call: Callable[..., Sequence[Any]], *arguments: Any) -> Any:
        """`checked(call(*arguments))`. A thread in which torch has not used CUDA yet, as autograd's may be, first gets
        the context of its device."""
        result = call(*arguments)
        if int(result[0]) == INVALID_CONTEXT:
            device = checked(self.driver.cuDeviceGet(torch.cuda.current_device()))
            checked(self.driver.cuCtxSetCurrent(checked(self.driver.cuDevicePrimaryCtxRetain(device))))
            result = call(*arguments)
        return checked(result)

    def launch(
        self, name: str, grid: Tuple[int, int, int], threads: int, *arguments: int, shared: int = 0,
        early: bool = False,
    ) -> None:  # fmt: skip
        """Runs a kernel with these arguments on its device's current stream, with so many bytes of dynamic shared
        memory.

        An `early` kernel calls `wait_for_last_kernel` before it reads what the last one wrote. In a CUDA graph, where
        the host's time is free, its blocks start while the last kernel ends.
        """
        first = packed(arguments)
        # torch.cuda.current_stream() would take the host longer than the launch.
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if name not in self.functions:
            self.find(name, shared)
        function, call = self.functions[name], self.driver.cuLaunchKernel
        if early and self.overlaps and torch.cuda.is_current_stream_capturing():
            config = self.overlapping(grid, threads, shared, stream)
            self.in_context(self.driver.cuLaunchKernelEx, config, function, first, 0)
        elif call(function, *grid, threads, 1, 1, shared, stream, first, 0)[0] != 0:  # nothing has been launched
            self.in_context(call, function, *grid, threads, 1, 1, shared, stream, first, 0)

    def overlapping(self, grid: Tuple[int, int, int], threads: int, shared: int, stream: int) -> Any:
        """A launch whose blocks may start before the last kernel has ended."""
        attribute, config = self.driver.CUlaunchAttribute(), self.driver.CUlaunchConfig()
        attribute.id = self.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config


class Words(threading.local):
    """Where a thread puts a kernel's arguments until the launch has copied them: 8 bytes each, and their addresses."""

    def __init__(self) -> None:
        self.words = (ctypes.c_int64 * MAX_ARGUMENTS)()
        first = ctypes.addressof(self.words)
        self.addresses = (ctypes.c_void_p * MAX_ARGUMENTS)(*range(first, first + 8 * MAX_ARGUMENTS, 8))
        self.first = ctypes.addressof(self.addresses)


buffer = Words()


def packed(arguments: Sequence[int]) -> int:
    """The address of the addresses of kernel arguments; a kernel reads as many bytes as its parameter has.

    Tensors pass as their addresses, floats as their `bits`: to find out what each of a block's hundred arguments is
    would cost the host more than the launches.
    """
    buffer.words[: len(arguments)] = arguments  # type: ignore[call-overload]  # refuses floats, and tensors of them
    return buffer.first


def bits(x: float) -> int:
    """The four bytes of a float32 as an integer."""
    return int.from_bytes(struct.pack('<f', x), 'little')


@functools.lru_cache(maxsize=None)
def load(device: torch.device, files: Tuple[str, ...], macros: Tuple[Tuple[str, int], ...]) -> Module:
    """Compiles and loads once a process, device and set of macros."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        capability = 10 * major + minor
        return Module(compile_cubin(files, capability, macros), capability, torch.cuda.current_device())
