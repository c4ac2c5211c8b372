"""timm's attention on a chosen kernel of scaled dot product attention.

`auto` leaves the choice to torch, or computes step by step where derivatives are asked for that torch's kernels have
not. VIM_TIMM_ATTN=NAME or `set_attention_kernel(NAME)` forces one of the others, and one that cannot run says why: it
is a matter of the machine, not of a model's arguments or its weights.
"""

import contextlib
import importlib.util
import os
from typing import Iterator, List, NamedTuple, Optional

import timm.layers
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vim_timm.ops import wants_any_derivative
from vim_timm.ops.registration import counting

_SDPA = {
    'flash': SDPBackend.FLASH_ATTENTION,
    'efficient': SDPBackend.EFFICIENT_ATTENTION,
    'math': SDPBackend.MATH,
}
KERNELS = ('auto', *_SDPA, 'flash_attn')

_forced = os.environ.get('VIM_TIMM_ATTN') or 'auto'


class KernelStatus(NamedTuple):
    """Whether a kernel runs on a device type; `reason` says why not, '' where it does."""

    name: str
    reason: str


def set_attention_kernel(name: str) -> None:
    """Force the kernel of every attention from here on, one of `KERNELS`.

    Raises:
        ValueError: the name is not known.
    """
    global _forced
    _require(name)
    _forced = name


def get_attention_kernel() -> str:
    """The forced kernel's name, or 'auto'.

    Raises:
        ValueError: VIM_TIMM_ATTN has an unknown name.
    """
    _require(_forced)
    return _forced


@contextlib.contextmanager
def use_attention_kernel(name: str) -> Iterator[None]:
    """`set_attention_kernel` for a with-block."""
    global _forced
    before = _forced
    set_attention_kernel(name)
    try:
        yield
    finally:
        _forced = before


def _require(name: str) -> None:
    if name not in KERNELS:
        raise ValueError(f'unknown attention kernel {name!r}: choose {", ".join(KERNELS)}')


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v (Attention Is All You Need, arXiv 1706.03762, eq. 1) on the chosen kernel.

    Args:
        q: (B, H, L, d).
        k: (B, H, L, d).
        v: (B, H, L, d).
        dropout: Rate at which attention weights are dropped.

    Returns:
        (B, H, L, d) in v's dtype.

    Raises:
        RuntimeError: the forced kernel cannot run on such tensors.
    """
    name = get_attention_kernel()
    if name == 'auto':
        if wants_steps():
            return step_by_step(q, k, v, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if name == 'flash_attn':
        return _flash_attn(q, k, v, dropout)
    try:
        with sdpa_kernel(_SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    except RuntimeError as error:
        if not str(error).startswith(('No available kernel', 'No viable backend')):
            raise
        raise RuntimeError(
            f"attention kernel '{name}' cannot run on {q.device.type} with {q.dtype} and head width {q.shape[-1]}: "
            "choose another by VIM_TIMM_ATTN or set_attention_kernel, or leave it to 'auto'"
        ) from error


def wants_steps() -> bool:
    """Whether derivatives are asked for that torch's kernels have not, or operations are counted."""
    return wants_any_derivative() or counting()


def step_by_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """`attention` with every derivative, and as products that a FLOP counter knows on every device.

    Args:
        mask: What may be attended to, to be broadcast to (B, H, L, L); None for all.
    """
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float('-inf'))
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    reason = _flash_attn_missing(q.device.type)
    if reason:
        raise RuntimeError(reason)
    from flash_attn import flash_attn_func

    if torch.is_autocast_enabled(q.device.type):
        half = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(half), k.to(half), v.to(half)
    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=dropout).transpose(1, 2)


def _flash_attn_missing(device_type: str) -> str:
    if importlib.util.find_spec('flash_attn') is None:
        return "attention kernel 'flash_attn' needs the package of that name: pip install flash-attn"
    if device_type != 'cuda':
        return f"attention kernel 'flash_attn' runs on CUDA tensors, not on {device_type}"
    return ''


def attention_kernels(device_type: str) -> List[KernelStatus]:
    """Every kernel, tried on bfloat16 tensors of a device type.

    Args:
        device_type: 'cpu', 'cuda', ...
    """
    q = torch.zeros(1, 1, 8, 64, device=device_type, dtype=torch.bfloat16)
    found = []
    for name in KERNELS:
        reason = ''
        try:
            with use_attention_kernel(name), torch.no_grad():
                attention(q, q, q)
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
        found.append(KernelStatus(name, reason))
    return found


class Attention(timm.layers.Attention):
    """timm's multi-head self-attention, (B, L, C) -> (B, L, C), with its weights, on the kernel chosen in this module.

    timm's `set_fused_attn(False)` has it computed step by step, as in timm's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        # neither masks nor causal; a second comment beside the first would end TorchScript
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        if not self.fused_attn:
            y = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        elif torch.jit.is_scripting():
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            y = attention(q, k, v, dropout)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).reshape(batch, length, self.attn_dim))))
