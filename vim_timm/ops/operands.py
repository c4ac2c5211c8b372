"""What each operator takes: the one legend of shapes.

Shapes: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank, W convolution width, C width (embed_dim);
H heads, P channels of a head, O orders in which tokens are visited.

Kernels are registered with flat schemas. `schema` derives one from the fields of a class, `flat` and `of` go there and
back: fields in their order, the backward direction's with the suffix `_b`, and of an absent direction None for each.
"""

from typing import Any, NamedTuple, Optional, Tuple, get_args, get_type_hints

import torch
from torch import Tensor


class Direction(NamedTuple):
    """One direction of a selective scan; the backward direction's tensors are in token order like the forward's."""

    u: Tensor  # input (B, L, D)
    delta: Tensor  # step sizes before bias and softplus (B, L, D)
    A_log: Tensor  # logarithm of the state matrix's negated diagonal (D, N)
    B: Tensor  # input matrix (B, L, N)
    C: Tensor  # output matrix (B, L, N)
    D: Optional[Tensor]  # skip weight (D)
    delta_bias: Optional[Tensor]  # step size bias (D)


class Taps(NamedTuple):
    """One direction of a depthwise causal convolution."""

    weight: Tensor  # (D, W), the last tap for the current token
    bias: Optional[Tensor]  # (D)


class Weights(NamedTuple):
    """Parameters of one direction of the inside of a block."""

    conv: Tensor  # taps (D, W), or (D, 1, W) as a convolution has them
    conv_bias: Optional[Tensor]  # (D)
    x_proj: Tensor  # to step size, B and C (R + 2 N, D)
    dt: Tensor  # step size projection (D, R)
    dt_bias: Optional[Tensor]  # (D)
    A_log: Tensor  # (D, N)
    D: Tensor  # skip weight (D)


class Scan(NamedTuple):
    """Operands of `ops.scan`: gated sum of a forward and a backward selective scan."""

    forward: Direction
    backward: Optional[Direction] = None
    z: Optional[Tensor] = None  # gate (B, L, D)
    scale: float = 1.0
    delta_softplus: bool = True
    A_is_log: bool = True  # else A_log holds the state matrix's diagonal itself

    def flat(self) -> Tuple[Any, ...]:
        backward = _ABSENT_DIRECTION if self.backward is None else self.backward
        return *self.forward, *backward, self.z, self.scale, self.delta_softplus, self.A_is_log

    @classmethod
    def of(cls, *flat: Any) -> 'Scan':
        forward, backward, rest = _halves(flat, len(Direction._fields))
        return cls(Direction(*forward), None if backward[0] is None else Direction(*backward), *rest)


class Conv(NamedTuple):
    """Operands of `ops.conv`: causal convolutions of the same tokens in both directions."""

    x: Tensor  # (B, L, D)
    forward: Taps
    backward: Optional[Taps] = None
    silu: bool = True

    def flat(self) -> Tuple[Any, ...]:
        return self.x, *self.forward, *(_ABSENT_TAPS if self.backward is None else self.backward), self.silu

    @classmethod
    def of(cls, x: Tensor, *flat: Any) -> 'Conv':
        forward, backward, rest = _halves(flat, len(Taps._fields))
        return cls(x, Taps(*forward), None if backward[0] is None else Taps(*backward), *rest)


class Mixer(NamedTuple):
    """Operands of `ops.mixer`: the inside of a bidirectional block."""

    xz: Tensor  # in_proj's output (B, L, 2 D)
    forward: Weights
    backward: Weights
    scale: float = 1.0
    out_proj: Optional[Tensor] = None  # (C, D)
    out_bias: Optional[Tensor] = None  # (C)

    def flat(self) -> Tuple[Any, ...]:
        return self.xz, *self.forward, *self.backward, self.scale, self.out_proj, self.out_bias

    @classmethod
    def of(cls, xz: Tensor, *flat: Any) -> 'Mixer':
        forward, backward, rest = _halves(flat, len(Weights._fields))
        return cls(xz, Weights(*forward), Weights(*backward), *rest)


class Ssd(NamedTuple):
    """Operands of `ops.symmetric_ssd`.

    Two orders are rows, as the tokens stand, and columns; one is columns if `rows` is false.
    """

    x: Tensor  # values (B, L, H, P)
    delta: Tensor  # step sizes before bias and softplus (B, L, H)
    A_log: Tensor  # logarithm of the decay rates (O, H)
    B: Tensor  # input matrix of all heads (B, L, N)
    C: Tensor  # output matrix of all heads (B, L, N)
    D: Optional[Tensor]  # skip weight (H)
    delta_bias: Optional[Tensor]  # step size bias (H)
    rows: bool = True  # whether the first order is as the tokens stand
    columns: Optional[Tensor] = None  # places of the tokens in the order of the columns of their image (1 or B, L)
    moves: Optional[Tensor] = None  # 1 for tokens at which states decay, 0 for prefix tokens (L); None for no such ones

    def flat(self) -> Tuple[Any, ...]:
        return tuple(self)


