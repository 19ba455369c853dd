"""The blocks that neighbouring queries share: for each tile of queries and KV head the union of their choices.

Neighbours choose mostly the same blocks (in SmolLM2 16 queries with 16 blocks each choose 27 different ones out of 128, in
random choices it would be 90), so a kernel that takes a tile of queries reads a block once for all that chose it
(selected.py). A list is ascending and has a bit for each query, so a query's own blocks come in the same order whoever its
neighbours are. Memory is linear in the number of choices, and nothing is read back by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.launch import ceil_div, launch, power_of_two
from nsa.kernels.tiles import KernelPlan

MAX_QUERIES = 32
"""Queries of a tile at most: each has a bit of an int32."""
WARP_ENTRIES = 512
"""Choices that one warp holds in registers."""


@dataclass(frozen=True, slots=True)
class BlockUnions:
    """Blocks that any query of a tile chose. Rows of the lists are tile by tile, KV heads side by side.

    tiles: int32 `[tiles, 2]`, `plan.query_tiles(queries)`.
    blocks: int32 `[tiles·Hkv, capacity]`, block numbers from the sequence's start, ascending; nothing of use beyond the count.
    bits: int32, the same shape: bit i says that query i of the tile chose the block.
    counts: int32 `[tiles·Hkv]`, at least 1: a tile that chose nothing has block 0 without a bit.
    total: int32 `[1]`, the sum of the counts.
    """

    queries: int
    tiles: torch.Tensor
    blocks: torch.Tensor
    bits: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor


@triton.jit(do_not_specialize=["capacity"])
def unions_kernel(
    selection, tiles, query_ends, key_ends, blocks, bits, counts, total, num_kv_heads, capacity,
    SELECT: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, QUERIES: tl.constexpr, QUERIES_PAD: tl.constexpr,
):  # fmt: skip
    """The list of one tile and KV head: again and again the lowest block that is left."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    first, end = tl.load(query_ends + sequence), tl.load(query_ends + sequence + 1)
    last_block = (tl.load(key_ends + sequence + 1) - tl.load(key_ends + sequence) - 1) // SELECT
    query, slot = tl.arange(0, QUERIES_PAD), tl.arange(0, CHOSEN_PAD)
    row = first + start + query
    mask = ((query < QUERIES) & (row < end))[:, None] & (slot < CHOSEN)[None, :]
    source = (row.to(tl.int64) * num_kv_heads + kv_head) * CHOSEN
    left = tl.load(selection + source[:, None] + slot[None, :], mask=mask, other=-1)
    NONE: tl.constexpr = 2147483647
    left = tl.where((left < 0) | (left > last_block), NONE, left)
    item = tile.to(tl.int64) * num_kv_heads + kv_head
    blocks += item * capacity
    bits += item * capacity
    count = 0
    block = tl.min(tl.min(left, 1), 0)
    if block == NONE:
        tl.store(blocks, 0)
        tl.store(bits, 0)
        count = 1
    while block < NONE:
        here = left == block
        mine = tl.max(here.to(tl.int32), 1)
        tl.store(blocks + count, block)
        tl.store(bits + count, tl.sum(mine << query, 0))
        left = tl.where(here, NONE, left)
        block = tl.min(tl.min(left, 1), 0)
        count += 1
    tl.store(counts + item, count)
    tl.atomic_add(total, count, sem="relaxed")


def unite_choices(selection: torch.Tensor, queries: int, plan: KernelPlan, config: SparsityConfig) -> BlockUnions:
    """The unions over tiles of `queries` queries.

    Args:
        selection: int32 `[T, Hkv, n]`, contiguous, block numbers from the sequence's start; negative ones and those after
            the sequence's last block are none.
        queries: 1 to MAX_QUERIES.
        plan: rows of the sequences.
    """
    num_kv_heads, n = selection.shape[1:]
    tiles = plan.query_tiles(queries)
    capacity = min(queries * n, ceil_div(plan.max_key_length, config.select_block_size))
    # Rows begin at 16 bytes whatever the capacity.
    capacity = max(4, ceil_div(capacity, 4) * 4)
    blocks = torch.empty(2, tiles.shape[0] * num_kv_heads, capacity, dtype=torch.int32, device=selection.device)
    counts = torch.empty(tiles.shape[0] * num_kv_heads, dtype=torch.int32, device=selection.device)
    total = torch.zeros(1, dtype=torch.int32, device=selection.device)
    queries_pad, chosen_pad = power_of_two(queries), power_of_two(n)
    launch(
        unions_kernel, (tiles.shape[0], num_kv_heads),
        selection, tiles, plan.query_ends, plan.key_ends, blocks[0], blocks[1], counts, total, num_kv_heads, capacity,
        SELECT=config.select_block_size, CHOSEN=n, CHOSEN_PAD=chosen_pad, QUERIES=queries, QUERIES_PAD=queries_pad,
        num_warps=min(8, max(1, queries_pad * chosen_pad // WARP_ENTRIES)),
    )  # fmt: skip
    return BlockUnions(queries, tiles, blocks[0], blocks[1], counts, total)
