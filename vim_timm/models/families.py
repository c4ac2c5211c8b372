"""Names of model families, told from the names of their weights, for error messages."""

import re
from typing import Collection, Dict, Tuple

_FAMILIES: Dict[Tuple[str, ...], str] = {}


def register_family(words: str, *patterns: str) -> None:
    """Call a state dict `words` if every pattern, a regular expression, is found in one of its names.

    Where several families fit, the one with the most patterns is meant: the most specific; of those the first.
    """
    _FAMILIES[patterns] = words


def describe_family(names: Collection[str]) -> str:
    """What a state dict with these names is of, in words for an error message."""
    for patterns in sorted(_FAMILIES, key=len, reverse=True):
        if all(any(re.search(pattern, name) for name in names) for pattern in patterns):
            return _FAMILIES[patterns]
    return 'an unknown family'


register_family('a vision transformer (ViT, DeiT)', r'attn\.qkv\.weight$')
register_family('MambaVision', r'^blocks\.\d+\.mixer\.in_proj_x')
register_family('a hierarchical model such as MambaVision', r'^levels\.\d+\.')
register_family('VMamba', r'(^|\.)x_proj_weight$')
register_family('a Mamba language model', r'^backbone\.(layers|embedding)')
register_family('Mamba-2', r'mixer\.dt_bias$')
register_family('a hierarchical model such as Swin or VMamba', r'^layers\.\d+\.blocks\.')
register_family('a staged network such as ConvNeXt or MambaOut', r'^stages\.')
register_family('a ResNet', r'^(conv1|bn1|layer1\.)')
register_family('a masked autoencoder with its decoder', r'^decoder[_.]', r'norm')
register_family('a unidirectional Mamba', r'mixer\.A_log$')
