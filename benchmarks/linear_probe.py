"""A linear classifier on an encoder's features: of pretrained weights, and of random ones of the same model.

    python -m benchmarks.linear_probe ENCODER.safetensors --data-dir FOLDER [--model NAME] [--shares 1 0.1]

`FOLDER` has train/CLASS/* and validation/CLASS/*. Features are averaged over patches and computed once, from images as
evaluation prepares them; the classifier is scikit-learn's logistic regression on standardized features. A share below 1
takes that part of each class's training images. Unlike `--linear-probe` of `train.py` there is no augmentation, so that
a CPU is enough. Prints a table in Markdown: top-1 on the validation images, and seconds of the classifier alone.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import vim_timm  # noqa: F401  registers the models


def features(model: torch.nn.Module, folder: Path, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, C) and class names (N) of a folder's images."""
    transform = create_transform(**resolve_model_data_config(model))
    images_of = ImageFolder(str(folder), transform)
    loader = DataLoader(images_of, 256, num_workers=1)
    found, classes = [], []
    for images, targets in loader:
        with torch.inference_mode():
            found.append(model(images.to(device)).float().cpu().numpy())
        classes.append(targets.numpy())
    return np.concatenate(found), np.array(images_of.classes)[np.concatenate(classes)]


def part(classes: np.ndarray, share: float) -> np.ndarray:
    """Places of the first `share` of each class."""
    places = (np.flatnonzero(classes == k) for k in np.unique(classes))
    return np.concatenate([own[: round(share * len(own))] for own in places])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('encoder', type=Path)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--model', default='vim_tiny_patch4_32')
    parser.add_argument('--shares', nargs='+', type=float, default=[1.0, 0.1])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights')
    args = parser.parse_args()
    print('| features | labels | top-1 | seconds of the classifier |\n|---|---|---|---|')
    for name in ('pretrained', 'random'):
        torch.manual_seed(args.seed)
        overlay = {'file': str(args.encoder), 'num_classes': -1}
        weights = {'pretrained': True, 'pretrained_cfg_overlay': overlay} if name == 'pretrained' else {}
        model = timm.create_model(args.model, num_classes=0, global_pool='avg', **weights).to(args.device).eval()
        x, y = features(model, args.data_dir / 'train', args.device)
        x_val, y_val = features(model, args.data_dir / 'validation', args.device)
        for share in args.shares:
            start = time.perf_counter()
            places = part(y, share)
            scaler = StandardScaler().fit(x[places])
            classifier = LogisticRegression(C=0.1, max_iter=300).fit(scaler.transform(x[places]), y[places])
            top1 = 100 * classifier.score(scaler.transform(x_val), y_val)
            seconds = time.perf_counter() - start
            print(f'| {name} | {len(places):,} | {top1:.2f} | {seconds:.0f} |', flush=True)


if __name__ == '__main__':
    main()
