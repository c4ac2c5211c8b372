"""Counting of images that cannot be read: distinct ones, over all epochs, loading processes and splits of a run."""

import contextlib
import hashlib
import multiprocessing
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

from ..errors import TrainingStopped
from ..files import printable


class Unreadable:
    """Names each unreadable image once, and ends the run when there are too many.

    Args:
        limit: how many there may be.
        workers: number of loading processes, which share the count.
    """

    def __init__(self, limit: int, workers: int = 0):
        self.limit = limit
        self._known = RawArray('q', limit + 1)  # of each one so far the hash of its name; 0 is a free place
        self._lock: Any = multiprocessing.Lock() if workers else contextlib.nullcontext()

    def skip(self, name: str, why: str, key: str = '') -> None:
        """Say that an image is skipped, and why, unless that was said before.

        Args:
            key: what tells it from others (default: the name).

        Raises:
            TrainingStopped: it is one too many.
        """
        digest = hashlib.blake2b((key or name).encode(errors='surrogatepass'), digest_size=8).digest()
        mark = int.from_bytes(digest, 'little', signed=True) or 1
        with self._lock:
            known = np.frombuffer(self._known, np.int64)
            count = int(np.count_nonzero(known))
            if mark in known[:count]:
                return
            count += 1
            if count <= len(known):
                known[count - 1] = mark
        name = printable(name)
        print(f'unreadable image {name}, skipped ({why})', flush=True)
        if count > self.limit:
            raise TrainingStopped(
                f'{count} unreadable images, more than --max-unreadable {self.limit}; the last one is {name} ({why})'
            )
