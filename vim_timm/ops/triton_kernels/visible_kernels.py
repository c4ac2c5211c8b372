"""Triton kernels that choose the visible patches of masked images and take their pixels."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['length', 'kept', 'NOISE_sb'])
def random_mask(NOISE, KEEP, MASK, length, kept, NOISE_sb, NOISE_sl, BT: tl.constexpr, BU: tl.constexpr):
    """KEEP (batch, kept) int64 and MASK (batch, L) float32, from NOISE (batch, L) of any strides; a program an image.

    A patch is visible if less than `kept` others come before it: with less noise, with the same and a smaller place, or
    with a number if it has NaN.
    """
    entry = tl.program_id(0).to(tl.int64)
    NOISE += entry * NOISE_sb
    KEEP += entry * kept
    MASK += entry * length
    before = 0
    for first in range(0, length, BT):
        t = first + tl.arange(0, BT)
        own = tl.load(NOISE + t * NOISE_sl, mask=t < length, other=0)[:, None]
        count = tl.zeros([BT, BU], tl.int32)  # of those before a patch; summed once, at the end
        for other_first in range(0, length, BU):
            u = other_first + tl.arange(0, BU)
            other = tl.load(NOISE + u * NOISE_sl, mask=u < length, other=0)[None, :]
            none = (own != own) & (other != other)
            less = (other < own) | ((own != own) & (other == other))
            tie = ((other == own) | none) & (u[None, :] < t[:, None])
            count += ((less | tie) & (u < length)[None, :]).to(tl.int32)
        visible = (tl.sum(count, 1) < kept) & (t < length)
        places = before + tl.cumsum(visible.to(tl.int32), 0) - 1
        tl.store(KEEP + places, t.to(tl.int64), mask=visible)
        tl.store(MASK + t, tl.where(visible, 0.0, 1.0), mask=t < length)
        before += tl.sum(visible.to(tl.int32), 0)


@triton.jit(do_not_specialize=['kept', 'rows', 'columns', 'KEEP_sb'])
def visible_pixels(
    X, KEEP, OUT, kept, rows, columns, X_sb, X_sc, X_sh, X_sw, KEEP_sb, KEEP_sl,
    CHANNELS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """OUT (batch, kept, CHANNELS * P * Q) contiguous from X (batch, CHANNELS, height, width) of any strides: patches of
    P x Q pixels at the places KEEP (batch, kept) of a grid of `rows` x `columns`, NaN for other places."""
    SIZE: tl.constexpr = CHANNELS * P * Q
    token = tl.program_id(0).to(tl.int64)
    entry = token // kept
    place = tl.load(KEEP + entry * KEEP_sb + token % kept * KEEP_sl)
    there = (place >= 0) & (place < rows * columns)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    at = X + entry * X_sb + tl.cast(e // (P * Q), tl.int64) * X_sc
    at += (place // columns * P + e % (P * Q) // Q) * X_sh + (place % columns * Q + e % Q) * X_sw
    pixels = tl.load(at, mask=(e < SIZE) & there, other=float('nan'))
    tl.store(OUT + token * SIZE + e, pixels.to(OUT.dtype.element_ty), mask=e < SIZE)
