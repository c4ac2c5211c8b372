"""Checkpoints of the original code, and how to make them ours."""

from typing import TYPE_CHECKING

from vim_timm.lazy import attributes

if TYPE_CHECKING:
    from vim_timm.hub.convert import from_original, load_original_file

__all__ = ['from_original', 'load_original_file']

__getattr__, __dir__ = attributes(__name__, dict.fromkeys(__all__, 'vim_timm.hub.convert'))
