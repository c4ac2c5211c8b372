"""The choice of visible patches and their pixels as dispatcher ops: a launch each, where aten takes 13 and 6."""

import math
from typing import Any, Tuple

import torch
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import register_inference
from .launch import check

MASK_TOKENS, MASK_OTHERS, MASK_WARPS = 256, 32, 8  # of a step of `random_mask`
PIXELS, PIXEL_WARPS = 512, 4  # of a program of `visible_pixels`


def random_mask(kernels: Any, noise: Tensor, kept: int) -> Tuple[Tensor, Tensor]:
    if noise.dtype in (torch.bfloat16, torch.float16):  # which the interpreter does not order
        noise = noise.float()
    keep, mask = fake_mask(noise, kept)
    batch, length = noise.shape
    kernels.random_mask[(batch,)](
        noise, keep, mask, length, kept, *noise.stride(),
        BT=min(MASK_TOKENS, 1 << (length - 1).bit_length()), BU=MASK_OTHERS, num_warps=MASK_WARPS,
    )  # fmt: skip
    return keep, mask


def visible_pixels(kernels: Any, given: operands.Pixels) -> Tensor:
    x, keep, height, width, _ = given
    check(f'places of patches of {len(x)} images', keep, (len(x), keep.shape[-1]), torch.int64, x)
    out = fake_pixels(*given)
    batch, kept, size = out.shape
    block = min(PIXELS, 1 << (size - 1).bit_length())
    kernels.visible_pixels[batch * kept, math.ceil(size / block)](
        x, keep, out, kept, x.shape[2] // height, x.shape[3] // width, *x.stride(), *keep.stride(),
        CHANNELS=x.shape[1], P=height, Q=width, BE=block, num_warps=PIXEL_WARPS,
    )  # fmt: skip
    return out


def run_mask(noise: Tensor, kept: int) -> Tuple[Tensor, Tensor]:
    from . import visible_kernels

    with torch.cuda.device_of(noise):
        return random_mask(visible_kernels, noise, kept)


def fake_mask(noise: Tensor, kept: int) -> Tuple[Tensor, Tensor]:
    keep = noise.new_empty((noise.shape[0], kept), dtype=torch.int64)
    return keep, torch.empty(noise.shape, dtype=torch.float32, device=noise.device)


def run_pixels(*flat: Any) -> Tensor:
    from . import visible_kernels

    given = operands.Pixels(*flat)
    with torch.cuda.device_of(given.x):
        return visible_pixels(visible_kernels, given)


def fake_pixels(x: Tensor, keep: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*keep.shape, x.shape[1] * height * width), dtype=dtype)


register_inference(
    'triton_random_mask', f'({schema(operands.Noise)}) -> (Tensor, Tensor)', run_mask, fake_mask, lambda shapes: 0
)
register_inference(
    'triton_visible_pixels', f'({schema(operands.Pixels)}) -> Tensor', run_pixels, fake_pixels, lambda shapes: 0
)
