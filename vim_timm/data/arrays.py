"""Images with any number of channels: NumPy arrays, and TIFF files with many pages or bands."""

import io
import logging
import os
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
)
from torch.utils.data import Dataset

from ..errors import UserError, sentence
from .folder import Images

ENDINGS = ('.npy', '.npz', '.tif', '.tiff')
_NUMPY, _TIFF = b'\x93NUMPY', (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # how such files begin
_NODATA = 42113  # GDAL's tag: the value, as text, of pixels that are none
_SUBFILE, _REDUCED = 254, 1  # the tag of a page that is another one made smaller, and its bit
_GREY, _COLOUR = 1, 2  # photometric interpretations whose values Pillow keeps
_MOST_BYTES = 1 << 32  # of one image: a compressed file may claim anything


class Arrays(Dataset):
    """Items of (image (C, H, W) float32 in 0..1, class number).

    Whole numbers of 8 and 16 bits without a sign are divided by the largest one, and values of other types must be in
    0..1. With `span`, values of any type are mapped from it to 0..1, and clipped.

    Args:
        reader: of `ENDINGS`.
        channels: C. It also tells (C, H, W) from (H, W, C) in files that do not say.
        key: name of the array in a .npz file with several.
        span: values that become 0 and 1.
    """

    floating = True  # what the loader asks: there is no PIL image here

    def __init__(self, reader: Images, channels: int, key: str = '', span: Sequence[float] | None = None):
        if span is not None and span[0] == span[1]:
            raise UserError(f'--input-span takes two different numbers, not {span[0]:g} twice')
        self.reader, self.channels, self.key, self.span = reader, channels, key, span

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.reader[index]
        with file:
            values = read_array(file, self.reader.filename(index), self.channels, self.key)
        return torch.from_numpy(unit_range(values, self.span)), label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image's file."""
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Names of all files."""
        return self.reader.filenames(basename, absolute)


def read_array(file: BinaryIO, name: str, channels: int, key: str = '') -> np.ndarray:
    """An image file as (C, H, W), in the type that it is stored in.

    Raises:
        ValueError: it is damaged, no such file, or has another number of channels; the message says why.
        UserError: it needs a library that is not installed, or a name of an array.
    """
    ending = os.path.splitext(name)[1].lower()
    try:
        if ending == '.npy':
            return _channels_first(_read_numpy(file), channels)
        if ending == '.npz':
            return _channels_first(_read_archive(file, key), channels)
        values = _read_tiff(file)
    except (UserError, ValueError):
        raise
    except Exception as error:  # of any kind, in damaged files
        raise ValueError(sentence(error)) from error
    if len(values) != channels:
        raise ValueError(f'it has {len(values)} bands, and the model takes {channels} channels')
    return values


def unit_range(values: np.ndarray, span: Sequence[float] | None = None) -> np.ndarray:
    """Values as float32 in 0..1, as `Arrays` says.

    Raises:
        ValueError: they are no real numbers, some are not finite, or it is not known what becomes 0 and 1.
    """
    kind = values.dtype
    if kind.kind not in 'buif':
        raise ValueError(f'its values are no numbers but {kind}')
    if kind.kind == 'f' and not np.isfinite(values).all():
        raise ValueError('some of its values are not finite (NaN or infinity)')
    if span is not None:
        return ((values.astype(np.float64) - span[0]) / (span[1] - span[0])).clip(0, 1).astype(np.float32)
    if kind.kind in 'bu' and kind.itemsize <= 2:
        return values.astype(np.float32) / (1 if kind.kind == 'b' else np.iinfo(kind).max)
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        raise ValueError(f'its values go from {low:.6g} to {high:.6g}: say with --input-span which become 0 and 1')
    return values.astype(np.float32)


def channel_statistics(dataset: Arrays, most: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over evenly spaced images of a data set, `most` at most.

    Raises:
        UserError: none of them can be read.
    """
    moments, why = [], ''
    for index in np.unique(np.linspace(0, len(dataset) - 1, most).round().astype(int)).tolist():
        try:
            image = dataset[index][0].double().flatten(1)
        except (OSError, ValueError) as error:  # named when it is loaded
            why = why or f'{dataset.filename(index)}: {sentence(error)}'
        else:
            moments.append(torch.stack([image.mean(1), image.square().mean(1)]))
    if not moments:
        raise UserError(f'no image of the data set can be read ({why})')
    mean, square = torch.stack(moments).mean(0)
    std = (square - mean.square()).clamp(min=1e-8).sqrt()
    return [round(value, 6) for value in mean.tolist()], [round(value, 6) for value in std.tolist()]


def _read_numpy(file: BinaryIO) -> np.ndarray:
    if file.read(len(_NUMPY)) != _NUMPY:
        raise ValueError('it is no NumPy file')
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _read_archive(file: BinaryIO, key: str) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        size = max((member.file_size for member in archive.infolist()), default=0)
    if size > _MOST_BYTES:
        raise ValueError(f'it claims {size / 2**30:.0f} GiB')
    with np.load(file, allow_pickle=False) as arrays:
        if (key or len(arrays.files) != 1) and key not in arrays.files:
            names = ', '.join(arrays.files) or 'nothing'
            raise UserError(f'a .npz file of the data holds {names}: name the images with --input-key')
        return arrays[key or arrays.files[0]]


def _channels_first(values: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of an array that may be (H, W) or (H, W, C); where both fit, it is (C, H, W) already."""
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or channels not in (values.shape[0], values.shape[2]):
        raise ValueError(f'its shape is {values.shape}, which is no image of {channels} channels')
    if not values.size:
        raise ValueError(f'its shape is {values.shape}, without any value')
    return values if values.shape[0] == channels else values.transpose(2, 0, 1)


def _read_tiff(file: BinaryIO) -> np.ndarray:
    """All bands of all pages (C, H, W). Pillow reads what it can as it is stored, tifffile the rest."""
    content = file.read()
    if content[:4] not in _TIFF:
        raise ValueError('it is no TIFF file')
    try:
        values, nodata = _with_pillow(content)
    except Exception as error:
        try:
            values, nodata = _with_tifffile(content)
        except ImportError:
            if isinstance(error, (Image.UnidentifiedImageError, _NotAsStored)):
                raise UserError("TIFF files with such bands need `pip install 'vim-timm[tiff]'`") from error
            raise error from None
    if nodata:
        with np.errstate(over='ignore'):  # another type's smallest number, which none of these is
            missing = np.count_nonzero(values == float(nodata))
        if missing:
            raise ValueError(
                f'{missing:,} of its {values.size:,} values are none: it says that {nodata} stands for no data (fill '
                'them, or take the mark away with gdal_edit.py -unsetnodata)'
            )
    return values


class _NotAsStored(ValueError):
    """Pillow would change the values of a page."""


def _with_pillow(content: bytes) -> tuple[np.ndarray, str]:
    """The bands, and what stands for no data in them, or ''."""
    if b'+' in content[:4]:  # a BigTIFF, which Pillow reads in part
        raise _NotAsStored
    bands: list[np.ndarray] = []
    nodata = ''
    logging.getLogger('PIL.TiffImagePlugin').addHandler(logging.NullHandler())  # it remarks on bands left to tifffile
    with Image.open(io.BytesIO(content), formats=['TIFF']) as image:
        for page in ImageSequence.Iterator(image):
            tags = page.tag_v2  # type: ignore[attr-defined]
            if tags.get(_SUBFILE, 0) & _REDUCED:
                continue
            nodata = nodata or _text(tags.get(_NODATA))
            samples, bits = tags.get(SAMPLESPERPIXEL, 1), set(tags.get(BITSPERSAMPLE, (1,)))
            grey = tags.get(PHOTOMETRIC_INTERPRETATION) == _GREY and samples == 1 and bits <= {1, 8, 16, 32}
            colour = tags.get(PHOTOMETRIC_INTERPRETATION) == _COLOUR and samples == 3 and bits == {8}
            if not (grey or colour) or (bits == {8} and set(tags.get(SAMPLEFORMAT, (1,))) != {1}):
                raise _NotAsStored
            if content[:2] == b'MM' and tags.get(COMPRESSION, 1) != 1 and page.mode in ('I', 'F'):
                raise _NotAsStored  # Pillow swaps bytes that its decompressor has swapped already
            values = np.asarray(page)
            bands += [values] if values.ndim == 2 else list(values.transpose(2, 0, 1))
    return np.stack(bands), nodata


def _text(tag: str | None) -> str:
    return (tag or '').strip('\0 ')


def _with_tifffile(content: bytes) -> tuple[np.ndarray, str]:
    """As `_with_pillow`."""
    import tifffile

    logging.getLogger('tifffile').addHandler(logging.NullHandler())  # what it logs of damaged files is said once, here
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        groups = tiff.series  # each page that tifffile wrote by a call of its own is one
        if len({(group.shape, group.axes, group.dtype) for group in groups}) != 1:
            raise ValueError(f'it has {len(groups)} groups of pages that differ in size or type')
        size = sum(group.nbytes for group in groups)
        if size > _MOST_BYTES:
            raise ValueError(f'it claims {size / 2**30:.0f} GiB')
        if any(group.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE for group in groups):
            raise ValueError('its values are places in a palette')
        axes = groups[0].axes.index('Y'), groups[0].axes.index('X')
        bands = [np.moveaxis(group.asarray(), axes, (-2, -1)) for group in groups]
        nodata = _text(tiff.pages.first.tags.valueof(_NODATA))
    return np.concatenate([values.reshape(-1, *values.shape[-2:]) for values in bands]), nodata
