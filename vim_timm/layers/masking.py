"""Random masks over image patches.

Source: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377, section 3.
"""

from typing import Tuple

import torch

from vim_timm.ops import Noise, random_mask


def check_ratio(ratio: float) -> None:
    """Raise ValueError for a mask ratio that removes nothing or everything."""
    if not 0.0 < ratio < 1.0:
        raise ValueError(f'mask_ratio must be above 0 and below 1, not {ratio}')


def num_kept(num_patches: int, ratio: float) -> int:
    """Patches that stay visible: the product cut to an integer, so 100 patches at ratio 0.9 keep 9, as the original's.

    Raises:
        ValueError: none stays.
    """
    kept = int(num_patches * (1 - ratio))
    if kept < 1:
        raise ValueError(
            f'mask_ratio {ratio} leaves none of {num_patches} patches visible: lower it, or use smaller patches'
        )
    return kept


def random_masking(noise: torch.Tensor, ratio: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """The patches with the least noise stay visible.

    Args:
        noise: A number for each patch (B, L), all of an image different.
        ratio: Share of the patches to remove.

    Returns:
        Indices of the visible patches (B, K), ascending, since a scan needs its tokens in order (the original leaves
        them in the order of their noise), and the mask (B, L) in float32, 1 where a patch is removed.

    Raises:
        ValueError: no patch stays.
    """
    kept = num_kept(noise.shape[1], ratio)
    drawn = random_mask(Noise(noise.detach(), kept))
    if drawn is not None:
        return drawn
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the first of equal numbers
        least = noise.topk(kept, dim=1, largest=False).indices
    else:
        least = noise.argsort(dim=1, stable=True)[:, :kept]
    keep = least.sort(dim=1).values
    mask = torch.ones(noise.shape, device=noise.device, dtype=torch.float32).scatter(1, keep, 0.0)
    return keep, mask


def take_tokens(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The tokens (B, K, D) of x (B, L, D) at the indices keep (B, K)."""
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def kept_patches(x: torch.Tensor, keep: torch.Tensor, patches: int) -> torch.Tensor:
    """The kept patches (B, K, D) of x: of all `patches` of a grid, or of those that are kept already.

    Raises:
        ValueError: x has another number of them, or of images.
    """
    if x.shape[0] != keep.shape[0]:
        raise ValueError(f'places of the visible patches of {keep.shape[0]} images do not go with {x.shape[0]} images')
    if x.shape[1] == patches:
        return take_tokens(x, keep)
    if x.shape[1] != keep.shape[1]:
        raise ValueError(f'{x.shape[1]} patches are neither all of the grid nor the {keep.shape[1]} of keep')
    return x


def sample_noise(seed: int, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform noise that depends on the seed and a sample's own numbers alone: splitmix64, seeded by their hash.

    The same on every device, in any batch and for any number of processes, and without a loop over samples.

    Args:
        keys: Numbers of each sample (B, N) int64, such as its epoch and its position there.
        count: Numbers to draw for each sample.

    Returns:
        (B, count) float32 in [0, 1), of 24 random bits each.
    """
    state = torch.full_like(keys[:, 0], seed)
    for numbers in keys.unbind(dim=1):
        state = _mix(state + _GAMMA) + numbers
    steps = torch.arange(1, count + 1, device=keys.device)
    return (_mix(_mix(state + _GAMMA)[:, None] + steps * _GAMMA) >> 40 & (1 << 24) - 1).float() / (1 << 24)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): int64 products wrap, masks make its shifts logical ones."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(pattern: int) -> int:
    """64 bits as the int64 that torch takes."""
    return pattern - (1 << 64) if pattern >> 63 else pattern


_GAMMA = _signed(0x9E3779B97F4A7C15)
