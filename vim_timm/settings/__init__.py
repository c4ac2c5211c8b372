"""What a user chose, and where a process runs: flags and their ranges, parsing, facts of the process."""

from typing import TYPE_CHECKING

from vim_timm.lazy import attributes

from .parse import Settings

if TYPE_CHECKING:
    from .process import Process

__all__ = ['Process', 'Settings']

__getattr__, __dir__ = attributes(__name__, {'Process': 'vim_timm.settings.process'})
