"""Files that are written whole or not at all."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO


def write_atomically(path: str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it: `path` is never half a file.

    Args:
        content: text, bytes, or a function that writes to an open file.

    Raises:
        OSError: the disk is full, say; it names `path`, which is as it was before.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(printable(content).encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':
            _flush_folder(os.path.dirname(path) or '.')
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch.save hides what failed behind a RuntimeError about its own state
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from error
        raise


def printable(text: str) -> str:
    """The text in Unicode: bytes of a file name that are none, which Python keeps as surrogates, become `\\udc..`."""
    return text.encode(errors='backslashreplace').decode()


def duplicate(source: str, path: str) -> None:
    """Give a finished file a second name (a copy, where the file system has no hard links), atomically."""
    temporary = f'{path}.tmp'
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, 'rb') as file:
            return write_atomically(path, lambda copy: shutil.copyfileobj(file, copy))
    os.replace(temporary, path)
    with contextlib.suppress(FileNotFoundError):  # POSIX renames nothing when both names are the same file
        os.remove(temporary)


def table(rows: Sequence[Mapping[str, Any]], *first: str) -> str:
    """Rows as CSV; the columns are those of `first`, then all other names, in order of appearance."""
    text = io.StringIO()
    names = dict.fromkeys([*first, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, list(names), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(content: Any, indent: int | None = 1) -> str:
    """Content as JSON: numbers that are not finite, which JSON has not, are null; what it cannot hold is its str."""
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent) + '\n'


def _flush_folder(folder: str) -> None:
    """Make renames in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
