"""A sum and its root mean square norm as one dispatcher op.

Of aten's ten launches for sum, norm, cast and their gradients, the gradient of the norm's weight alone takes five times
as long as what it reads.

Without a second summand the sum is the first, itself: its gradient then passes the norm's kernel instead of being added
to that of the norm by another.
"""

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operands
from ..operands import schema
from ..registration import Kernel, as_dtype, register, uncounted
from .launch import or_else
from .sums import new_parts, sum_of_parts

MAX_CHANNELS = 8192


class Launch(NamedTuple):
    """Numbers of a step at most, warps of a program, and programs on each multiprocessor that walk over all rows."""

    numbers: int
    warps: int
    programs: int


FORWARD = Launch(1024, 4, 0)
BACKWARD = Launch(512, 1, 16)


class AddNorm:
    """x + y and its norm: launches of one call."""

    def __init__(self, kernels: Any, x: Tensor, weight: Tensor, eps: float) -> None:
        self.kernels, self.x, self.weight, self.eps = kernels, x.contiguous(), weight.contiguous(), eps
        self.dim = x.shape[-1]
        self.rows = x.numel() // max(1, self.dim)

    def constants(self, launch: Launch) -> dict:
        channels = 1 << (self.dim - 1).bit_length()
        return {
            'DIM': self.dim, 'BD': channels, 'BR': max(1, launch.numbers // channels), 'num_warps': launch.warps,
        }  # fmt: skip

    def forward(self, y: Optional[Tensor], dtype: torch.dtype, launch: Launch = FORWARD) -> Tuple[Tensor, Tensor]:
        """The sum, which is x itself without y, and its norm."""
        x, constants = self.x, self.constants(launch)
        total = x if y is None else torch.empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.kernels.add_norm[math.ceil(self.rows / constants['BR']),](
            x, x if y is None else y.contiguous(), self.weight, total, out, self.rows, self.eps,
            HAS_Y=y is not None, **constants,
        )  # fmt: skip
        return total, out

    def backward(
        self, grad_sum: Optional[Tensor], grad: Tensor, other: Optional[torch.dtype], launch: Launch = BACKWARD
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """The gradient of x, which is the sum, in its dtype and in another (no numbers without one), and that of the
        weight, float32, in parts to add over their first axis."""
        x, constants = self.x, self.constants(launch)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_y = torch.empty(0 if other is None else x.shape, dtype=other or x.dtype, device=x.device)
        parts, span = new_parts(x, self.rows, self.dim, constants['BR'], launch.programs)
        self.kernels.add_norm_backward[len(parts),](
            x, self.weight, or_else(None if grad_sum is None else grad_sum.contiguous(), x), grad.contiguous(),
            grad_x, grad_y, parts, self.rows, span, self.eps,
            HAS_GRAD_SUM=grad_sum is not None, HAS_GRAD_Y=other is not None, **constants,
        )  # fmt: skip
        return grad_x, grad_y, parts


def run(x: Tensor, y: Optional[Tensor], weight: Tensor, eps: float, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    from . import add_norm_kernels

    with torch.cuda.device_of(x):
        total, out = AddNorm(add_norm_kernels, x, weight, eps).forward(y, dtype)
        return x if y is None else total, out


def fake(x: Tensor, y: Optional[Tensor], weight: Tensor, eps: float, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return x if y is None else torch.empty_like(out, dtype=torch.promote_types(x.dtype, y.dtype)), out


def run_backward(
    grad_sum: Optional[Tensor], grad: Tensor, x: Tensor, weight: Tensor, eps: float, other: Optional[torch.dtype]
) -> Tuple[Tensor, Tensor, Tensor]:
    from . import add_norm_kernels, sum_kernels

    with torch.cuda.device_of(x):
        grad_x, grad_y, parts = AddNorm(add_norm_kernels, x, weight, eps).backward(grad_sum, grad, other)
        return grad_x, grad_y, sum_of_parts(sum_kernels, parts)


def fake_backward(
    grad_sum: Optional[Tensor], grad: Tensor, x: Tensor, weight: Tensor, eps: float, other: Optional[torch.dtype]
) -> Tuple[Tensor, Tensor, Tensor]:
    def empty(shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        empty(x.shape, x.dtype),
        empty(0 if other is None else x.shape, other or x.dtype),
        empty(weight.shape, torch.float32),
    )


def save(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    x, y, weight, ctx.eps, _ = inputs
    ctx.dtypes = x.dtype, None if y is None else y.dtype
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, grad_sum: Optional[Tensor], grad: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    x, weight = ctx.saved_tensors
    of_x, of_y = ctx.dtypes
    grad_weight = None
    if grad is not None:
        other = None if of_y == x.dtype else of_y
        grad_sum, grad_y, grad_weight = torch.ops.vim_timm.triton_add_norm_backward.default(
            grad_sum, grad, x, weight, ctx.eps, other
        )
        grad_weight = as_dtype(grad_weight, weight.dtype)
        if other is not None:
            return as_dtype(grad_sum, of_x), grad_y, grad_weight, None, None
    if grad_sum is None:
        return (None,) * 5
    return as_dtype(grad_sum, of_x), None if of_y is None else as_dtype(grad_sum, of_y), grad_weight, None, None


class Compiled(torch.autograd.Function):
    """The same for torch.compile, which fuses aten's forward pass with what is around it and takes no operator that
    returns an operand: the gradients alone are the kernel's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Optional[Tensor], weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tuple[Tensor, Tensor]:
        total = x if y is None else x + y
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if y is None else y.dtype)
        ctx.save_for_backward(total, weight)
        wide, scale = (as_dtype(tensor, torch.float32) for tensor in (total, weight))
        return total, as_dtype(F.rms_norm(wide, weight.shape, scale, eps), dtype)

    backward = staticmethod(differentiate)  # type: ignore[assignment]


register(
    'triton_add_norm',
    f'({schema(operands.AddNorm).replace("Tensor x", "Tensor(a) x", 1)}) -> (Tensor(a), Tensor)',
    '(Tensor? grad_sum, Tensor grad, Tensor x, Tensor weight, float eps, ScalarType? other)'
    ' -> (Tensor, Tensor, Tensor)',
    Kernel(run, fake, save, differentiate, run_backward, fake_backward),
    uncounted,
)
