"""How well `predict --explain` finds what a model looks at: `python -m benchmarks.explain CHECKPOINT`.

Deletion and insertion (RISE, 2018) of integrated gradients, beside occlusion, Grad-CAM and random maps, on the
images that the checkpoint's run was evaluated on, as many as asked for at even distances: in a folder the classes
follow each other. CPU; a minute for a small model.
"""

import argparse
from typing import Any

import torch
from torch.utils.data import Subset

import vim_timm  # noqa: F401  registers the models
from vim_timm import data, validate
from vim_timm.data import Loader
from vim_timm.engine.explain import METHODS, measure
from vim_timm.engine.saved import open_saved
from vim_timm.settings import Process


def random_map(model, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    grid = METHODS['integrated gradients'](model, images[:1], labels[:1]).shape[1:]
    return torch.rand(len(images), *grid, generator=torch.Generator().manual_seed(0))


def spread(dataset: Any, count: int) -> Any:
    """So many images of a data set, at even distances."""
    part: Any = Subset(dataset, torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist())
    part.image_mode, part.floating = dataset.image_mode, getattr(dataset, 'floating', False)
    return part


def main() -> None:
    parser = argparse.ArgumentParser('benchmarks.explain', description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint')
    parser.add_argument('--images', type=int, default=256)
    options = parser.parse_args()
    saved = open_saved(options.checkpoint)
    words = ['--checkpoint', options.checkpoint, '--batch-size', str(options.images), '-j', '0']
    args, content = validate.read_args(words)
    dataset = validate.make_dataset(args, content)
    dataset = data.renumbered(dataset, saved.class_names, f'split {args.split!r}', options.checkpoint)
    loader: Loader = data.eval_loader(args, Process(), spread(dataset, options.images), saved.data_config)
    batch = next(iter(loader.epoch(0)))
    images, labels = batch.images, batch.targets
    right = saved.model(images).argmax(1) == labels
    print(f'{len(labels)} images, {100 * right.float().mean():.1f} % right; maps of the true class')
    for name, method in {**METHODS, 'random': random_map}.items():
        deletion, insertion = measure(saved.model, images, labels, method(saved.model, images, labels))
        print(f'{name:22} deletion {deletion:.3f}  insertion {insertion:.3f}  difference {insertion - deletion:.3f}')


if __name__ == '__main__':
    main()
