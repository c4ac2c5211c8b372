"""Files in class folders, of a directory or a tar: which there are, of which class, and which are passed over."""

import functools
import hashlib
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from typing import IO, BinaryIO, NamedTuple

from timm.data.readers.reader import Reader

from ..errors import UserError

# Folders that timm takes for a split beside the one of the split's own name, in this order.
_SYNONYMS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'), ('test',))
_HIDDEN = {'__MACOSX', '@eaDir', '$RECYCLE.BIN'}  # folders of systems whose names have no dot in front
HIDDEN, NO_FILE, NO_CLASS = 'hidden', 'no regular files', 'beside the class folders'
UNMAPPED, EMPTY = 'of no class in the class map', 'class folders without images'


class File(NamedTuple):
    """A file of a data set.

    Attributes:
        name: path below the root, with slashes.
        start, size: where its bytes are in a tar.
    """

    name: str
    start: int = 0
    size: int = 0


class Images(Reader):
    """timm's reader of image folders and tars, in an order that depends on the names alone.

    A class is named by the innermost folder of its files and numbered in natural order (1, 2, 10), as in timm; with
    `outermost`, by the outermost folder and numbered by name (1, 10, 2), as in torchvision. Files without a class
    folder are passed over, unless there are no others: then there are no classes, and every label is 0.

    Args:
        root: the directory or tar.
        endings: of the files to take, in lower case.
        folder: folder in the root; it alone is read.
        class_map: class numbers by name; files of other classes are passed over.

    Attributes:
        root: where files lie: the directory, or the tar.
        share: in words, which part of the files this is; '' for all.
        bounds: of each class by name, the largest draw of a file's name by which `keep` holds it out.
        class_to_idx: class numbers by name; empty without class folders.
        samples: (file, class number).
        labelled: whether files lie in class folders.
        passed_over: names of files and folders that are no data, by reason.

    Raises:
        UserError: it is ambiguous of which class a file is, or the tar is damaged.
        OSError: the directory or tar cannot be read.
    """

    def __init__(
        self, root: str, endings: Collection[str], folder: str = '', class_map: Mapping[str, int] | None = None,
        outermost: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.passed_over: dict[str, list[str]] = {}
        self.bounds: dict[str, str] = {}
        self.tar = os.path.isfile(root)
        self.root = os.path.join(root, folder) if folder and not self.tar else root
        folders: dict[str, list[File]] = {}  # of each class folder the files that are data
        for file, why in _in_tar(root, folder) if self.tar else _in_directory(self.root):
            place, name = (file.name, '') if why == EMPTY else posixpath.split(file.name)
            ending = posixpath.splitext(name)[1].lower()
            if why != HIDDEN:
                files = folders.setdefault(place.split('/')[0] if outermost else place, [])
                if not why and ending in endings:
                    files.append(file)
                    continue
            if why != EMPTY:
                self._pass_over(why or (f'with the ending {ending}' if ending else 'without an ending'), file.name)
        loose = folders.pop('', [])
        self.class_to_idx = self._number(folders, outermost) if class_map is None else dict(class_map)
        self.samples = self._of_classes(folders)
        self.labelled = bool(self.samples)
        if self.labelled:
            for file in loose:
                self._pass_over(NO_CLASS, file.name)
        else:
            self.samples = [(file, 0) for file in loose]
        self.samples.sort(key=lambda sample: (natural_key(sample[0].name), sample[0].name))
        self.share = ''

    def keep(self, fraction: float, seed: int, held_out: bool, bounds: Mapping[str, str] | None = None) -> None:
        """Keep one of two parts of each class: the share that is held out for evaluation, or the rest.

        Which file is in which part depends on the seed and the names in its class alone, not on where the folder lies.

        Args:
            fraction: share of a class to hold out, rounded; of two images and more at least one is in either part.
            bounds: what `self.bounds` was when the images were parted before: those in these classes stay in their
                part, whichever have come or gone since.
        """
        names: dict[int, str] = {}
        for name, label in self.class_to_idx.items():
            names.setdefault(label, name)
        self.bounds = {}  # not those of the reader that this is a copy of
        by_class: dict[int, list[File]] = {}
        for file, label in self.samples:
            by_class.setdefault(label, []).append(file)
        chosen: set[File] = set()
        for label, files in by_class.items():
            draws = {file: _draw(seed, file.name) for file in files}
            bound = (bounds or {}).get(names.get(label, ''))
            if bound is None:
                count = min(max(round(fraction * len(files)), 1), len(files) - 1)
                bound = sorted(draws.values())[count - 1] if count else ''
            self.bounds[names.get(label, '')] = bound
            chosen.update(file for file, draw in draws.items() if draw <= bound)
        self.share = f', of {len(self.samples)} in all: --val-fraction {fraction:g} of each class, by --seed {seed}'
        self.samples = [sample for sample in self.samples if (sample[0] in chosen) == held_out]

    @staticmethod
    def _number(folders: Mapping[str, list[File]], outermost: bool) -> dict[str, int]:
        places: dict[str, str] = {}
        for folder in sorted(folder for folder, files in folders.items() if files):
            name = posixpath.basename(folder)
            if places.setdefault(name, folder) != folder:
                raise UserError(
                    f'the folders {places[name]} and {folder} would be one class, {name}, for the innermost folder '
                    'names it: rename one, list the classes with --class-map, or take the outermost folders for '
                    'classes with --dataset torch/image_folder'
                )
        names = sorted(places, key=lambda name: ([] if outermost else natural_key(name), name))
        return {name: number for number, name in enumerate(names)}

    def _of_classes(self, folders: Mapping[str, list[File]]) -> list[tuple[File, int]]:
        """Files with their class numbers; what has none is passed over."""
        samples = []
        filled = {posixpath.basename(folder) for folder, files in folders.items() if files}
        for folder, files in folders.items():
            name = posixpath.basename(folder)
            if name not in filled:
                self._pass_over(EMPTY, folder)
            for file in files:
                if name in self.class_to_idx:
                    samples.append((file, self.class_to_idx[name]))
                else:
                    self._pass_over(UNMAPPED, file.name)
        return samples

    def _pass_over(self, why: str, name: str) -> None:
        self.passed_over.setdefault(why, []).append(name)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        """The open file and its class number."""
        file, label = self.samples[index]
        if not self.tar:
            return open(os.path.join(self.root, file.name), 'rb'), label
        with open(self.root, 'rb') as tar:  # opened anew: loading processes would share its position
            tar.seek(file.start)
            return io.BytesIO(tar.read(file.size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0].name
        return posixpath.basename(name) if basename else os.path.join(self.root, name) if absolute else name


def _draw(seed: int, name: str) -> str:
    return hashlib.blake2b(f'{seed} {name}'.encode(errors='surrogatepass'), digest_size=8).hexdigest()


def natural_key(name: str) -> list[str | int]:
    """timm's order of names: case does not matter, and whole numbers in them count as numbers."""
    parts: list[str | int] = list(re.split(r'(\d{1,4000})', name.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts


def is_split(name: str) -> bool:
    """Whether this is a usual name of a split."""
    return any(name.lower() in names for names in _SYNONYMS)


def split_folder(split: str, folders: Collection[str]) -> str:
    """The one of these folders that holds a split (also under a name that timm takes for the split's), or ''."""
    synonyms = next((names for names in _SYNONYMS if split.lower() in names), ())
    for name in (split, *synonyms) if split else ():
        for same in (lambda text: text, str.lower):
            for folder in folders:
                if same(folder) == same(name):
                    return folder
    return ''


def top_folders(root: str) -> list[str]:
    """Folders right in a directory or tar, without hidden ones."""
    if os.path.isfile(root):
        names = {file.name.partition('/')[0] for file, _ in _members(root) if '/' in file.name}
    else:
        with os.scandir(root) as entries:
            names = {entry.name for entry in entries if _is_directory(entry)}
    return sorted(name for name in names if not _is_hidden(name))


def _in_directory(root: str) -> Iterator[tuple[File, str]]:
    """Every file below a directory, with '' or why it is no data; of a hidden or an empty folder the folder."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [('', frozenset())]
    while pending:
        below, above = pending.pop()
        state = os.stat(os.path.join(root, below))
        identity = (state.st_dev, state.st_ino)
        if state.st_ino and identity in above:  # a link to a folder that it lies in
            continue
        empty = True
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                name = posixpath.join(below, entry.name)
                if _is_hidden(entry.name):
                    yield File(name), HIDDEN
                    continue
                empty = False
                if _is_directory(entry):
                    pending.append((name, above | {identity}))
                else:
                    yield File(name), '' if _can_be_read(entry) else NO_FILE
        if empty and below:
            yield File(below), EMPTY


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in _HIDDEN


def _is_directory(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _can_be_read(entry: os.DirEntry) -> bool:
    """Whether opening it ends: with a file's content or an error. A pipe would be waited for."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:
        return True


def _in_tar(root: str, folder: str) -> Iterator[tuple[File, str]]:
    """Every file of a tar (or in a folder of it), with '' or why it is no data."""
    for file, why in _members(root):
        if not folder:
            yield file, why
        elif file.name.startswith(f'{folder}/'):
            yield file._replace(name=file.name[len(folder) + 1 :]), why


def _members(path: str) -> list[tuple[File, str]]:
    state = os.stat(path)
    return _read_members(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=2)
def _read_members(path: str, modified: int, size: int) -> list[tuple[File, str]]:
    try:
        with open(path, 'rb') as file:
            return list(_list_members(file, '', 0))
    except tarfile.TarError as error:
        raise UserError(
            f'{path} is damaged or no tar ({error}): unpack it, or make it again without compression'
        ) from error


def _list_members(file: IO[bytes], below: str, start: int) -> Iterator[tuple[File, str]]:
    """Members of a tar, and of the tars in it, which stand for folders.

    Args:
        below: folder that stands for this tar.
        start: where it begins in the outermost one.
    """
    with tarfile.open(fileobj=file, mode='r:') as tar:
        # of one name the last counts, as where a tar is unpacked: `tar -r` and `tar -u` leave the ones before it there
        members = {posixpath.normpath(posixpath.join(below, member.name.lstrip('/'))): member for member in tar}
        for name, member in members.items():
            inner = tar.extractfile(member) if member.isreg() else None
            if any(map(_is_hidden, name.split('/'))):
                if not member.isdir():
                    yield File(name), HIDDEN
            elif inner and name.lower().endswith('.tar'):
                yield from _list_members(inner, name[: -len('.tar')], start + member.offset_data)
            elif not member.isdir():
                whole = member.isreg() and not member.issparse()
                yield File(name, start + member.offset_data, member.size), '' if whole else NO_FILE
