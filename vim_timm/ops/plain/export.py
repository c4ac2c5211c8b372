"""The `export` backend: the scan as a short graph of plain aten, for ONNX, torch.export, TorchScript, meta tensors
and torch.compile where no kernel runs.

The same chunks as `chunked.py`, without autograd.Function, slices or writes in place: about 3 sqrt(L) steps a direction
in the graph, any batch size at run time, gradients by autograd.
"""

import math
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_timm.ops import operands
from vim_timm.ops.operands import Direction
from vim_timm.ops.plain import reference
from vim_timm.ops.plain.reference import no_tokens, state_matrix, step_size
from vim_timm.ops.registration import count, scan_flops


def scan_one_direction(direction: Direction, delta_softplus: bool, A_is_log: bool, reverse: bool) -> Tensor:
    """As `reference.scan_one_direction`, in chunks."""
    u, delta, A, B, C, D, delta_bias = direction  # TorchScript refines an optional variable, no optional field
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, dt, B, C = u.to(dtype), step_size(delta.to(dtype), delta_bias, delta_softplus), B.to(dtype), C.to(dtype)
    A = state_matrix(A, A_is_log, dtype)
    length = int(u.shape[1])  # a tensor under torch.jit.trace
    if length == 0:
        return no_tokens(direction)
    size = max(1, int(math.sqrt(float(length))))
    chunks = (length + size - 1) // size
    pad = [0, 0, 0, chunks * size - length]
    # (B, K, T, ...): zeros after the last token (dt = 0) leave every state as it is
    dt_chunk = F.pad(dt, pad).unflatten(1, [chunks, size])
    x_chunk = F.pad(dt * u, pad).unflatten(1, [chunks, size])
    B_chunk = F.pad(B, pad).unflatten(1, [chunks, size])
    C_chunk = F.pad(C, pad).unflatten(1, [chunks, size])

    decay = torch.exp(dt_chunk.unsqueeze(-1) * A)
    x = x_chunk.unsqueeze(-1) * B_chunk.unsqueeze(-2)
    # no zeros of the states' shape: torch's older ONNX exporter would make them a constant of the traced batch
    first = size - 1 if reverse else 0
    end = x[:, :, first]
    for i in range(1, size):
        t = size - 1 - i if reverse else i
        end = decay[:, :, t] * end + x[:, :, t]
    chunk_decay = torch.exp(dt_chunk.sum(2).unsqueeze(-1) * A)
    carry = end[:, chunks - 1 if reverse else 0]
    carries: List[Tensor] = []
    for i in range(1, chunks):
        k = chunks - 1 - i if reverse else i
        carries.append(carry)
        carry = chunk_decay[:, k] * carry + end[:, k]
    if reverse:
        carries.reverse()
    h = torch.stack(carries, dim=1) if chunks > 1 else end[:, :0]
    h = F.pad(h, [0, 0, 0, 0, 0, 1] if reverse else [0, 0, 0, 0, 1, 0])  # the first chunk starts at zero
    ys: List[Tensor] = []
    for i in range(size):
        t = size - 1 - i if reverse else i
        h = decay[:, :, t] * h + x[:, :, t]
        ys.append((h * C_chunk[:, :, t].unsqueeze(-2)).sum(-1))
    if reverse:
        ys.reverse()
    y = torch.stack(ys, dim=2).flatten(1, 2)[:, :length]
    return y if D is None else y + D.to(dtype) * u


def scan(given: operands.Scan) -> Tensor:
    """The same function as `reference.scan`."""
    forward, backward, z, scale, delta_softplus, A_is_log = given
    y = scan_one_direction(forward, delta_softplus, A_is_log, False)
    if backward is not None:
        y = y + scan_one_direction(backward, delta_softplus, A_is_log, True)
    if scale != 1.0:
        y = y * scale
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(forward.u.dtype)
    if not torch.jit.is_scripting():
        count(y, scan_flops, given)
    return y


conv = reference.conv
