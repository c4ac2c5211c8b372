"""Which pictures to show, and how: small ones enlarged by whole pixels, large ones made smaller."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from .metrics import Scores

SIDE = 160  # pixels of the longer side, about


def choose(scores: Scores, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `limit` right predictions, drawn at random, and of the `limit` most confident wrong ones."""
    right, wrong = np.flatnonzero(scores.correct), np.flatnonzero(~scores.correct)
    drawn = np.random.default_rng(0).permutation(right)[:limit]
    return np.sort(drawn), wrong[np.argsort(-scores.scores[wrong], kind='stable')][:limit]


def read(dataset: Any, place: int) -> Image.Image | None:
    """The picture at a place of the data set, as it is stored; None where the data set is streamed."""
    if isinstance(dataset, IterableDataset):
        return None
    return fit(dataset[place][0])


def fit(image: Image.Image) -> Image.Image:
    """The picture at about `SIDE` pixels."""
    image = image.convert('RGB')
    longest = max(image.size)
    if longest > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return image
    factor = max(1, SIDE // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def data_uri(image: bytes | Image.Image, kind: str = 'png') -> str:
    """An image inside a page: the bytes of a file of this kind, or a PIL image."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, format='PNG')
        image = file.getvalue()
    return f'data:image/{kind};base64,{base64.b64encode(image).decode()}'
