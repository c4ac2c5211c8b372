"""How well `predict --explain` finds what a model looks at: `python -m benchmarks.explain CHECKPOINT`.

Deletion and insertion (RISE, 2018) of integrated gradients, beside occlusion, Grad-CAM and random maps, on the
evaluation split of the data that the checkpoint was trained on. CPU; a minute for a small model.
"""

import argparse

import torch

import vim_timm  # noqa: F401  registers the models
from vim_timm import data, validate
from vim_timm.data import Loader
from vim_timm.engine.explain import METHODS, measure
from vim_timm.engine.saved import open_saved
from vim_timm.settings import Process


def random_map(model, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    grid = METHODS['integrated gradients'](model, images[:1], labels[:1]).shape[1:]
    return torch.rand(len(images), *grid, generator=torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser('benchmarks.explain', description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint')
    parser.add_argument('--images', type=int, default=256)
    options = parser.parse_args()
    saved = open_saved(options.checkpoint)
    args = validate.parse_args(['--checkpoint', options.checkpoint, '--batch-size', str(options.images), '-j', '0'])
    channels = saved.data_config['input_size'][0]
    loader: Loader = data.eval_loader(
        args, Process(), data.make_dataset(args, args.split, False, channels), saved.data_config
    )
    batch = next(iter(loader.epoch(0)))
    images, labels = batch.images, batch.targets
    right = saved.model(images).argmax(1) == labels
    print(f'{len(labels)} images, {100 * right.float().mean():.1f} % right; maps of the true class')
    for name, method in {**METHODS, 'random': random_map}.items():
        deletion, insertion = measure(saved.model, images, labels, method(saved.model, images, labels))
        print(f'{name:22} deletion {deletion:.3f}  insertion {insertion:.3f}  difference {insertion - deletion:.3f}')


if __name__ == '__main__':
    main()
