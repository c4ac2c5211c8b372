"""The table operator x backend, and the one function that picks a cell: by what was forced, tracing mode and operands.

A cell is a function of an operator's operands and its limit, which says why the function cannot take some of them. An
operator without a cell of a backend is composed of others by its caller. `auto` takes the kernel of the tensor's
device where there is one that can run, else `torch`; under export, on meta tensors and where derivatives are asked for
that kernels have not, `export`, and under torch.compile `export` where `torch` would run eagerly. VIM_TIMM_SCAN or
`set_scan_backend` forces a backend by name.
"""

import contextlib
import logging
import os
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch

from vim_timm.ops import cpu, cuda, mamba_ssm_adapter, triton_kernels
from vim_timm.ops.plain import chunked, export, reference, ssd
from vim_timm.ops.registration import REFUSAL, autocast_off, transformed

_logger = logging.getLogger('vim_timm')


def _nothing() -> str:
    return ''


def _no_limit(operands: Any) -> str:
    return ''


class Cell(NamedTuple):
    """An operator on a backend."""

    run: Callable[[Any], Any]
    limit: Callable[[Any], str] = _no_limit  # why these operands cannot be taken, in one sentence, or ''


# Each backend, and why this process cannot use it, or ''.
BACKENDS: Dict[str, Callable[[], str]] = {
    'reference': _nothing,
    'torch': _nothing,
    'export': _nothing,
    'cpu': cpu.unavailable,
    'triton': triton_kernels.unavailable,
    'cuda': cuda.unavailable,
    'mamba_ssm': mamba_ssm_adapter.unavailable,
}

TABLE: Dict[str, Dict[str, Cell]] = {
    'scan': {
        'reference': Cell(reference.scan),
        'torch': Cell(chunked.scan),
        'export': Cell(export.scan),
        'cpu': Cell(cpu.scan, cpu.scan_limit),
        'triton': Cell(triton_kernels.scan, triton_kernels.scan_limit),
        'mamba_ssm': Cell(mamba_ssm_adapter.scan, mamba_ssm_adapter.scan_limit),
    },
    'conv': {
        'reference': Cell(reference.conv),
        'torch': Cell(chunked.conv),
        'export': Cell(export.conv),
        'cpu': Cell(cpu.conv, cpu.conv_limit),
        'triton': Cell(triton_kernels.conv, triton_kernels.conv_limit),
        'mamba_ssm': Cell(mamba_ssm_adapter.conv, mamba_ssm_adapter.conv_limit),
    },
    'mixer': {
        'cpu': Cell(cpu.mixer, cpu.mixer_limit),
        'cuda': Cell(cuda.mixer, cuda.mixer_limit),
    },
    'ssd': {
        'reference': Cell(ssd.reference),
        'torch': Cell(ssd.by_length),
        'export': Cell(ssd.by_length),
        'cpu': Cell(cpu.ssd, cpu.ssd_limit),
        'triton': Cell(triton_kernels.ssd, triton_kernels.ssd_limit),
    },
    'grid_conv': {
        'triton': Cell(triton_kernels.grid_conv, triton_kernels.grid_conv_limit),
    },
    'grid_mixer': {
        'cpu': Cell(cpu.grid_mixer, cpu.grid_mixer_limit),
        'triton': Cell(triton_kernels.grid_mixer, triton_kernels.grid_mixer_limit),
    },
    'masked_grid_mixer': {
        'cpu': Cell(cpu.grid_mixer, cpu.grid_mixer_limit),
        'triton': Cell(triton_kernels.masked_grid_mixer, triton_kernels.masked_grid_mixer_limit),
    },
    'random_mask': {
        'triton': Cell(triton_kernels.random_mask, triton_kernels.random_mask_limit),
    },
    'visible_pixels': {
        'triton': Cell(triton_kernels.visible_pixels, triton_kernels.visible_pixels_limit),
    },
    'visible_neighbours': {
        'triton': Cell(triton_kernels.visible_neighbours, triton_kernels.visible_neighbours_limit),
    },
    'rms_norm': {
        'cpu': Cell(cpu.rms_norm, cpu.rms_norm_limit),
    },
    'add_norm': {
        'triton': Cell(triton_kernels.add_norm, triton_kernels.add_norm_limit),
    },
    'linear': {
        'cpu': Cell(cpu.linear, cpu.linear_limit),
    },
    'swiglu': {
        'cpu': Cell(cpu.swiglu, cpu.swiglu_limit),
        'triton': Cell(triton_kernels.swiglu, triton_kernels.swiglu_limit),
    },
}

