"""Tiles of 32-bit words: two bfloat16 each, or one float32. A word is loaded whole and taken apart in registers.

A tile's values are a tuple of float32 tiles of its shape: the values in the low halves, then those in the high halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.launch import INTERPRETED

_COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def load_words(pointer, offsets, END: tl.constexpr, EVEN: tl.constexpr, EVICTION: tl.constexpr):
    if EVEN:
        return tl.load(pointer + offsets, eviction_policy=EVICTION)
    else:
        return tl.load(pointer + offsets, mask=offsets < END, other=0, eviction_policy=EVICTION)


@triton.jit
def unpack(words, PACKED: tl.constexpr):
    """The two bfloat16 of each word, the first in its low half, or its one float32: a tuple of float32 tiles."""
    if PACKED:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words.to(tl.float32, bitcast=True),)


@triton.jit
def pack(parts, PACKED: tl.constexpr):
    """Words of float32 tiles, rounded to nearest."""
    if PACKED:
        if _COMPILED:
            # One instruction rounds two values; Triton's own conversions round one, at a quarter of the rate.
            words = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [parts[0], parts[1]], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            low = parts[0].to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
            words = low | (parts[1].to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        words = parts[0].to(tl.int32, bitcast=True)
    return words


@triton.jit
def add_values(left, right):
    added = ()
    for part in tl.static_range(len(left)):
        added += (left[part] + right[part],)
    return added


@triton.jit
def add_products(sums, left, right):
    for part in tl.static_range(len(left)):
        sums += left[part] * right[part]
    return sums


@triton.jit
def normalised(words, scale, weight_words, PACKED: tl.constexpr):
    parts = unpack(words, PACKED)
    weights = unpack(weight_words, PACKED)
    normed = ()
    for part in tl.static_range(len(parts)):
        normed += (parts[part] * scale * weights[part],)
    return pack(normed, PACKED)
