"""The embedded default data set: scikit-learn's 1797 handwritten digits, 8 x 8 pixels, 10 classes.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (CC BY 4.0).
"""

import importlib.resources

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset):
    """Images as PIL in `mode`, labels as int; a fixed fifth of each class is held out for `train=False`."""

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, mode: str = 'L'):
        with (importlib.resources.files('vim_timm') / 'weights' / 'digits.npz').open('rb') as file:
            archive = np.load(file)
            images, labels = archive['images'], archive['labels']
        held_out = np.zeros(len(labels), dtype=bool)
        rng = np.random.default_rng(0)
        for digit in range(10):
            members = rng.permutation(np.flatnonzero(labels == digit))
            held_out[members[: round(len(members) / 5)]] = True
        keep = ~held_out if train else held_out
        # 17 grey levels, 0..16
        self.images = (images[keep].astype(np.float32) * (255 / 16)).round().astype(np.uint8)
        self.labels = labels[keep].tolist()
        self.image_mode = mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.image_mode), self.labels[index]
