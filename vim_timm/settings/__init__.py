"""What a user chose, and where a process runs: flags and their ranges, parsing, facts of the process."""

from .parse import Settings
from .process import Process

__all__ = ['Process', 'Settings']
