"""The page of all models, from the registry: `python -m vim_timm.hub.catalogue > docs/models.md`."""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import create_model, get_pretrained_cfg, list_models, list_pretrained, model_entrypoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vim_timm.models  # noqa: F401  registers the models
from vim_timm.models.pretrained import PACKAGED
from vim_timm.ops import use_scan_backend

_COLUMNS = ('| model | image | parameters | GMAC | weights | top-1 | licence |', '|---|---|---|---|---|---|---|')
# top-1 in percent on ImageNet-1k as the authors report it, of weights that are theirs
REPORTED = {
    'vim_tiny_patch16_224.hustvl_in1k': 76.1,
    'vim_small_patch16_224.hustvl_in1k': 80.5,
    'vim_base_patch16_224.hustvl_in1k': 81.9,
    'vim_tiny_patch16_stride8_224.hustvl_in1k_ft_in1k': 78.3,
    'vim_small_patch16_stride8_224.hustvl_in1k_ft_in1k': 81.6,
}
FAMILIES = {
    'vision_mamba': ('Vision Mamba', 'https://arxiv.org/abs/2401.09417'),
    'vision_mamba_hybrid': ('Vision Mamba with attention', ''),
    'vision_mamba2': ('Vision Mamba 2', ''),
    'masked_autoencoder': ('Masked autoencoders', 'https://arxiv.org/abs/2111.06377'),
    'factorized_mae': ('Masked autoencoder with factorized attention', ''),
}
HEAD = """# Models

Made from the registry by `python -m vim_timm.hub.catalogue > docs/models.md`; a test fails when it is stale.

Parameters and GMAC are those of the usual head and image. **GMAC** is half of the FLOPs that torch's counter finds of
one image: a product of matrices or a convolution counts a multiplication and an addition, a scan 9 FLOPs a token,
channel and state in each of its directions, one of them an exponential; norms and activations count nothing.
**Weights** are the tags that `pretrained=True` finds, the first by default; **top-1** is in percent, for the authors'
weights as they report it of ImageNet-1k, for `cifar10`, which comes with the package, as `validate.py` printed it of
CIFAR-10.
"""
TIMM = """## What timm itself offers at this size

Vim-Ti is not what to take for accuracy at 7 million parameters: convolutional and mixed networks of its size are 3 to
5 points better, and faster. Take a Vision Mamba for long sequences, for research, or because its weights run alike
everywhere. Top-1 and images a second (RTX 4090, mixed precision, eager / compiled) are timm's own, at the image size in
brackets where it is not 224 (of two sizes, the speed is at the second); `dist` is distilled, `in22k` saw ImageNet-22k.

| model | parameters | GMAC | top-1 | images a second |
|---|---|---|---|---|
| `deit_tiny` / distilled | 5.7 / 5.9 M | 1.26 | 72.2 / 74.5 | 18,600 / 23,500 |
| **`vim_tiny_patch16_224`** (authors) | 7.1 M | 1.56 | 76.1 | [0.57 of DeiT-Ti's on an H100](benchmarks.md) |
| `efficientvim_m1` (450 epochs) / dist | 6.7 M | 0.24 | 73.5 / 74.6 | |
| `xcit_tiny_12_p16` / dist | 6.7 M | 1.24 | 77.1 / 78.6 | 6,500 / 14,300 |
| `convnext_femto` (224, 288) | 5.2 M | 0.79, 1.30 | 77.5, 78.7 | 6,700 / 13,000 |
| `levit_128` dist | 9.2 M | 0.41 | 78.5 | 20,000 / 37,900 |
| `mambaout_femto` (224, 288) | 7.3 M | 1.16, 1.91 | 78.9, 79.9 | 4,500 / 8,700 |
| `repvit_m0_9` dist | 5.5 M | 0.82 | 79.1 | 11,400 / 16,600 |
| `repvit_m1_0` dist | 7.3 M | 1.11 | 80.4 | 9,600 / 14,100 |
| `tiny_vit_5m` / in22k dist | 5.4 M | 1.27 | 79.2 / 80.9 | 7,000 / 11,500 |
| `mobilenetv4_conv_medium` (256) | 9.7 M | 1.10 | 79.9 | 4,100 / 6,300 (at 384) |
| `fastvit_t12` / dist (256) | 7.6 M | 1.39 | 79.3 / 80.4 | 5,500 / 7,900 |
| `edgenext_small` (256) | 5.6 M | 1.26 | 81.1 | 3,600 / 6,600 (at 320) |
| `efficientnet_b1` (240) | 7.8 M | | 80.4 | 3,900 / 4,600 |

At 22 to 28 million: `deit3_small` 81.4, `vit_little_reg4` 82.5, `mambaout_tiny` 82.7, `hiera_tiny` 82.8; Vim-S 80.5.
"""


