"""`python -m vim_timm.doctor`: what this machine can run, and why not: versions, devices, backends, attention.

`--weights` checks the SHA-256 of published weights instead: of those in the package and in the Hub's cache.
"""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('doctor'))

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import try_to_load_from_cache
from timm.models._hub import hf_split

from vim_timm import __version__, ops
from vim_timm.layers.attention import KERNELS, attention_kernels

from .errors import UserError, run
from .models.checkpoint import CheckpointError
from .models.pretrained import check_sum, published
from .settings import parsers

_PACKAGES = ('torchvision', 'timm', 'triton', 'mamba-ssm', 'causal-conv1d')


def _versions() -> list[str]:
    lines = [
        f'python {platform.python_version()} on {platform.platform()}',
        f'vim-timm {__version__}',
        f'torch {torch.__version__}',
    ]
    for package in _PACKAGES:
        try:
            lines.append(f'{package} {version(package)}')
        except PackageNotFoundError:
            lines.append(f'{package}: not installed')
    return lines


def _devices() -> list[str]:
    """The CPU, then every accelerator that torch sees."""
    lines = [f'cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}']
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        runtime = f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'
        lines.append(
            f'cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, '
            f'compute capability {device.major}.{device.minor}, {runtime}'
        )
    if torch.backends.mps.is_available():
        lines.append('mps: available')
    if torch.xpu.is_available():
        lines.append(f'xpu: {torch.xpu.device_count()} device(s)')
    return lines


def _backends() -> list[str]:
    return [
        f'{status.name}: ' + (f'not available: {status.reason}' if status.reason else 'available')
        + f' (has {", ".join(status.operators)})'
        for status in ops.explain()
    ]  # fmt: skip


def _forced(variable: str, known: Iterable[str], effect: str) -> list[str]:
    """A line on what an environment variable forces, if anything; every model refuses an unknown name."""
    name, names = os.environ.get(variable) or 'auto', [other for other in known if other != 'auto']
    if name == 'auto':
        return []
    return [f'{variable}={name} ' + (effect if name in names else f'is unknown: choose auto, {", ".join(names)}')]


def _choices() -> list[str]:
    """The backend that `auto` takes for each operator on each device type, and what VIM_TIMM_SCAN forces."""
    devices = ['cpu'] + [name for name in ('cuda', 'mps', 'xpu') if getattr(torch, name).is_available()]
    lines = []
    for device in devices:
        taken = {operator: ops.auto_backend(device, operator) or 'by others' for operator in ops.OPERATORS}
        others = ', '.join(f'{operator} {name}' for operator, name in taken.items() if operator != 'scan')
        lines.append(f'{device}: {taken["scan"]} ({others})')
    return lines + _forced('VIM_TIMM_SCAN', ops.BACKENDS, 'overrides this')


def _attention() -> list[str]:
    """Which kernels of attention run where torch computes, and what VIM_TIMM_ATTN forces."""
    devices = ['cpu'] + [name for name in ('cuda', 'mps', 'xpu') if getattr(torch, name).is_available()]
    lines = []
    for device in devices:
        for name, reason in attention_kernels(device):
            lines.append(f'{device}: {name}: ' + (f'not available: {reason}' if reason else 'available'))
    return lines + _forced('VIM_TIMM_ATTN', KERNELS, 'is forced')


def report() -> str:
    """The whole report as text."""
    sections = {
        'Versions': _versions(),
        'Devices': _devices(),
        'Scan backends': _backends(),
        'auto picks': _choices(),
        'Attention kernels (hybrid models)': _attention(),
    }
    return '\n\n'.join('\n'.join([title, *(f'  {line}' for line in lines)]) for title, lines in sections.items())


def weights() -> tuple[list[str], int]:
    """A line for each published weight that says whether the file here is the right one, and the number of wrong ones.

    Nothing is downloaded.
    """
    lines, damaged = [], 0
    for name, cfg in published().items():
        path = cfg.file
        if not path:
            repository, revision = hf_split(cfg.hf_hub_id)
            path = try_to_load_from_cache(repository, cfg.hf_hub_filename, revision=revision)
        try:
            found = check_sum(path) if isinstance(path, str) else ''
            text = f'SHA-256 {found}, as it should be' if found else f'not downloaded, from {cfg.hf_hub_id}'
        except CheckpointError as error:
            text, damaged = str(error), damaged + 1
        lines.append(f'{name}: {text}')
    return lines, damaged


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(arguments: Sequence[str]) -> None:
        if not parsers.doctor(arguments).weights:
            return print(report())
        lines, damaged = weights()
        print('\n'.join(lines))
        if damaged:
            raise UserError(f'{damaged} of {len(lines)} weights are damaged')

    return run(body, 'doctor', argv)
