"""Memory that converting a training checkpoint of the original code takes: `python -m benchmarks.convert_memory`.

Writes a synthetic checkpoint of Vim-B in the authors' format (model, model_ema and AdamW's two moments, 1.6 GB) into a
temporary folder, converts it in a process of its own, and prints the most memory that the conversion held, over what
the process held before, as a ratio to the tensors that it keeps. Needs Linux.
"""

import argparse
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch

import vim_timm  # noqa: F401  registers the models
from vim_timm.hub.convert import convert

NAME = 'vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2'


def write_checkpoint(path: Path) -> int:
    """Write the checkpoint and return the bytes of its `model`."""
    ours = timm.create_model('vim_base_patch16_224', device='meta').state_dict()
    names = [re.sub(r'^norm\.', 'norm_f.', re.sub(r'^blocks\.', 'layers.', name)) for name in ours]

    def weights() -> dict[str, torch.Tensor]:
        return {name: torch.rand(value.shape) for name, value in zip(names, ours.values())}

    moments = {place: {'exp_avg': a, 'exp_avg_sq': b} for place, (a, b) in enumerate(zip(*[weights().values()] * 2))}
    content = {'model': weights(), 'model_ema': weights(), 'optimizer': {'state': moments, 'param_groups': []}}
    for moment in moments.values():
        moment['exp_avg_sq'] = moment['exp_avg_sq'].clone()
    torch.save({**content, 'epoch': 299, 'args': argparse.Namespace(model=NAME, input_size=224)}, path)
    return sum(value.nbytes for value in content['model'].values())


def memory(line: str) -> int:
    """A line of this process's status, in bytes."""
    return 1024 * int(re.search(rf'{line}:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])  # type: ignore[index]


def measure(source: Path, target: Path) -> int:
    """The most memory that a conversion holds, over what this process held before, in bytes."""
    before = memory('VmRSS')
    convert(source, target)
    return memory('VmHWM') - before


def in_a_process(function: Callable[..., int], *arguments: Any) -> int:
    """What a function returns in a new process; ends with its error, or with BrokenProcessPool if it was killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / 'checkpoint.pth', Path(folder) / 'model.safetensors'
        kept = in_a_process(write_checkpoint, source)
        peak = in_a_process(measure, source, target)
        size, written = source.stat().st_size, target.stat().st_size
        print(f'{size / 1e9:.2f} GB read, {written / 1e9:.2f} GB written; peak {peak / 1e9:.2f} GB more than before')
        print(f'{peak / kept:.2f} x the tensors it keeps ({kept / 1e9:.2f} GB)')


if __name__ == '__main__':
    main()
