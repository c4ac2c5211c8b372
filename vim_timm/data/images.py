"""Decoding of image files: which ones can be, and how their pixels become channels of 8 bits."""

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageMode
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from ..errors import sentence

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:  # then the HEIC photographs of a phone are passed over, and named
    pass

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # PIL's mode by the number of channels

# Formats that Pillow opens and does not decode by itself: they need another program, or are no pictures.
_UNDECODABLE = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
PHONE = frozenset(('.heic', '.heif'))  # endings of photographs that Pillow reads once pillow-heif is installed
_SIXTEEN_BITS = ('PNG', 'PPM')  # formats whose mode I has 16 bits


def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow decodes here, in lower case: `.png`, `.jpg`, `.webp`, ..."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in Image.OPEN and kind not in _UNDECODABLE)


def channels_of(mode: str) -> int:
    """Number of channels of a PIL mode."""
    return len(ImageMode.getmode(mode).bands)


def read_image(file: BinaryIO, mode: str) -> Image.Image:
    """The first picture in an open file, in `mode`. As in timm, an orientation in its EXIF data is not applied.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    try:
        return to_mode(Image.open(file), mode)
    except Exception as error:  # of any kind, in damaged files
        if isinstance(error, Image.UnidentifiedImageError) and not PHONE & image_endings() and _is_heif(file):
            raise ValueError("a phone's HEIF: pip install pillow-heif") from error
        raise ValueError(reason(error)) from error


def _is_heif(file: BinaryIO) -> bool:
    file.seek(4)
    return file.read(8) in (b'ftypheic', b'ftypheix', b'ftypmif1')


def reason(error: BaseException) -> str:
    """Why an image could not be read."""
    if isinstance(error, Image.UnidentifiedImageError):  # its message shows the address of an object
        return 'Pillow cannot identify it: it is damaged, empty, or no image'
    return sentence(error)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in another PIL mode of 8 bits a channel. Grey values of 16 bits are scaled to that, not clipped.

    Raises:
        ValueError: it has 32-bit pixels, of which nobody knows the largest value.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in _SIXTEEN_BITS):
        image = _eight_bits(image)
    elif image.mode in ('I', 'F'):
        kind = 'whole' if image.mode == 'I' else 'floating-point'
        raise ValueError(f'its pixels are {kind} numbers of 32 bits, whose largest value is not known')
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    largest, inverted = 65535, False
    if image.format == 'TIFF':
        tags = image.tag_v2  # type: ignore[attr-defined]
        largest, inverted = 2 ** tags[BITSPERSAMPLE][0] - 1, tags.get(PHOTOMETRIC_INTERPRETATION) == 0
    values = np.asarray(image, dtype=np.float32) * (255 / largest)
    values = 255 - values if inverted else values
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