class GridConv(NamedTuple):
    """Operands of `ops.grid_conv`: a depthwise convolution of tokens that are a whole grid."""

    x: Tensor  # (B, L, D)
    weight: Tensor  # 3 x 3 taps (D, 9)
    bias: Optional[Tensor]  # (D)
    prefix: int  # tokens before the grid
    height: int
    width: int


class GridMixer(NamedTuple):
    """Operands of `ops.fused_grid_mixer`: the inside of a Vision Mamba 2 mixer, whose tokens are a grid.

    Row-major; of a masked image they are some of the grid's, and the convolution sees zeros elsewhere.
    """

    zxbcdt: Tensor  # in_proj's output (B, L, 2 D + 2 N + H), and what pads a row
    conv: Tensor  # 3 x 3 taps (D + 2 N, 9)
    conv_bias: Optional[Tensor]  # (D + 2 N)
    delta_bias: Tensor  # (H)
    A_log: Tensor  # (O, H)
    D: Tensor  # skip weight (H)
    norm: Tensor  # weight of the gated norm (D)
    eps: float
    state: int  # N
    rows: bool  # as in `Ssd`
    prefix: int  # tokens before the grid
    height: int
    width: int
    keep: Optional[Tensor] = None  # places (B, L - prefix) int64 of the tokens on the grid, ascending; None for all
    neighbours: Optional[Tensor] = None  # what `ops.visible_neighbours` makes of keep; None has it made here
    out_proj: Optional[Tensor] = None  # (C, D)


class Visible(NamedTuple):
    """Operands of `ops.visible_neighbours`: which patches of masked images are there."""

    keep: Tensor  # places (B, K) int64 of the tokens on the grid, ascending
    prefix: int  # tokens before the grid
    height: int
    width: int


class Noise(NamedTuple):
    """Operands of `ops.random_mask`: which patches of images are to be there."""

    noise: Tensor  # a number of each patch (B, L)
    kept: int  # how many patches of an image are to be there, those with the least noise


class Pixels(NamedTuple):
    """Operands of `ops.visible_pixels`."""

    x: Tensor  # images (B, C, H, W), of any strides
    keep: Tensor  # places (B, K) int64 of patches on the grid
    height: int  # of a patch
    width: int
    dtype: torch.dtype  # of the result


class Norm(NamedTuple):
    """Operands of `ops.rms_norm`."""

    x: Tensor  # (..., C)
    weight: Tensor  # (C)
    eps: float


class AddNorm(NamedTuple):
    """Operands of `ops.add_norm`."""

    x: Tensor  # (..., C)
    y: Optional[Tensor]  # (..., C)
    weight: Tensor  # (C)
    eps: float
    dtype: torch.dtype  # of the norm


class Linear(NamedTuple):
    """Operands of `ops.linear`."""

    x: Tensor  # (..., C)
    weight: Tensor  # (D, C)
    bias: Optional[Tensor]  # (D)


class SwiGlu(NamedTuple):
    """Operands of `ops.swiglu`."""

    x: Tensor  # (..., C)
    weight: Tensor  # (2 H, C)
    bias: Optional[Tensor]  # (2 H)
    out: Tensor  # weight of the second product (C, H)
    out_bias: Optional[Tensor]  # (C)


_ABSENT_DIRECTION = (None,) * len(Direction._fields)
_ABSENT_TAPS = (None,) * len(Taps._fields)


def _halves(flat: Tuple[Any, ...], size: int) -> Tuple[Tuple[Any, ...], Tuple[Any, ...], Tuple[Any, ...]]:
    """The forward direction's fields, the backward one's, and what follows."""
    return flat[:size], flat[size : 2 * size], flat[2 * size :]


def schema(kind: Any, *without: str, suffix: str = '', absent: bool = False) -> str:
    """The flat schema of a class of operands, for torch's library: 'Tensor x, Tensor? bias, float scale'.

    Args:
        without: Fields to leave out.
        suffix: Of the names.
        absent: Every tensor may be None.
    """
    parts = []
    for name, hint in get_type_hints(kind).items():
        inner = [part for part in get_args(hint) if part is not type(None)]
        (part,), optional = inner or [hint], absent or bool(inner)
        if name in without:
            continue
        if hasattr(part, '_fields'):
            parts.append(schema(part, suffix='_b' if name == 'backward' else suffix, absent=optional))
        else:
            kind_name = 'ScalarType' if part is torch.dtype else part.__name__
            parts.append(f'{kind_name}{"?" if optional else ""} {name}{suffix}')
    return ', '.join(parts)
