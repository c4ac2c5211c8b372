"""What the ops share: the device's size, tensors with common strides and the cut of a scan."""

import functools
import math
import os
from typing import List, NamedTuple, Optional, Tuple

import torch

MAX_STATE = 256
WARPS_PER_SM = 12  # of 64 channels; measured on an H200, more chunks cost more than they hide
MIN_CHUNK = 32
GROUP = 4  # steps a program takes at once; the backward pass computes states again from each group's first
INTERPRET = os.environ.get('TRITON_INTERPRET', '0') == '1'


@functools.lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


@functools.lru_cache(maxsize=None)
def major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == 'cuda' else 9


def common_rows(*tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """The tensors with one dtype, the same strides and a last stride of one, copied only where they differ."""
    first = tensors[0]
    tensors = tuple(t.to(first.dtype) for t in tensors)
    if first.stride(-1) == 1 and all(t.stride() == first.stride() for t in tensors):
        return tensors
    return tuple(t.contiguous() for t in tensors)


def check(
    what: str, x: Optional[torch.Tensor], shape: Tuple[int, ...], dtype: torch.dtype, tokens: torch.Tensor
) -> torch.Tensor:
    """x, which says places of tokens; raise ValueError where it has not this shape and dtype, or lies on another device
    than they: kernels would read past its ends. Its values are not looked at."""
    assert x is not None
    if x.shape != shape or x.dtype != dtype or x.device != tokens.device:
        raise ValueError(f'{what} are not {x.dtype} {list(x.shape)} on {x.device}')
    return x


def alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two, up to 16, of bytes that divides the address of every row of the tensors."""
    numbers = [16]
    for t in tensors:
        numbers += [t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:-1])]
    return math.gcd(*numbers)


def aligned_strides(*rows: torch.Tensor) -> Tuple[int, List[int]]:
    """The numbers, a power of two, of which addresses of all rows are multiples, and strides of images and rows in
    units of as many."""
    align = math.gcd(*(alignment(t) // t.element_size() for t in rows))
    return align, [stride // align for t in rows for stride in t.stride()[:2]]


class Plan(NamedTuple):
    """How a scan is cut: channels of a program, its warps, tokens of a chunk, chunks of a sequence."""

    block: int
    warps: int
    chunk: int
    chunks: int

    @property
    def vec(self) -> int:
        """Neighbouring channels of a lane."""
        return max(1, self.block // (32 * self.warps))


def plan(cells: int, length: int, dim: int, state: int, sms: int) -> Plan:
    """Cuts a scan so that WARPS_PER_SM warps run on each multiprocessor.

    A scan in chunks computes its decays twice, so sequences stay whole as soon as a third of those warps exist without.

    Args:
        cells: Directions times batch entries, each with its own states.
        state: d_state rounded up to a power of two.
        sms: Multiprocessors of the device.
    """
    warps = max(1, state // 32)
    block = 64 if state <= 16 and dim % 64 == 0 else 32
    programs = cells * -(-dim // block) * warps
    wanted = WARPS_PER_SM * sms
    if 3 * programs >= wanted or length < 2 * MIN_CHUNK:
        return Plan(block, warps, length, 1)
    chunk = max(MIN_CHUNK, 16 * -(-length // (wanted // programs * 16)))
    return Plan(block, warps, chunk, -(-length // chunk))


def or_else(tensor: Optional[torch.Tensor], other: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer argument; what stands in for an absent one is never read."""
    return other if tensor is None else tensor
