"""What the kernel may read: checks before a call into C, and the C view of a tensor."""

from typing import Optional, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ABSENT = (0, 0, 0)
_SMALL = 1 << 16  # multiply-adds below which a second thread costs more than it saves


def limit(*tensors: Tensor) -> str:
    """Why the kernel does not run on tensors like these, in one sentence, or ''."""
    x = tensors[0]
    if x.device.type != 'cpu':
        return f'the CPU kernel runs on CPU tensors, not on {x.device.type}'
    if any(t.dtype not in DTYPES for t in tensors):
        kinds = ' with '.join(dict.fromkeys(str(t.dtype) for t in tensors))
        return f'the CPU kernel computes in float32 and takes float32, bfloat16 and float16, not {kinds}'
    return ''


def checked(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """x in float32, once it is sure that the kernel may read it.

    Raises:
        ValueError: another device, shape or channel stride.
        TypeError: another dtype.
    """
    if not x.is_cpu:
        raise ValueError(f'{name} is on {x.device}: the CPU kernel needs every tensor on the CPU')
    if x.dtype not in DTYPES:
        raise TypeError(f'{name} is {x.dtype}: the CPU kernel takes float32, bfloat16 and float16')
    if x.shape != shape:
        raise ValueError(f'{name} has the shape {tuple(x.shape)}, not {tuple(shape)}')
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def new(shape: Sequence[int]) -> Tensor:
    """Memory for the kernel to fill, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device='cpu')


def parameter(name: str, x: Optional[Tensor], shape: Sequence[int]) -> Optional[Tensor]:
    """A parameter is small: any strides, copied where they are not plain."""
    if x is None or x.dtype is torch.float32 and x.shape == shape and x.is_contiguous():
        return x  # what most are: a block has fourteen, and every question costs
    return checked(name, x.contiguous(), shape)


def gradient(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An output's gradient, which comes with whatever strides and dtype autograd made, as `checked`."""
    return checked('the gradient', x.float(), shape)


def rows(x: Optional[Tensor]) -> tuple[int, int, int]:
    """The C structure Rows of a (B, L, D) tensor."""
    return ABSENT if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def halves(x: Optional[Tensor]) -> tuple[int, ...]:
    """`rows` of both halves (B, L, D) of a float32 tensor (B, L, 2 D)."""
    if x is None:
        return ABSENT + ABSENT
    start, batch, token = rows(x)
    return start, batch, token, start + 4 * (x.shape[2] // 2), batch, token  # an address counts bytes


def address(x: Optional[Tensor]) -> int:
    return 0 if x is None else x.data_ptr()


def present(*tensors: Optional[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def threads(work: int) -> int:
    """How many threads a call with so many multiply-adds runs on; its result does not depend on it."""
    return 1 if work < _SMALL else torch.get_num_threads()
