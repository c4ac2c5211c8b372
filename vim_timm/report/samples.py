"""Which pictures to show, and how: tiny ones enlarged by whole pixels, large ones made smaller."""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from .metrics import Scores

SIDE = 160  # pixels of the longer side in a page, at most
SHOWN = 130  # of the longer side of a tiny picture that is enlarged, at most
TINY = 64  # pixels of the longer side up to which a picture is stored as it is


def choose(scores: Scores, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `limit` right predictions, drawn at random, and of the `limit` most confident wrong ones."""
    right, wrong = np.flatnonzero(scores.correct), np.flatnonzero(~scores.correct)
    drawn = np.random.default_rng(0).permutation(right)[:limit]
    return np.sort(drawn), wrong[np.argsort(-scores.scores[wrong], kind='stable')][:limit]


def read(dataset: Any, place: int) -> Image.Image | None:
    """The picture at a place of the data set, at its size or smaller; None where the data set is streamed."""
    if isinstance(dataset, IterableDataset):
        return None
    return smaller(as_picture(dataset[place][0]), 2 * SIDE)


def as_picture(image: Any) -> Image.Image:
    """The image; of an array (C, H, W) in 0..1 the first three channels, or the first one."""
    if not isinstance(image, torch.Tensor):
        return image
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray((shown * 255).round().byte().permute(1, 2, 0).numpy())


def smaller(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture in RGB, its longer side `side` pixels at most."""
    image = image.convert('RGB')
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def enlargement(image: Image.Image) -> int:
    """By how many times a tiny picture is shown larger than it is."""
    return max(1, SHOWN // max(image.size))


def embedded(image: Image.Image, side: int = SIDE) -> str:
    """A picture inside a page; photographs as JPEG, for a page may hold many."""
    shown = smaller(image, side)
    if max(shown.size) <= TINY:
        return data_uri(shown)
    file = io.BytesIO()
    shown.save(file, format='JPEG', quality=85)
    return data_uri(file.getvalue(), 'jpeg')


def data_uri(image: bytes | Image.Image, kind: str = 'png') -> str:
    """An image inside a page: the bytes of a file of this kind, or a PIL image."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, format='PNG')
        image = file.getvalue()
    return f'data:image/{kind};base64,{base64.b64encode(image).decode()}'
