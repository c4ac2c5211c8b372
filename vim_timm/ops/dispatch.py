"""One function picks the backend of a scan: by what was forced, by tracing mode, by device, dtype and shape.

`auto` takes the kernel of the tensor's device (`triton` on CUDA, `cpu` on a CPU) where it can run, else `torch`; under
export, scripting and on meta tensors `export`, and under torch.compile `export` where `torch` would run eagerly.
The environment variable VIM_TIMM_SCAN or `set_scan_backend` forces one by name.
"""

import contextlib
import logging
import os
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch

from vim_timm.ops import chunked, cpu, cuda, export, mamba_ssm_adapter, reference, triton_kernels
from vim_timm.ops.operators import autocast_off

_logger = logging.getLogger('vim_timm')

BACKENDS = {
    'reference': reference,
    'torch': chunked,
    'export': export,
    'cpu': cpu,
    'triton': triton_kernels,
    'mamba_ssm': mamba_ssm_adapter,
}
_KERNEL_OF_DEVICE = {'cuda': 'triton', 'cpu': 'cpu'}

_forced = os.environ.get('VIM_TIMM_SCAN', 'auto')
_why_unavailable: Dict[str, str] = {}
_announced: Set[str] = set()


class BackendStatus(NamedTuple):
    name: str
    available: bool
    reason: str  # why not, '' when available


def set_scan_backend(name: str) -> None:
    """Force the backend of every scan and convolution from here on: 'auto' or a key of `BACKENDS`.

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


def probe_backends() -> None:
    """Find out once which kernels this process can use, so that no probe runs inside a traced region."""
    cuda.unavailable()
    for name in (*_KERNEL_OF_DEVICE.values(), _forced):
        if name in BACKENDS:
            _unavailable(name)


def explain() -> List[BackendStatus]:
    """Each backend, whether it can be used in this process, and if not, why."""
    return [BackendStatus(name, not _unavailable(name), _unavailable(name)) for name in BACKENDS]


def auto_backend(device_type: str) -> str:
    """The backend `auto` takes for float32 tensors of a device type, in eager mode."""
    kernel = _KERNEL_OF_DEVICE.get(device_type)
    return kernel if kernel is not None and not _unavailable(kernel) else 'torch'


def _unavailable(name: str) -> str:
    if name not in _why_unavailable:
        _why_unavailable[name] = BACKENDS[name].unavailable()
    return _why_unavailable[name]


def _require(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown scan backend '{name}': choose auto, {', '.join(BACKENDS)}")
    if _unavailable(name):
        raise RuntimeError(f"scan backend '{name}' cannot be used here: {_unavailable(name)}")


def choose(u: torch.Tensor, A: torch.Tensor) -> str:
    """The name of the backend that runs a scan of u (B, L, D) with A (D, N).

    Raises:
        ValueError: VIM_TIMM_SCAN names an unknown backend.
        RuntimeError: a forced backend cannot run here or not on such tensors.
    """
    if _forced != 'auto':
        _require(_forced)
        limit = BACKENDS[_forced].unsupported(u, A)
        if limit:
            raise RuntimeError(f"scan backend '{_forced}' cannot run this call: {limit}")
        return _forced
    if u.is_meta or _is_exporting():
        return 'export'
    kernel = _KERNEL_OF_DEVICE.get(u.device.type)
    if kernel is not None and not _unavailable(kernel) and not BACKENDS[kernel].unsupported(u, A):
        return kernel
    return 'export' if torch.compiler.is_compiling() else 'torch'


def fused_mixer(xz: torch.Tensor, A_log: torch.Tensor, rank: int, width: int) -> Optional[Callable[..., torch.Tensor]]:
    """The function that computes the inside of a block, `cuda.mixer` or `cpu.mixer`; None where neither can run.

    Args:
        xz: in_proj's output (B, L, 2 D).
        A_log: (D, N).
        rank: dt_rank.
        width: d_conv.
    """
    if xz.device.type == 'cpu' and choose(xz, A_log) == 'cpu':
        _announce('cpu', xz, A_log)
        return cpu.mixer
    if _forced != 'auto' or xz.device.type != 'cuda' or cuda.unavailable() or _is_exporting():
        return None
    return None if cuda.unsupported(xz, A_log.shape[1], rank, width) else cuda.mixer


def _is_exporting() -> bool:
    # Dynamo answers torch.compiler.is_exporting() with True under torch.compile too in torch 2.11; the flag is exact.
    return getattr(torch.compiler, '_is_exporting_flag', False) or torch.jit.is_tracing()


def _announce(name: str, u: torch.Tensor, A: torch.Tensor) -> None:
    """Say once a backend which one runs; a fallback that costs speed is a warning."""
    if name in _announced or torch.compiler.is_compiling():
        return
    _announced.add(name)
    kernel = _KERNEL_OF_DEVICE.get(u.device.type)
    if name == 'torch' and _forced == 'auto' and kernel is not None:
        why = _unavailable(kernel) or BACKENDS[kernel].unsupported(u, A)
        _logger.warning('selective scan runs on the slower `torch` backend: %s', why)
    else:
        _logger.info('selective scan runs on the `%s` backend', name)


def dispatch_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor] = None,
    delta_bias: Optional[torch.Tensor] = None,
    u_b: Optional[torch.Tensor] = None,
    delta_b: Optional[torch.Tensor] = None,
    A_b: Optional[torch.Tensor] = None,
    B_b: Optional[torch.Tensor] = None,
    C_b: Optional[torch.Tensor] = None,
    D_b: Optional[torch.Tensor] = None,
    delta_bias_b: Optional[torch.Tensor] = None,
    z: Optional[torch.Tensor] = None,
    scale: float = 1.0,
    delta_softplus: bool = True,
    A_is_log: bool = False,
) -> torch.Tensor:
    """`reference.scan` on the chosen backend."""
    name = choose(u, A)
    _announce(name, u, A)
    with autocast_off(u):
        return BACKENDS[name].scan(
            u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z, scale,
            delta_softplus, A_is_log,
        )  # fmt: skip


def dispatch_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    weight_b: Optional[torch.Tensor],
    bias_b: Optional[torch.Tensor],
    silu: bool,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """`reference.conv` on the chosen backend."""
    name = choose(x, weight)
    with autocast_off(x):
        return BACKENDS[name].conv(x, weight, bias, weight_b, bias_b, silu)