OPERATORS = tuple(TABLE)

# Backends made of aten's operators, which have every derivative.
DIFFERENTIABLE = ('reference', 'export')

# The backend whose cell `auto` prefers on a device.
KERNELS: Dict[str, Dict[str, str]] = {
    'scan': {'cuda': 'triton', 'cpu': 'cpu'},
    'conv': {'cuda': 'triton', 'cpu': 'cpu'},
    'mixer': {'cuda': 'cuda', 'cpu': 'cpu'},
    'ssd': {'cuda': 'triton', 'cpu': 'cpu'},
    'grid_conv': {'cuda': 'triton'},
    'grid_mixer': {'cuda': 'triton', 'cpu': 'cpu'},
    'masked_grid_mixer': {'cuda': 'triton', 'cpu': 'cpu'},
    'random_mask': {'cuda': 'triton'},
    'visible_pixels': {'cuda': 'triton'},
    'visible_neighbours': {'cuda': 'triton'},
    'rms_norm': {'cpu': 'cpu'},
    'add_norm': {'cuda': 'triton'},
    'linear': {'cpu': 'cpu'},
    'swiglu': {'cuda': 'triton', 'cpu': 'cpu'},
}

_forced = os.environ.get('VIM_TIMM_SCAN') or 'auto'
_why_unavailable: Dict[str, str] = {}
_announced: Set[Tuple[str, str]] = set()


class BackendStatus(NamedTuple):
    name: str
    available: bool
    reason: str  # why not, '' when available
    operators: Tuple[str, ...]  # that have a cell of this backend


def set_scan_backend(name: str) -> None:
    """Force the backend of every operator from here on: 'auto' or a key of `BACKENDS`.

    Raises:
        ValueError: the name is not known.
        RuntimeError: the backend cannot be used in this process.
    """
    global _forced
    if name != 'auto':
        _require(name)
    _forced = name


def get_scan_backend() -> str:
    """The forced backend's name, or 'auto'."""
    return _forced


@contextlib.contextmanager
def use_scan_backend(name: str) -> Iterator[None]:
    """`set_scan_backend` for a with-block."""
    global _forced
    before = _forced
    set_scan_backend(name)
    try:
        yield
    finally:
        _forced = before


def wants_any_derivative() -> bool:
    """Whether derivatives may be asked for that kernels have not: in a transform, or where such a backend is forced."""
    return _forced in DIFFERENTIABLE or transformed()


def probe_backends() -> None:
    """Find out once which kernels this process can use, so that no probe runs inside a traced region."""
    for name in {name for row in KERNELS.values() for name in row.values()} | ({_forced} & set(BACKENDS)):
        _unavailable(name)


def explain() -> List[BackendStatus]:
    """Each backend, whether it can be used in this process, if not, why, and what it computes."""
    return [
        BackendStatus(
            name, not _unavailable(name), _unavailable(name), tuple(row for row in OPERATORS if name in TABLE[row])
        )
        for name in BACKENDS
    ]


def auto_backend(device_type: str, operator: str = 'scan') -> str:
    """The backend `auto` takes for an operator on a device, in eager mode, where no limit forbids it; '' for none."""
    kernel = KERNELS[operator].get(device_type)
    return kernel if kernel is not None and not _unavailable(kernel) else _if_there('torch', operator)


