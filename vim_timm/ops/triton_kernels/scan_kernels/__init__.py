"""Triton kernels of the bidirectional selective scan, channels-last, both directions in one launch.

Scan order: step s visits token s in the forward direction and token L - 1 - s in the backward direction. A cell is a
(direction, batch entry) pair; a program owns BD channels of one chunk of one cell and keeps their states (N, BD) in
registers. Chunks of a sequence run in parallel: states from zero (`LOCAL`), `carry`, then outputs from the true states.
Everything is computed in float32.

The layout of the state tensor decides the speed: each lane must hold whole channels with all N states in registers, so
that sums over N need no shuffles. Triton lays tensors out for their loads and stores, in vectors as wide as alignment
allows; an offset of which it knows only that VEC divides it (`zero`, not specialized) leaves VEC neighbouring channels
to a lane. Steps are taken four at a time, all loads first, because a load cannot pass an earlier store.
"""

from .backward import grad_states, scan_backward, sum_parts
from .forward import carry, decays, scan_forward
from .gate import gate_backward, gate_forward

__all__ = [
    'carry', 'decays', 'gate_backward', 'gate_forward', 'grad_states', 'scan_backward', 'scan_forward', 'sum_parts',
]  # fmt: skip
