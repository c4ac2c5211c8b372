"""Fused GPU kernels in Triton: bidirectional selective scan and causal convolution, symmetric state space dual.

`scan` and `conv` compute what `ops.plain.reference` defines, `ssd` what `ops.plain.ssd` does, `grid_conv` a convolution
on a grid, `grid_mixer` the inside of a mixer around both, `masked_grid_mixer` that of visible patches,
`random_mask` chooses these, `visible_pixels` takes their pixels, `visible_neighbours` finds which are neighbours,
`add_norm` adds and normalizes, and `swiglu` is a gated MLP, on NVIDIA GPUs; Triton is imported at the first call.
The kernels were measured on compute capability 9.0 only; they compile for 8.0 to 12.0 (`compile_targets`).
"""

import functools
import importlib.util
from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import operands
from ..plain import reference
from ..registration import as_product_operands, autocast_dtype, wants_gradient
from . import (  # noqa: F401  define the operators
    add_norm_op,
    grid_conv_op,
    grid_mixer_op,
    masked_grid_mixer_op,
    scan_op,
    ssd_launch,
    ssd_op,
    swiglu_op,
    visible_op,
)
from .conv_op import MAX_WIDTH
from .launch import INTERPRET, MAX_STATE

__all__ = [
    'add_norm',
    'add_norm_limit',
    'conv',
    'conv_limit',
    'gates_gradients',
    'gates_product',
    'grid_conv',
    'grid_conv_limit',
    'grid_mixer',
    'grid_mixer_limit',
    'masked_grid_mixer',
    'masked_grid_mixer_limit',
    'random_mask',
    'random_mask_limit',
    'scan',
    'scan_limit',
    'ssd',
    'ssd_limit',
    'swiglu',
    'swiglu_limit',
    'unavailable',
    'visible_neighbours',
    'visible_neighbours_limit',
    'visible_pixels',
    'visible_pixels_limit',
    'warmup',
]

MOST_VISIBLE = 2**31 // 10  # places in a table of neighbours are int32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_reason: Optional[str] = None


def unavailable() -> str:
    """Why this process cannot use the kernels, in one sentence, or ''."""
    global _reason
    if _reason is None:
        _reason = _find_reason()
    return _reason


def _find_reason() -> str:
    if importlib.util.find_spec('triton') is None:
        return 'The triton backend needs Triton, which comes with the Linux builds of PyTorch (or: pip install triton).'
    if INTERPRET:
        return ''
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 'The triton backend needs an NVIDIA GPU and a CUDA build of PyTorch; torch.cuda.is_available() is False.'
    if torch.cuda.get_device_capability() < (8, 0):
        return 'The triton backend needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere).'
    return ''


def device_limit(x: Tensor) -> str:
    """Why the kernels cannot run where x is, in one sentence, or ''."""
    if x.device.type != 'cuda' and not INTERPRET:
        return f'The triton backend runs on CUDA tensors, not on {x.device.type}.'
    return ''


def batch_limit(x: Tensor) -> str:
    """Why the kernels cannot run on tensors like x (B, ...), whatever their dtype, in one sentence, or ''."""
    if x.shape[0] > 32767:
        return device_limit(x) or f'The triton backend takes batches up to 32767 (the grid of a GPU), not {x.shape[0]}.'
    return device_limit(x)


