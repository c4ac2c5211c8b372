"""Counting of images that cannot be read: distinct ones, over all epochs, loading processes, splits and ranks."""

import contextlib
import hashlib
import multiprocessing
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch.distributed as dist

from ..errors import TrainingStopped
from ..files import printable


class Unreadable:
    """Names each unreadable image once, and ends the run when there are too many.

    Args:
        limit: how many there may be.
        workers: number of loading processes, which share the count; `share` adds those of other ranks.
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
        count = self._add(mark)
        if not count:
            return
        name = printable(name)
        print(f'unreadable image {name}, skipped ({why})', flush=True)
        if count > self.limit:
            raise TrainingStopped(
                f'{count} unreadable images, more than --max-unreadable {self.limit}; the last one is {name} ({why})'
            )

    def share(self, ranks: int) -> None:
        """Count what any rank has met; every rank must call it, at the same place.

        Raises:
            TrainingStopped: all of them together are too many; raised on every rank.
        """
        if ranks == 1:
            return
        met: list[Any] = [None] * ranks
        dist.all_gather_object(met, self._marks())
        for mark in sorted(set().union(*met)):
            self._add(mark)
        count = len(self._marks())
        if count > self.limit:
            raise TrainingStopped(
                f'the ranks met more than --max-unreadable {self.limit} unreadable images together: see above'
            )

    def _marks(self) -> list[int]:
        with self._lock:
            known = np.frombuffer(self._known, np.int64)
            return known[: np.count_nonzero(known)].tolist()

    def _add(self, mark: int) -> int:
        """How many there are with this new one, 0 if it is known."""
        with self._lock:
            known = np.frombuffer(self._known, np.int64)
            count = int(np.count_nonzero(known))
            if mark in known[:count]:
                return 0
            if count < len(known):
                known[count] = mark
            return count + 1
