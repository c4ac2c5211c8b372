"""Predictions for image files: a model, what its images look like, and the names of its classes, in one object."""

import dataclasses
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from ..data.folder import natural_key
from ..data.images import MODES, PHONE, channels_of, image_endings, read_image
from ..errors import UserError, sentence
from .process import usual_defaults
from .saved import Saved


@dataclasses.dataclass
class Prediction:
    """What a model says of one image.

    Attributes:
        file: where it is.
        classes, scores: the most probable classes and their softmax probabilities, best first.
        labels: their numbers.
        features: (C,) pooled features, where they were asked for.
        image: the picture as PIL, where it was asked for; seen: what the model saw of it, resized and cropped.
        heat: (H, W) what `explain` found in `seen`, from 0 to 1.
        error: why it could not be read; there is nothing else then.
    """

    file: str
    classes: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    features: np.ndarray | None = None
    image: Image.Image | None = None
    seen: Image.Image | None = None
    heat: np.ndarray | None = None
    error: str = ''


def image_files(inputs: Iterable[str]) -> list[str]:
    """The files that are meant: themselves, those of folders at any depth, those that match a pattern.

    Raises:
        UserError: one of them does not exist, or holds no images.
    """
    endings, files = image_endings() | PHONE, []
    for word in inputs:
        if os.path.isdir(word):
            found = [path for path in _below(word) if os.path.splitext(path)[1].lower() in endings]
        elif os.path.exists(word):
            found = [word]
        else:
            found = sorted((path for path in glob.glob(word, recursive=True) if os.path.isfile(path)), key=natural_key)
        if not found:
            raise UserError(f'there are no images in {word}' if os.path.isdir(word) else f'there is no image {word}')
        files += found
    return list(dict.fromkeys(files))


def _below(folder: str) -> list[str]:
    """Every file below a folder that is not hidden, in natural order."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        paths += [os.path.join(place, name) for name in names if not name.startswith('.')]
    return sorted(paths, key=natural_key)


class Predictor:
    """Classifies image files: `for prediction in Predictor(saved)(['photos/'])`.

    Args:
        saved: the model.
        run: images (B, C, H, W) -> logits (B, classes), in place of the model's own forward pass.
        device: where to compute.
        top: how many classes to name.
        features: also give the model's pooled features.
        pictures: also give the picture.
        explain: `explain(model, images (B, C, H, W), labels (B,)) -> (B, h, w)` in place of nothing: where the model
            looks.
    """

    def __init__(
        self, saved: Saved, run: Callable[[torch.Tensor], torch.Tensor] | None = None, device: str = 'cpu',
        top: int = 5, batch_size: int = 32, features: bool = False, pictures: bool = False,
        explain: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):  # fmt: skip
        self.saved, self.device, self.top, self.batch_size = saved, torch.device(device), top, batch_size
        self.features, self.pictures, self.explain = features, pictures, explain
        self.model = saved.model if run else saved.model.to(self.device)
        self.run = run or self.model
        with usual_defaults():
            self.transform: Any = create_transform(**saved.data_config, is_training=False)
        channels = saved.data_config['input_size'][0]
        if channels not in MODES:
            raise UserError(f'the model takes images of {channels} channels, which image files do not have')
        self.mode = saved.image_mode or MODES[channels]
        if channels_of(self.mode) != channels:
            raise UserError(f'the model takes {channels} channels, which images of mode {self.mode} do not have')

    def __call__(self, inputs: str | Iterable[str]) -> Iterator[Prediction]:
        """Predictions in the order of the files; one that cannot be read has an `error` and nothing else."""
        files = iter(image_files([inputs] if isinstance(inputs, str) else inputs))
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            while batch := list(itertools.islice(files, self.batch_size)):
                with usual_defaults():
                    found = list(self._predict(batch, list(threads.map(self._read, batch))))
                yield from found

    def _read(self, file: str) -> tuple[torch.Tensor | None, tuple[Any, Any], str]:
        """What the model takes, the picture before and after it was resized and cropped, why it cannot be read."""
        try:
            with open(file, 'rb') as opened:
                image = read_image(opened, self.mode)
            seen = image
            for step in self.transform.transforms:
                found = step(seen)
                if not isinstance(found, Image.Image):
                    break
                seen = found
            return self.transform(image), (image, seen) if self.pictures else (None, None), ''
        except (OSError, ValueError) as error:
            return None, (None, None), sentence(error)

    def _predict(self, files: Sequence[str], read: Sequence[Any]) -> Iterator[Prediction]:
        tensors = [tensor for tensor, _, _ in read if tensor is not None]
        known: Iterator[Prediction] = iter(())
        if tensors:
            known = iter(self._of_images(torch.stack(tensors).to(self.device)))
        for file, (tensor, (image, seen), error) in zip(files, read):
            if tensor is None:
                yield Prediction(file, error=error)
            else:
                yield dataclasses.replace(next(known), file=file, image=image, seen=seen)

    def _of_images(self, images: torch.Tensor) -> list[Prediction]:
        with torch.inference_mode():
            pooled = None
            if self.features:
                tokens = self.model.forward_features(images)
                pooled = self.model.forward_head(tokens, pre_logits=True).float().cpu().numpy()
            logits = self.run(images).float().cpu()
        if logits.ndim != 2:
            raise UserError('the model returns no logits, a row of classes an image: its head pools nothing')
        if not torch.isfinite(logits).all():
            raise UserError('the model returns values that are not finite: its weights are broken')
        labels = logits.topk(min(self.top, logits.shape[1])).indices  # some probabilities are tied where logits are not
        scores = logits.softmax(1).gather(1, labels)
        heat = None
        if self.explain:
            heat = self.explain(self.model, images, labels[:, 0].to(self.device)).cpu().numpy()
        return [
            Prediction(
                '', [self._name(label) for label in labels[row].tolist()], scores[row].tolist(), labels[row].tolist(),
                None if pooled is None else pooled[row], heat=None if heat is None else heat[row],
            )
            for row in range(len(logits))
        ]  # fmt: skip

    def _name(self, label: int) -> str:
        names = self.saved.class_names
        return names[label] if label < len(names) else str(label)
