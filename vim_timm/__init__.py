"""Vision Mamba for timm: where this package is imported, `timm.create_model` and the rest of timm know its models.

They are registered when both are imported, whichever comes first. By itself this package imports neither timm nor
torch: what it holds is imported when it is first used.
"""

from typing import TYPE_CHECKING

from vim_timm.lazy import After, attributes
from vim_timm.version import __version__

if TYPE_CHECKING:
    from vim_timm import hub as hub
    from vim_timm import layers as layers
    from vim_timm import models as models
    from vim_timm import ops as ops
    from vim_timm.models import VisionMamba
    from vim_timm.ops import get_scan_backend, set_scan_backend, use_scan_backend

__all__ = ['VisionMamba', '__version__', 'get_scan_backend', 'set_scan_backend', 'use_scan_backend']

__getattr__, __dir__ = attributes(
    __name__,
    {
        'VisionMamba': 'vim_timm.models',
        'get_scan_backend': 'vim_timm.ops',
        'set_scan_backend': 'vim_timm.ops',
        'use_scan_backend': 'vim_timm.ops',
        **{name: f'vim_timm.{name}' for name in ('hub', 'layers', 'models', 'ops')},
    },
)

After('timm', 'vim_timm.models')  # which registers them
