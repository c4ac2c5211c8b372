"""Model families; importing this package registers every model with timm."""

from vim_timm.models.trunk import Trunk
from vim_timm.models.vision_mamba import VisionMamba

__all__ = ['Trunk', 'VisionMamba']
