"""The symmetric state space dual in plain aten: one token at a time (the law), as matrix products, and in chunks.

Both directions of a Mamba-2 head (Transformers are SSMs, arXiv 2405.21060, eq. 16) with shared parameters:

    y_i = sum_j (C_i . B_j) M_ij dt_j x_j + D x_i,    M_ij = exp(-|s_i - s_j|),    s = cumsum(dt exp(A_log))

M is the mean over the orders in which tokens are visited, each with an A_log of its own. Every exponent is <= 0.

Shapes: B batch, L tokens, H heads, P channels of a head, N state, O orders.
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from vim_timm.ops.operands import Ssd
from vim_timm.ops.plain.reference import LARGEST_LOG
from vim_timm.ops.registration import SSD_CHUNK, SSD_WHOLE, count, ssd_flops

MOST_GROWTH = 88.0  # e^-88 of a state is nothing in float32


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 operands, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def step_sizes(delta: torch.Tensor, delta_bias: Optional[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """dt (B, L, H), softplus of the projected steps and their bias."""
    delta = delta.to(dtype)
    return F.softplus(delta if delta_bias is None else delta + delta_bias.to(dtype))


def decays(
    dt: torch.Tensor, A_log: torch.Tensor, moves: Optional[torch.Tensor], most: float = MOST_GROWTH,
    largest_log: float = LARGEST_LOG,
) -> torch.Tensor:  # fmt: skip
    """l (O, B, L, H), what s grows by at every token: nothing where `moves` (L) is 0.

    Rates are those of the scan at most, and growth is `most`: in a larger s the smaller steps behind would be lost.
    """
    rate = torch.exp(A_log.to(dt.dtype).clamp(max=largest_log))
    growth = (dt.unsqueeze(0) * rate.view(-1, 1, 1, A_log.shape[1])).clamp(max=most)
    return growth if moves is None else growth * moves.to(dt.dtype).view(-1, 1)


def rows_at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of x (B, L, ...) at the places of index (1 or B, L)."""
    shape = [x.shape[0], x.shape[1]] + [1] * (x.dim() - 2)
    return x.gather(1, index.expand(x.shape[0], -1).reshape(shape).expand_as(x))


def visited(operands: Ssd, order: int) -> Optional[torch.Tensor]:
    """The places of the tokens (1 or B, L) that an order visits one after the other, None for 0 to L - 1."""
    return None if order == 0 and operands.rows else operands.columns


def cumulated(growth: torch.Tensor, tokens: Optional[torch.Tensor]) -> torch.Tensor:
    """s (B, H, L) of the tokens where they stand, from its growth (B, L, H) and the tokens in the order of a visit."""
    if tokens is None:
        return growth.transpose(1, 2).contiguous().cumsum(-1)
    return rows_at(rows_at(growth, tokens).cumsum(1), torch.argsort(tokens, dim=1)).transpose(1, 2)