def dtype_limit(*dtypes: torch.dtype) -> str:
    """Why the kernels cannot take one of the dtypes, in one sentence, or ''."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f'The triton backend takes float32, bfloat16 and float16, not {dtype}.'
    return ''


def limit(x: Tensor) -> str:
    """Why the kernels cannot run on tensors like x (B, L, D), in one sentence, or ''."""
    return batch_limit(x) or dtype_limit(x.dtype)


def scan_limit(given: operands.Scan) -> str:
    state, backward = given.forward.A_log.shape[-1], given.backward
    if backward is not None and backward.A_log.shape != given.forward.A_log.shape:
        return 'The triton backend takes state matrices of the same shape in both directions.'
    if state > MAX_STATE:
        return f'The triton backend takes d_state up to {MAX_STATE}, not {state}.'
    return limit(given.forward.u)


def conv_limit(given: operands.Conv) -> str:
    if given.backward is not None and given.backward.weight.shape != given.forward.weight.shape:
        return 'The triton backend takes convolutions of the same width in both directions.'
    return limit(given.x)


def ssd_limit(given: operands.Ssd) -> str:
    return limit(given.x) or ssd_launch.size_limit(given.x.shape[1], given.x.shape[3], given.B.shape[2])


def grid_conv_limit(given: operands.GridConv) -> str:
    return limit(given.x)


def grid_mixer_limit(given: operands.GridMixer) -> str:
    headdim = given.norm.shape[0] // given.A_log.shape[1]
    return limit(given.zxbcdt) or ssd_launch.size_limit(given.zxbcdt.shape[1], headdim, given.state)


def masked_grid_mixer_limit(given: operands.GridMixer) -> str:
    tokens = given.zxbcdt.shape[0] * given.zxbcdt.shape[1]
    many = f'The triton backend takes up to {MOST_VISIBLE:,} tokens of masked images, not {tokens:,}.'
    return grid_mixer_limit(given) or (many if tokens > MOST_VISIBLE else '')


def random_mask_limit(given: operands.Noise) -> str:
    return device_limit(given.noise)


def visible_pixels_limit(given: operands.Pixels) -> str:
    return device_limit(given.x)


def visible_neighbours_limit(given: operands.Visible) -> str:
    return batch_limit(given.keep)


def swiglu_limit(given: operands.SwiGlu) -> str:
    return limit(given.x)


def add_norm_limit(given: operands.AddNorm) -> str:
    x, y, weight, _, dtype = given
    dtypes = dtype_limit(x.dtype, weight.dtype, dtype, x.dtype if y is None else y.dtype)
    if dtypes:
        return dtypes
    if y is not None and y.shape != x.shape:
        return f'The triton backend adds tensors of one shape, not {list(x.shape)} and {list(y.shape)}.'
    if not 0 < x.shape[-1] <= add_norm_op.MAX_CHANNELS or x.numel() == 0:
        return f'The triton backend takes norms of 1 to {add_norm_op.MAX_CHANNELS} channels, not {list(x.shape)}.'
    return device_limit(x)


def gates_product(given: operands.SwiGlu) -> bool:
    """Whether the first product of a SwiGLU and its gate are one kernel."""
    return (autocast_dtype(given.x) or given.x.dtype) in swiglu_op.GATED_DTYPES


def gates_gradients(given: operands.SwiGlu) -> bool:
    """Whether the same product and the gradients of [a, b] are one kernel too."""
    return gates_product(given) and swiglu_op.gradient_tile(given.weight.shape[1], given.x.device) is not None


def _absent(*tensors: Optional[Tensor]) -> Tuple[bool, ...]:
    """Which tensors are absent; the kernels' directions have or lack each together."""
    return tuple(x is None for x in tensors)


