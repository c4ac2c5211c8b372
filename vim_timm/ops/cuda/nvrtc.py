"""CUDA C++ compiled at run time by NVRTC, through the bindings that PyTorch's CUDA builds bring along."""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch

SOURCES = Path(__file__).parent


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
    """Machine code of the concatenated sources for a compute capability (90 for 9.0).

    Raises:
        RuntimeError: NVRTC refused; its log is in the message.
    """
    from cuda.bindings import nvrtc

    source = ''.join((SOURCES / name).read_text() for name in files)
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), files[-1].encode(), 0, [], []))
    options = [f'--gpu-architecture=sm_{capability}', '-std=c++17', *(f'-D{name}={value}' for name, value in macros)]
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

    def __init__(self, cubin: bytes) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.module = checked(driver.cuModuleLoadData(cubin))
        self.functions: Dict[str, Any] = {}

    def function(self, name: str) -> Any:
        if name not in self.functions:
            self.functions[name] = checked(self.driver.cuModuleGetFunction(self.module, name.encode()))
        return self.functions[name]

    def launch(self, name: str, grid: Tuple[int, int, int], threads: int, *arguments: Any) -> None:
        """Runs a kernel on the current stream.

        Args:
            arguments: Tensors (their addresses), None (a null pointer), floats, ints (32 bits), ctypes objects.
        """
        values: List[Any] = [as_c(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        stream = torch.cuda.current_stream().cuda_stream
        checked(
            self.driver.cuLaunchKernel(
                self.function(name), *grid, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0
            )
        )


def as_c(x: Any) -> Any:
    if x is None:
        return ctypes.c_void_p(0)
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_int(x) if isinstance(x, int) else x


@functools.lru_cache(maxsize=None)
def load(device: torch.device, files: Tuple[str, ...], macros: Tuple[Tuple[str, int], ...]) -> Module:
    """Compiles and loads once a process, device and set of macros."""
    major, minor = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return Module(compile_cubin(files, 10 * major + minor, macros))