def _unavailable(name: str) -> str:
    if name not in _why_unavailable:
        _why_unavailable[name] = BACKENDS[name]()
    return _why_unavailable[name]


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend '{name}': choose auto, {', '.join(BACKENDS)}")
    if _unavailable(name):
        raise RuntimeError(f"scan backend '{name}' cannot be used here: {_unavailable(name)}")


def _if_there(name: str, operator: str) -> str:
    return name if name in TABLE[operator] else ''


def choose(operator: str, operands: Any, x: torch.Tensor) -> str:
    """The name of the backend that runs an operator, '' where there is none and the caller composes it of others.

    Args:
        operator: A key of `TABLE`.
        operands: What its cells take.
        x: The operand whose device decides.

    Raises:
        ValueError: VIM_TIMM_SCAN names an unknown backend.
        RuntimeError: a forced backend cannot run here or not on such operands.
    """
    cells = TABLE[operator]
    if _forced != 'auto':
        _require(_forced)
        limit = ''
        if _forced in cells:
            limit = REFUSAL if _forced not in DIFFERENTIABLE and transformed() else cells[_forced].limit(operands)
        if limit:
            raise RuntimeError(f"scan backend '{_forced}' cannot run this call: {limit}")
        return _if_there(_forced, operator)
    kernel = KERNELS[operator].get(x.device.type)
    if kernel is None and 'torch' not in cells:  # nor `export`: nothing below could find one
        return ''
    if x.is_meta or _is_exporting() or transformed():
        return _if_there('export', operator)
    if kernel is not None and not _unavailable(kernel) and not cells[kernel].limit(operands):
        return kernel
    return _if_there('export' if torch.compiler.is_compiling() else 'torch', operator)


def find(operator: str, operands: Any, x: torch.Tensor) -> Optional[Callable[[Any], Any]]:
    """The function that runs an operator, see `choose`; None where the caller composes it."""
    name = choose(operator, operands, x)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # the limits' questions would be recorded
    if not traced and (operator, name) not in _announced:
        _announce(operator, name, operands, x)
    return TABLE[operator][name].run if name else None


def run_if_there(operator: str, operands: Any, x: torch.Tensor) -> Any:
    """What a backend computes, outside autocast; None where the operator is composed of others."""
    run = find(operator, operands, x)
    if run is None:
        return None
    with autocast_off(x):
        return run(operands)


def require(operator: str, operands: Any, x: torch.Tensor) -> Callable[[Any], Any]:
    """As `find`, of an operator that is not composed of others.

    Raises:
        RuntimeError: the forced backend has none.
    """
    run = find(operator, operands, x)
    if run is None:
        raise RuntimeError(
            f"scan backend '{_forced}' has no {operator} of its own: it computes whole blocks that scan in both "
            'directions, none of whose layers is hooked, wrapped or replaced'
        )
    return run


def _is_exporting() -> bool:
    # Dynamo answers torch.compiler.is_exporting() with True under torch.compile too in torch 2.11; the flag is exact.
    return getattr(torch.compiler, '_is_exporting_flag', False) or torch.jit.is_tracing()


def _announce(operator: str, name: str, operands: Any, x: torch.Tensor) -> None:
    """Say once which backend runs an operator, and once for each reason that `torch` does, which costs speed."""
    _announced.add((operator, name))
    kernel = KERNELS[operator].get(x.device.type)
    why = ''
    if _forced == 'auto' and kernel is not None and name in ('', 'torch'):
        why = _unavailable(kernel) or TABLE[operator][kernel].limit(operands)
    if not why:
        _logger.info('%s runs on the `%s` backend', operator, name or 'aten')
    elif not name:
        _logger.info('%s is composed of other operators: %s', operator, why)
    elif ('', why) not in _announced:
        _announced.add(('', why))
        _logger.warning('what follows runs on the slower `torch` backend: %s', why)