def _both(x: Optional[Tensor], y: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """x and y, zeros in place of one that is absent alone."""
    if x is None and y is not None:
        return torch.zeros_like(y), y
    if y is None and x is not None:
        return x, torch.zeros_like(x)
    return x, y


def _promoted(*tensors: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The tensors in the one dtype that holds the values of all."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) < 2:
        return tensors
    dtype = functools.reduce(torch.promote_types, dtypes)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _alike(forward: operands.Direction, backward: operands.Direction) -> Tuple[operands.Direction, operands.Direction]:
    """Two directions whose operands have one dtype each, and B and C one together, as the kernels take them."""
    B, C, B_b, C_b = _promoted(forward.B, forward.C, backward.B, backward.C)
    pairs = [
        _promoted(*pair)
        for pair in zip(forward._replace(B=B, C=C), backward._replace(B=B_b, C=C_b))  # type: ignore[arg-type]
    ]
    return operands.Direction(*(x for x, _ in pairs)), operands.Direction(*(x for _, x in pairs))  # type: ignore[arg-type]


def _check(given: operands.Scan) -> None:
    """Raise ValueError for operands that kernels would read past their ends."""
    (batch, length, dim), state = given.forward.u.shape, given.forward.A_log.shape[1]
    rows, own = (batch, length, dim), (batch, length, state)
    shapes = (rows, rows, (dim, state), own, own, (dim,), (dim,))
    pairs = list(zip(given.forward, shapes)) + [(given.z, rows)]
    for x, shape in pairs if given.backward is None else pairs + list(zip(given.backward, shapes)):
        if x is not None and x.shape != shape:
            raise ValueError(f'an operand of a scan has the shape {tuple(x.shape)}, not {shape}')


def scan(given: operands.Scan) -> Tensor:
    """`reference.scan` with float32 states, in u's dtype: (B, L, D) contiguous."""
    _check(given)
    forward, backward = given.forward, given.backward
    dtype = forward.u.dtype
    if not forward.u.numel():
        return reference.scan(given)
    if backward is not None and _absent(forward.D, forward.delta_bias) != _absent(backward.D, backward.delta_bias):
        D, D_b = _both(forward.D, backward.D)
        bias, bias_b = _both(forward.delta_bias, backward.delta_bias)
        forward, backward = forward._replace(D=D, delta_bias=bias), backward._replace(D=D_b, delta_bias=bias_b)
    forward, other = _alike(forward, forward if backward is None else backward)
    given = given._replace(forward=forward, backward=None if backward is None else other)
    return torch.ops.vim_timm.triton_scan.default(*given.flat())[0].to(dtype)


def conv(given: operands.Conv) -> Tuple[Tensor, Optional[Tensor]]:
    """`reference.conv` in x's dtype: (B, L, D) contiguous each. Widths over 4 run as plain aten operations."""
    x, forward, backward, silu = given
    for taps in (forward,) if backward is None else (forward, backward):
        reference.check_taps(x, taps)
    if not x.numel() or forward.weight.shape[1] > MAX_WIDTH:
        return reference.conv(given)
    if backward is not None and _absent(forward.bias) != _absent(backward.bias):
        bias, bias_b = _both(forward.bias, backward.bias)
        given = operands.Conv(x, forward._replace(bias=bias), backward._replace(bias=bias_b), silu)
    y, y_b = torch.ops.vim_timm.triton_conv.default(*given.flat())
    return y, None if given.backward is None else y_b


def ssd(given: operands.Ssd) -> Tensor:
    """`plain.ssd.reference` with float32 sums, in x's dtype: (B, L, H, P) contiguous."""
    return torch.ops.vim_timm.triton_ssd.default(*given)[0]


def grid_conv(given: operands.GridConv) -> Tensor:
    """SiLU of the convolved tokens (B, L, D), in x's dtype."""
    return torch.ops.vim_timm.triton_grid_conv.default(*given)


def grid_mixer(given: operands.GridMixer) -> Tensor:
    """The gated norm of the state space dual of convolved tokens, in zxbcdt's dtype: (B, L, D), or (B, L, C) with
    out_proj."""
    return torch.ops.vim_timm.triton_grid_mixer.default(*given)[0]


def random_mask(given: operands.Noise) -> Tuple[Tensor, Tensor]:
    """Places (B, K) of the patches of least noise, and the mask (B, L)."""
    return torch.ops.vim_timm.triton_random_mask.default(*given)


def visible_pixels(given: operands.Pixels) -> Tensor:
    """The pixels (B, K, C * height * width) of visible patches."""
    return torch.ops.vim_timm.triton_visible_pixels.default(*given)


def visible_neighbours(given: operands.Visible) -> Tensor:
    """The table (10, B, L) by which `masked_grid_mixer` finds tokens."""
    return torch.ops.vim_timm.triton_visible_neighbours.default(*given)


def masked_grid_mixer(given: operands.GridMixer) -> Tensor:
    """`grid_mixer` of a masked image's visible patches."""
    return torch.ops.vim_timm.triton_masked_grid_mixer.default(*masked_grid_mixer_op.with_neighbours(given))[0]


def add_norm(given: operands.AddNorm) -> Tuple[Tensor, Tensor]:
    """x + y, or x itself, and its norm."""
    if given.weight.shape != given.x.shape[-1:]:
        raise ValueError(f'x {list(given.x.shape)} and weight {list(given.weight.shape)} do not fit together')
    if torch.compiler.is_compiling():
        return add_norm_op.Compiled.apply(*given)
    return torch.ops.vim_timm.triton_add_norm.default(*given)


def swiglu(given: operands.SwiGlu) -> Tensor:
    """The SwiGLU (..., C) in the dtype of products under autocast, else in x's; between the products it is float32."""
    x, weight = as_product_operands(given.x, given.weight)
    learns = torch.compiler.is_compiling() or wants_gradient(given)
    out = as_product_operands(given.out) if learns else (given.out,)  # which the first product's kernel casts
    return torch.ops.vim_timm.triton_swiglu.default(x, weight, given.bias, *out, given.out_bias)


def warmup(
    model: torch.nn.Module, shape: Tuple[int, ...], dtype: torch.dtype = torch.bfloat16, train: bool = False
) -> None:
    """Compiles the kernels that a model needs by one pass over zeros.

    Args:
        shape: Of the model's input, batch first.
        dtype: Of autocast.
        train: Compile the backward kernels too; the parameters' gradients are cleared after it.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype), torch.set_grad_enabled(train):
        output = model(torch.zeros(shape, device=device))
    if train:
        output.float().sum().backward()
        model.zero_grad(set_to_none=True)
