"""Model families; importing this package registers every model with timm."""

from vim_timm.models.factorized_mae import FactorizedAutoencoder, FactorizedViT
from vim_timm.models.masked_autoencoder import MaskedAutoencoder
from vim_timm.models.trunk import Trunk
from vim_timm.models.vision_mamba import VisionMamba
from vim_timm.models.vision_mamba2 import VisionMamba2
from vim_timm.models.vision_mamba_hybrid import VisionMambaHybrid

__all__ = [
    'FactorizedAutoencoder',
    'FactorizedViT',
    'MaskedAutoencoder',
    'Trunk',
    'VisionMamba',
    'VisionMamba2',
    'VisionMambaHybrid',
]
