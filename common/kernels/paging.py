"""What the attention kernels share: where the positions of a tile lie in the paged cache, and a product in fp32.

A tile is TILE neighbouring positions of one sequence; `tile` counts them from the sequence's start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from common.kernels.launch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def multiply_add(a, b, added):
    """a @ b + added in fp32."""
    if IS_INTERPRETED:
        # The interpreter takes bfloat16 for integers.
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), added)
    else:
        product = tl.dot(a, b, added, input_precision="ieee")
    return product


@triton.jit
def tile_blocks(block_table_P, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each position of a tile; 0 past the end."""
    offsets = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0 and TILE // BLOCK_SIZE <= 8:
        # One load a block, not one a position.
        PER_TILE: tl.constexpr = TILE // BLOCK_SIZE
        blocks = tl.zeros((TILE,), tl.int32)
        for block in tl.static_range(PER_TILE):
            in_use = tile * TILE + block * BLOCK_SIZE < end
            number = tl.load(block_table_P + tile * PER_TILE + block, mask=in_use, other=0).to(tl.int32)
            blocks = tl.where(offsets // BLOCK_SIZE == block, number, blocks)
    else:
        positions = tile * TILE + offsets
        blocks = tl.load(block_table_P + positions // BLOCK_SIZE, mask=positions < end, other=0).to(tl.int32)
    return blocks


@triton.jit
def tile_rows(blocks, tile, ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the key of each position of a tile begins; its value is BLOCK_SIZE rows further."""
    if TILE % BLOCK_SIZE == 0:
        slots = tl.arange(0, TILE) % BLOCK_SIZE
    else:
        slots = (tile * TILE + tl.arange(0, TILE)) % BLOCK_SIZE
    return blocks.to(tl.int64) * (2 * BLOCK_SIZE * ROW) + slots * ROW
