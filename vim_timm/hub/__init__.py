"""Checkpoints of the original code, and how to make them ours."""

from vim_timm.hub.convert import from_original, load_original_file

__all__ = ['from_original', 'load_original_file']