def names() -> Iterator[str]:
    """Registered models of this package under their full names, family by family; none that is for tests."""
    for family in FAMILIES:
        for name in list_models(module=family):
            cfg = get_pretrained_cfg(name, allow_unregistered=True)
            if cfg is not None and cfg.architecture in (None, name) and not name.startswith('test_'):
                yield name


def cost(name: str) -> tuple[int, float, tuple[int, ...]]:
    """Parameters, GMAC and (channels, height, width) of a model, without computing anything.

    The convention is that of `ops.registration`, which every backend shares; the CPU kernel's operators stand for all.
    """
    model: Any = create_model(name, device='meta').eval()
    parameters, size = sum(value.numel() for value in model.parameters()), model.pretrained_cfg['input_size']
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        use_scan_backend('cpu'),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        model = model.to_empty(device='cpu')
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *size))
    return parameters, counter.get_total_flops() / 2e9, size


def weights(name: str) -> list[tuple[str, str, str]]:
    """(tag, top-1, licence) of every published weight of a model."""
    rows = []
    for tagged in list_pretrained(name):
        cfg: Any = get_pretrained_cfg(tagged)
        accuracy = REPORTED.get(tagged) or _packaged_accuracy(tagged)
        licence = f'{cfg.license}{", in the text non-commercial" if cfg.notes else ""}'
        rows.append((cfg.tag, '' if accuracy is None else f'{accuracy:.1f}', licence))
    return rows


def _packaged_accuracy(tagged: str) -> float | None:
    """The accuracy in the card of a weight that comes with the package."""
    path = Path(PACKAGED / tagged / 'README.md')
    found = (
        re.search(r'type: accuracy\n\s+value: ([\d.]+)', path.read_text(encoding='utf-8')) if path.is_file() else None
    )
    return float(found[1]) if found else None


def row(name: str) -> str:
    """A model's line."""
    parameters, gmac, size = cost(name)
    tags, accuracy, licence = (', '.join(column) for column in zip(*weights(name) or [('', '', '')]))
    image = 'x'.join(map(str, size)) if size[0] != 3 or size[1] != size[2] else str(size[1])
    return f'| `{name}` | {image} | {parameters:,} | {gmac:.3f} | {tags} | {accuracy} | {licence} |'


def family_of(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition('.')[2]


def page() -> str:
    """The text of docs/models.md."""
    parts = [HEAD]
    for family, members in itertools.groupby(names(), family_of):
        title, paper = FAMILIES[family]
        rows = [*_COLUMNS, *map(row, members)]
        parts.append(f'## {title}\n\n' + (f'[Paper]({paper}).\n\n' if paper else '') + '\n'.join(rows) + '\n')
    return '\n'.join([*parts, TIMM])


def main() -> int:
    argparse.ArgumentParser('vim_timm.hub.catalogue', description=__doc__).parse_args()
    sys.stdout.write(page())
    return 0


if __name__ == '__main__':
    sys.exit(main())
