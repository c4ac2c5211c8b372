"""Data sets from flags: image folders and tars, the embedded digits, and timm's."""

import copy
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError, explain
from ..files import printable
from ..settings.programs import STREAMS, check_data
from .arrays import ENDINGS, Arrays
from .classes import class_names, read_class_map
from .digits import Digits
from .folder import HIDDEN, Images, is_split, split_folder, top_folders
from .idx import CompressedIdx, is_compressed
from .images import MODES, PHONE, channels_of, image_endings, read_image

TORCHVISION_FOLDERS = ('torch/image_folder', 'torch/folder')
DEFAULT_SHARE = 0.2  # of the images, to evaluate on, where the data has no split for that


class Pictures(Dataset):
    """Pictures of a timm reader: PIL images in `image_mode`, and the class that the reader says (-1 for none)."""

    def __init__(self, reader: Any, mode: str):
        self.reader, self.image_mode = reader, mode

    @classmethod
    def of(cls, dataset: Any) -> Any:
        """The same data set, read here: timm's replaces what it cannot read, and clips 16-bit pixels."""
        return cls(dataset.reader, dataset.input_img_mode) if type(dataset) is ImageDataset else dataset

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, target, *_ = self.reader[index]
        with file:
            return read_image(file, self.image_mode), -1 if target is None else target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image's file, relative to the folder of the data set."""
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Names of all files."""
        return self.reader.filenames(basename, absolute)


def image_mode(args: Any, channels: int) -> str:
    """PIL mode in which images are read for a model of so many channels.

    Raises:
        UserError: there is none, or the one that was asked for has another number of channels.
    """
    mode = args.input_img_mode or MODES.get(channels)
    if mode is None:
        raise UserError(
            f'a picture has 1 to 4 channels, and the model takes {channels}: --in-chans must be one of those, or files '
            'of more be read by --dataset arrays'
        )
    if channels_of(mode) != channels:
        raise UserError(
            f'--input-img-mode {mode} has {channels_of(mode)} channels, and the model takes {channels}: give both the '
            'same'
        )
    return mode


def make_dataset(args: Any, split: str, training: bool, channels: int) -> Any:
    """The data set of one split, without a transform.

    Raises:
        UserError: there is no such data set, folder or split, it is empty, or cannot have so many channels.
    """
    arrays = args.dataset == 'arrays'
    mode = '' if arrays else image_mode(args, channels)
    folder = _is_of_files(args)
    if args.class_map and not folder and args.dataset.startswith(('digits', 'torch/')):
        raise UserError(f'--class-map orders the classes of a folder or tar, not those of {args.dataset}')
    check_data(args)
    if args.dataset == 'digits':
        return Digits(split_folder(split, ('train',)) != '', mode)
    with explain(f'{args.dataset or "image folder"} {args.data_dir or ""}, split {split!r}'):
        if arrays:
            return Arrays(_image_files(args, split, ENDINGS), channels, args.input_key or '', args.input_span)
        if folder:
            endings = args.input_key.lower().split(';') if args.input_key else image_endings()
            return Pictures(_image_files(args, split, endings), mode)
        if is_compressed(args.dataset, args.data_dir):
            dataset: Any = CompressedIdx(args.dataset, args.data_dir, 'train' in split)
        else:
            dataset = Pictures.of(_timm_dataset(args, split, training, mode))
    if not args.dataset.startswith(STREAMS) and len(dataset) == 0:
        raise UserError(f'there are no images in {args.dataset}, split {split!r}')
    if hasattr(dataset, 'loader'):  # torchvision's of image files, which would clip 16-bit pixels
        dataset.loader = functools.partial(_load, mode=mode)
    dataset.image_mode = mode
    return dataset


def _image_files(args: Any, split: str, endings: Collection[str]) -> Images:
    root = args.data_dir
    if os.path.isfile(root) and not root.lower().endswith('.tar'):
        raise UserError('it is neither a folder nor a .tar')
    if '[' in split:
        raise UserError('a part of a split can be had of hfds/ and tfds/ data sets only')
    folders = top_folders(root)
    folder = split if os.path.isdir(os.path.join(root, split)) else split_folder(split, folders)
    if split and not folder:
        others = [name for name in folders if is_split(name)]
        if others:
            raise UserError(
                f'{root} has folders of splits ({", ".join(others)}), but none for split {split!r}: name one of them, '
                'or let training hold out a share of its images with --val-fraction'
            )
        if not is_split(split):
            raise UserError(f'there is no folder {split} in {root}')
    class_map = read_class_map(args.class_map, root) if args.class_map else None
    images = Images(root, endings, folder, class_map, outermost=args.dataset in TORCHVISION_FOLDERS)
    if not len(images):
        raise UserError(f'there are no images in {root}, split {split!r}{passed_over(images)}')
    return images


def held_out_share(args: Any) -> float:
    """The share of the training images to evaluate on, 0 where the data has a split for that.

    Raises:
        UserError: --val-fraction is asked for where it cannot be had.
    """
    asked = args.val_fraction or 0.0
    if not _is_of_files(args) or not args.data_dir or not os.path.exists(args.data_dir):
        if asked:
            raise UserError(f'--val-fraction holds out files of a folder or tar, not of {args.dataset or "no data"}')
        return 0.0
    folders = top_folders(args.data_dir)
    own = split_folder(args.val_split, folders)
    if asked and own:
        raise UserError(f'{args.data_dir} has a split to evaluate on, {own}: leave --val-fraction out')
    others = {name for name in folders if is_split(name)} - {split_folder(args.train_split, folders)}
    if asked or own or others or 'val_split' in args.chosen:
        return asked
    return DEFAULT_SHARE


def hold_out(dataset: Any, share: float, seed: int, bounds: Mapping[str, str] | None = None) -> tuple[Any, Any]:
    """Two parts of a data set of files: what stays for training, and a share of each class to evaluate on.

    Args:
        bounds: of a run that held images out before, in whose part they stay.

    Raises:
        UserError: it is no such data set, or the second part would be empty.
    """
    reader = getattr(dataset, 'reader', None)
    if not isinstance(reader, Images):
        raise UserError('--val-fraction holds out files of a folder or tar')
    parts = []
    for held_out in (False, True):
        part = copy.copy(dataset)
        part.reader = copy.copy(reader)
        part.reader.keep(share, seed, held_out, bounds)
        parts.append(part)
    if not len(parts[1]):
        raise UserError(f'--val-fraction {share:g} holds out no image of {reader.root}: a class needs two of them')
    return parts[0], parts[1]


def _is_of_files(args: Any) -> bool:
    return args.dataset in ('', 'arrays', *TORCHVISION_FOLDERS)


def _timm_dataset(args: Any, split: str, training: bool, mode: str) -> Any:
    undecoded = args.dataset.startswith(('wds/', 'hfids/'))  # these leave the mode to us
    endings = ';'.join(sorted(ending[1:] for ending in image_endings()))
    return create_dataset(
        args.dataset, root=args.data_dir, split=split, is_training=training,
        class_map=read_class_map(args.class_map, args.data_dir) if args.class_map else {},
        download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
        repeats=args.epoch_repeats if training else 0, input_img_mode='' if undecoded else mode,
        input_key=args.input_key or (endings if args.dataset.startswith('wds/') else None), target_key=args.target_key,
        num_samples=args.train_num_samples if training else args.val_num_samples,
        trust_remote_code=args.dataset_trust_remote_code,
    )  # fmt: skip


def _load(path: str, mode: str) -> Image.Image:
    with open(path, 'rb') as file:
        return read_image(file, mode)


def passed_over(reader: Any) -> str:
    """What a reader of image files does not read, and why, as the end of a sentence."""
    reasons = []
    for why, names in getattr(reader, 'passed_over', {}).items():
        shown = '' if why == HIDDEN else f' ({", ".join(sorted(names)[:2])}{", ..." if len(names) > 2 else ""})'
        hint = ': pip install pillow-heif' if why.endswith(tuple(PHONE)) else ''
        reasons.append(f'{len(names)} {why}{shown}{hint}')
    return f'; passed over: {", ".join(sorted(reasons))}' if reasons else ''


def same_images(one: Any, other: Any) -> bool:
    """Whether two splits of a folder or tar are the same files, under whichever names, or links to folders."""
    readers: Any = [getattr(dataset, 'reader', None) for dataset in (one, other)]
    if not all(isinstance(reader, Images) for reader in readers):
        return False
    files = [[file for file, _ in reader.samples] for reader in readers]
    folders = {os.path.dirname(file.name) for file in files[0]} if files[0] == files[1] else set()
    places = [[os.path.realpath(os.path.join(reader.root, folder)) for folder in folders] for reader in readers]
    return bool(folders) and places[0] == places[1]


def is_labelled(dataset: Any) -> bool:
    """Whether it says of which classes its images are; a folder or tar without class folders does not."""
    reader = getattr(dataset, 'reader', None)
    return not isinstance(reader, Images) or reader.labelled


def check_labelled(dataset: Any) -> None:
    """Refuse images of no classes, for what learns or measures classes: all would count as of class 0.

    Raises:
        UserError: that is all there are.
    """
    if not is_labelled(dataset):
        raise UserError(
            f'{dataset.reader.root} has no class folders, so nothing says of which class an image is: put the images '
            'of each class into a folder of its name'
        )


def describe(dataset: Any, split: str, args: Any) -> str:
    """A line on what will be read of a split: how many images of which classes, where, and what is passed over."""
    names, reader = class_names(dataset), getattr(dataset, 'reader', None)
    images = 'a stream' if isinstance(dataset, IterableDataset) else f'{len(dataset)} images'
    shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
    classes = f' of {len(names)} classes ({shown})' if names else ''
    where = ' in '.join(filter(None, (args.dataset, reader.root if isinstance(reader, Images) else args.data_dir)))
    where = f' in {where}' if where else ''
    return printable(f'{split}: {images}{classes}{where}{getattr(reader, "share", "")}{passed_over(reader)}')
