"""Where a process of a run computes, and in which precision."""

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Process:
    """Facts of one process, which follow from the settings and the machine.

    Attributes:
        device: where it computes.
        dtype: dtype of images and weights.
        autocast_dtype: the lower precision of mixed precision; None without it.
        rank, local_rank, world_size: its number among all processes and among those of its machine, and how many
            there are.
    """

    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def primary(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @property
    def precision(self) -> str:
        """In words: `float32`, `bfloat16 AMP`."""
        return str(self.autocast_dtype or self.dtype).rpartition('.')[2] + (' AMP' if self.autocast_dtype else '')

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)
