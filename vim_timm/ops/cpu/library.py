"""Finds and opens the compiled kernel, and calls it.

Environment:
    VIM_TIMM_CPU_ISA: forces one build of the kernel (avx512, avx2, baseline, neon); else the best one that runs.
"""

import ctypes
import os
import threading
from pathlib import Path
from typing import Optional

import torch

_PATH = Path(__file__).parent / ('libvim_timm_cpu.dll' if os.name == 'nt' else 'libvim_timm_cpu.so')
_HOW_TO_BUILD = (
    'it is compiled where vim-timm is installed with a C compiler (gcc or clang) at hand; get one, then run '
    '`pip install --force-reinstall --no-deps --no-cache-dir vim-timm`, or in a checkout '
    '`python setup.py build_ext --inplace`'
)

_lock = threading.Lock()
_expected: dict[str, int] = {}
_library: Optional[ctypes.CDLL] = None
_instruction_set = ''
_intel = False
_problem: Optional[str] = None


def instruction_sets() -> list[str]:
    """The builds of the kernel that this machine can run, best first. Empty when the kernel is not available."""
    return _open().vim_timm_instruction_sets().decode().split() if not problem() else []


def instruction_set() -> str:
    """The build in use, '' when the kernel is not available."""
    return '' if problem() else _instruction_set


def outruns_torch() -> bool:
    """Whether the build in use multiplies faster than torch: in registers of 512 bits, of which MKL uses half on
    processors that are not Intel's."""
    return instruction_set() == 'avx512' and not _intel


def select(name: str) -> None:
    """Use the named build from here on.

    Raises:
        ValueError: this machine does not run it.
    """
    global _instruction_set
    choices = _open().vim_timm_instruction_sets().decode().split()
    if name not in choices:
        raise ValueError(f"CPU kernel build '{name}' does not run on this machine: choose {', '.join(choices)}")
    _instruction_set = name


def problem() -> str:
    """'' when the kernel can be called, else one sentence why not and how to get it. Opens the library once."""
    global _problem
    if _problem is None:
        with _lock:
            if _problem is None:
                _problem = _prepare()
    return _problem


def expect(name: str, value: int) -> None:
    """Have a number of `numbers` in kernel.c, which the caller relies on, compared when the library is opened."""
    _expected[name] = value


def call(function: str, arguments: bytes) -> int:
    """Run an entry point of the build in use on a packed C structure; the interpreter lock is released meanwhile.

    Returns:
        0, or the entry point's number for operands that it refuses.

    Raises:
        MemoryError: no memory for the kernel's workspace; nothing was computed.
        RuntimeError: the kernel is not available.
    """
    if _library is None and problem():
        raise RuntimeError(problem())
    answer = getattr(_library, f'{function}_{_instruction_set}')(arguments)
    if answer < 0:
        raise MemoryError('the CPU kernel could not get memory for its workspace')
    return answer


def _prepare() -> str:
    if not _PATH.exists():
        return f'the compiled kernel {_PATH.name} is missing: {_HOW_TO_BUILD}'
    try:
        library = _open()
    except OSError as error:
        return f'the compiled kernel does not load ({error}): {_HOW_TO_BUILD}'
    library.vim_timm_instruction_sets.restype = ctypes.c_char_p
    library.vim_timm_set_team.argtypes = [ctypes.c_void_p]
    choices = library.vim_timm_instruction_sets().decode().split()
    wanted = os.environ.get('VIM_TIMM_CPU_ISA') or choices[0]
    mismatches = [found for build in choices if (found := _mismatch(library, build))]
    if mismatches:
        return f'the compiled kernel {_PATH.name} is not of this version ({mismatches[0]}): {_HOW_TO_BUILD}'
    global _intel
    _intel = bool(library.vim_timm_is_intel())
    try:
        select(wanted)
    except ValueError as error:
        return f'VIM_TIMM_CPU_ISA asks for what cannot be had: {error}'
    _share_threads(library)
    _keep_freed_pages()
    return ''


def _open() -> ctypes.CDLL:
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(_PATH))
    return _library


class _Number(ctypes.Structure):
    _fields_ = [('name', ctypes.c_char_p), ('value', ctypes.c_int64)]


def _mismatch(library: ctypes.CDLL, build: str) -> str:
    """Where a build's structures and constants are not those that Python packs arguments by, else ''."""
    try:
        table = ctypes.cast(getattr(library, f'numbers_{build}'), ctypes.POINTER(_Number))
    except AttributeError:
        return f'its build {build} does not name its sizes'
    found: dict[str, int] = {}
    while table[len(found)].name:
        found[table[len(found)].name.decode()] = table[len(found)].value
    names = sorted(name for name in found.keys() | _expected if found.get(name) != _expected.get(name))
    differences = ', '.join(f'{name} is {found.get(name)} and not {_expected.get(name)}' for name in names)
    return f'in its build {build} {differences}' if names else ''


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernel run on the threads of torch's own OpenMP runtime: two teams would fight for the cores.

    A forked child must not touch its parent's team, which is gone: it starts threads of its own.
    """
    assert torch.get_num_threads() > 0  # torch, and with it the runtime, is loaded
    parallel = getattr(ctypes.CDLL(None), 'GOMP_parallel', None) if os.name == 'posix' else None
    library.vim_timm_set_team(ctypes.cast(parallel, ctypes.c_void_p) if parallel is not None else None)
    if hasattr(os, 'register_at_fork'):
        os.register_at_fork(after_in_child=lambda: library.vim_timm_set_team(None))


def _keep_freed_pages() -> None:
    """Teach glibc that this process frees and reuses large blocks.

    Its allocator hands freed memory back to the system at a threshold that adapts to the largest block freed so far.
    A block of Vision Mamba frees some ten megabytes, and getting them back page by page takes longer than its scan.
    Freeing one large, untouched block sets the threshold to 60 MiB; other allocators do not mind.
    """
    torch.empty(30 << 20, dtype=torch.uint8, device='cpu')
