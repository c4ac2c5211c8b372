"""MNIST's gzipped files read in place: torchvision wants them unpacked, or downloads them again."""

import gzip
import os
import struct

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

KINDS = {'torch/mnist': MNIST, 'torch/fashion_mnist': FashionMNIST, 'torch/kmnist': KMNIST}


class CompressedIdx(Dataset):
    """Images as PIL (L), labels as int, from `ROOT/NAME/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`.

    Args:
        dataset: one of `KINDS`.

    Raises:
        ValueError: a file is not of the IDX format of its kind, or the numbers of images and labels differ.
    """

    def __init__(self, dataset: str, root: str, train: bool):
        kind = KINDS[dataset.lower()]
        self.classes = kind.classes
        folder = os.path.join(root, kind.__name__)
        stem = os.path.join(folder, 'raw', 'train' if train else 't10k')
        self.images = _read(f'{stem}-images-idx3-ubyte.gz', dimensions=3)
        self.labels = _read(f'{stem}-labels-idx1-ubyte.gz', dimensions=1).tolist()
        if len(self.images) != len(self.labels):
            raise ValueError(f'{len(self.images)} images and {len(self.labels)} labels in {folder}')

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


def is_compressed(dataset: str, root: str | None) -> bool:
    """Whether torchvision's folder of this data set has the gzipped files and not the unpacked ones."""
    if not root or dataset.lower() not in KINDS:
        return False
    plain = os.path.join(root, KINDS[dataset.lower()].__name__, 'raw', 'train-images-idx3-ubyte')
    return os.path.isfile(f'{plain}.gz') and not os.path.isfile(plain)


def _read(path: str, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: magic number 0x08 and the number of dimensions, their sizes, the values."""
    with gzip.open(path) as file:
        content = file.read()
    header = struct.Struct(f'>{dimensions + 1}I')
    if len(content) < header.size or content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f'{path} is no IDX file of bytes in {dimensions} dimensions')
    shape = header.unpack_from(content)[1:]
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)
