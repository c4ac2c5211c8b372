"""Vision Mamba for timm: importing this package registers every model with `timm.create_model`."""

from vim_timm.models import VisionMamba
from vim_timm.ops import get_scan_backend, set_scan_backend, use_scan_backend
from vim_timm.version import __version__

__all__ = ['VisionMamba', '__version__', 'get_scan_backend', 'set_scan_backend', 'use_scan_backend']
