"""Standard output and error that take any text, and whose loss ends no run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Lasting:
    """A text stream that becomes the null device when it can be written no more: its reader left, its disk is full."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _lose(self, error: OSError) -> None:
        with open(os.devnull, 'wb') as null:
            os.dup2(null.fileno(), self.stream.fileno())  # and what is in buffers goes there at the end of the process
        if self.name == 'stdout':
            print(f'warning: the output can be written no more ({error.strerror}): its rest is lost', file=sys.stderr)


def open_streams() -> None:
    """Open standard streams that are closed (`>&-`, pythonw, some services) on the null device: a file would take their
    number. Let the others write what their encoding lacks as `\\u...`."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))
        elif mode == 'w' and hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Within this block print() does not fail."""
    open_streams()
    streams = sys.stdout, sys.stderr
    if not isinstance(sys.stdout, Lasting):
        sys.stdout, sys.stderr = Lasting(sys.stdout, 'stdout'), Lasting(sys.stderr, 'stderr')  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