def recurrence(v: torch.Tensor, growth: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """sum_j (C_i . B_j) exp(-|s_i - s_j|) v_j of tokens in order, (B, L, H, P).

    The backward state is read before the current token enters it, and decays by the current token's factor when it
    leaves, so the diagonal counts once.
    """
    decay = torch.exp(-growth)[..., None, None]
    enters = v.unsqueeze(-2) * B[:, :, None, :, None]  # (B, L, H, N, P)
    h = torch.zeros_like(enters[:, 0])
    ahead: List[torch.Tensor] = []
    for t in range(v.shape[1]):
        h = decay[:, t] * h + enters[:, t]
        ahead.append(h)
    h = torch.zeros_like(enters[:, 0])
    back: List[torch.Tensor] = []
    for i in range(v.shape[1]):
        t = v.shape[1] - 1 - i
        back.append(h)
        h = decay[:, t] * (h + enters[:, t])
    back.reverse()
    return (C[:, :, None, :, None] * (torch.stack(ahead, 1) + torch.stack(back, 1))).sum(3)


def cut(
    v: torch.Tensor, growth: torch.Tensor, B: torch.Tensor, C: torch.Tensor, size: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """v (B, K, H, T, P), s from the start of each chunk (B, K, H, T), B and C (B, K, T, N), in K chunks of T tokens."""
    length, count = v.shape[1], -(-v.shape[1] // size)
    pad = count * size - length
    # tokens without a value that do not decay leave every state as it is
    v = F.pad(v, [0, 0, 0, 0, 0, pad]).unflatten(1, [count, size]).transpose(2, 3)
    s = F.pad(growth, [0, 0, 0, pad]).unflatten(1, [count, size]).transpose(2, 3).cumsum(-1)
    B = F.pad(B, [0, 0, 0, pad]).unflatten(1, [count, size])
    C = F.pad(C, [0, 0, 0, pad]).unflatten(1, [count, size])
    return v, s, B, C


def joined(y: torch.Tensor, v: torch.Tensor, s: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Sums over chunks of their own tokens (B, K, H, T, P) with those over all other tokens added, (B, K T, H, P)."""
    if y.shape[1] > 1:
        whole = s[..., -1:]
        from_start, to_end = torch.exp(-s).unsqueeze(-1), torch.exp(s - whole).unsqueeze(-1)
        rows = B.transpose(2, 3).unsqueeze(2)
        ahead, back = torch.matmul(rows, v * to_end), torch.matmul(rows, v * from_start)  # (B, K, H, N, P)
        ends = whole[..., 0].cumsum(1).transpose(1, 2)  # (B, H, K)
        # what of a chunk's state is left k chunks further on: between the end of one and the start of the other
        gap = (ends - whole[..., 0].transpose(1, 2)).unsqueeze(-1) - ends.unsqueeze(-2)
        left = torch.exp(-gap.abs()).tril(-1)
        ahead = torch.einsum('bhkm,bmhnp->bkhnp', left, ahead)
        back = torch.einsum('bhmk,bmhnp->bkhnp', left, back)
        read = C.unsqueeze(2)
        y = y + from_start * torch.matmul(read, ahead) + to_end * torch.matmul(read, back)
    return y.transpose(2, 3).flatten(1, 2)


def chunks(v: torch.Tensor, growth: torch.Tensor, B: torch.Tensor, C: torch.Tensor, size: int) -> torch.Tensor:
    """`recurrence` in chunks of `size` tokens: as matrix products inside a chunk, by states between chunks."""
    length = v.shape[1]
    v, s, B, C = cut(v, growth, B, C, size)
    mask = torch.exp(-(s.unsqueeze(-1) - s.unsqueeze(-2)).abs())
    y = torch.matmul(torch.matmul(C, B.transpose(2, 3)).unsqueeze(2) * mask, v)
    return joined(y, v, s, B, C)[:, :length]


def in_order(v: torch.Tensor, growth: torch.Tensor, B: torch.Tensor, C: torch.Tensor, size: int) -> torch.Tensor:
    """`chunks`, or `recurrence` if size is 0."""
    return chunks(v, growth, B, C, size) if size > 0 else recurrence(v, growth, B, C)


def by_order(operands: Ssd, size: int) -> torch.Tensor:
    """The operator, one order after the other, as `in_order` says."""
    x, delta, A_log, B, C, D, delta_bias, _, _, moves = operands
    dtype = compute_dtype(x)
    dt, B, C = step_sizes(delta, delta_bias, dtype), B.to(dtype), C.to(dtype)
    growth, v = decays(dt, A_log, moves), x.to(dtype) * dt.unsqueeze(-1)
    y = torch.zeros_like(v)
    for order in range(A_log.shape[0]):
        tokens = visited(operands, order)
        if tokens is None:
            y = y + in_order(v, growth[order], B, C, size)
        else:
            z = in_order(
                rows_at(v, tokens), rows_at(growth[order], tokens), rows_at(B, tokens), rows_at(C, tokens), size
            )
            y = y + rows_at(z, torch.argsort(tokens, dim=1))
    return skip(y / A_log.shape[0], x, D)


def skip(y: torch.Tensor, x: torch.Tensor, D: Optional[torch.Tensor]) -> torch.Tensor:
    """y + D x in x's dtype."""
    return (y if D is None else y + D.to(y.dtype).unsqueeze(-1) * x.to(y.dtype)).to(x.dtype)


def reference(operands: Ssd) -> torch.Tensor:
    """The law, one token at a time. See `vim_timm.ops.symmetric_ssd`."""
    return count(by_order(operands, 0), ssd_flops, operands)


def chunked(operands: Ssd, size: int = SSD_CHUNK) -> torch.Tensor:
    """In chunks of `size` tokens: for long sequences."""
    return by_order(operands, size)


def quadratic(operands: Ssd) -> torch.Tensor:
    """As two matrix products and a mask (B, H, L, L), of all orders at once: for short sequences."""
    x, delta, A_log, B, C, D, delta_bias, _, _, moves = operands
    dtype = compute_dtype(x)
    dt = step_sizes(delta, delta_bias, dtype)
    growth = decays(dt, A_log, moves)
    mask: Optional[torch.Tensor] = None
    for order in range(A_log.shape[0]):
        tokens = visited(operands, order)
        s = cumulated(growth[order], tokens)
        one = torch.exp(-(s.unsqueeze(-1) - s.unsqueeze(-2)).abs())
        mask = one if mask is None else mask + one
    assert mask is not None
    scores = torch.matmul(C.to(dtype), B.to(dtype).transpose(1, 2)).unsqueeze(1) / A_log.shape[0]
    v = (x.to(dtype) * dt.unsqueeze(-1)).transpose(1, 2)
    return skip(torch.matmul(scores * mask, v).transpose(1, 2), x, D)


def by_length(operands: Ssd, most: int = SSD_WHOLE) -> torch.Tensor:
    """`quadratic` for up to `most` tokens; for more, chunks do less arithmetic than a whole mask."""
    if operands.x.shape[1] <= most:
        return quadratic(operands)
    return chunked(operands)
