"""How a run came about: versions, commit, hardware and date, which its checkpoints keep for a model card."""

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch

from ..settings import Process
from ..version import __version__

ROOT = Path(__file__).parent.parent


def versions() -> str:
    """Versions of the packages that make the numbers."""
    return f'vim-timm {__version__}, timm {timm.__version__}, torch {torch.__version__}'


def commit() -> str:
    """The commit of this package, where it is run from a checkout or was installed from git; else ''."""
    try:
        git = subprocess.run(
            ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            capture_output=True, text=True, encoding='utf-8', timeout=10,
        )  # fmt: skip
        if git.returncode == 0 and (ROOT.parent / 'setup.py').is_file():
            return git.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    try:
        origin = json.loads(distribution('vim-timm').read_text('direct_url.json') or '{}')
    except PackageNotFoundError:
        return ''
    return origin.get('vcs_info', {}).get('commit_id', '')


def hardware(process: Process) -> str:
    """Name and number of the devices of a run."""
    device = process.device
    return f'{process.world_size} x {torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()}'


def _processor() -> str:
    try:
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(process: Process) -> dict[str, str]:
    """How the run that begins now comes about, by name."""
    return {
        'commit': commit(),
        'versions': versions(),
        'hardware': hardware(process),
        'precision': process.precision,
        'date': time.strftime('%Y-%m-%d'),
    }
