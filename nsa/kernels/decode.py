"""Decode attention over the paged cache: the last few queries of each sequence, in four or five launches that a CUDA graph can hold.

1. `first_kernel`: compressed tokens, split along the sequence, with each block's share of the score, per head; and the window's blocks.
2. `score_kernel`: block scores (the heads' shares, normalised), and the best n blocks of each chunk of blocks.
3. `blocks_kernel`: the best n of those; attention over the chosen blocks, split by blocks. In large batches `pick_kernel` finds the n first.
4. `combine_kernel`: partial results of the three branches, times the gates.

On Hopper and later each of 2 to 4 starts while its predecessor ends. Grids depend on shapes alone; programs past a sequence's end
leave at once.

Every partial sum is kept relative to a whole power of two, so rescaling is exact, and outputs are summed over a fixed binary tree
of leaves (`tree_sum`). Other sums have tiles of one shape, and no layout depends on the capacity (`do_not_specialize`). So neither
the batch nor how many leaves a program takes changes a bit of a result, and equal logits give equal scores wherever they stand.
Leaves out prefill, φ (the cache holds its outputs) and gradients.

Names: m queries per sequence, rows = m·G of one KV head, row r = (query r // G, head r % G). Slot s of a sequence's
compressed pages holds compressed token s − first with first = l/d − 1, complete once the sequence has (s+1)·d tokens; the
l'/d slots of one block form a group. Block j scores the slots of group j and the first `first` of group j+1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from nsa.attention import LayerCache
from nsa.blocks import num_blocks, selection_dtype
from nsa.config import SparsityConfig
from nsa.kernels.decode_kernels import blocks_kernel, combine_kernel, first_kernel, pick_kernel, score_kernel
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded

MIN_PROGRAMS = 512
"""A program of many rows takes several leaves where at least this many programs remain: four to each of an H100's SMs."""
MIN_PICKED = 128
"""From this many queries × KV heads on the n best blocks are ranked by a kernel of their own. In smaller batches each program of the next one
ranks them for itself: the programs are few, and a launch takes longer than what they repeat."""
FEW_ROWS = 8
"""Up to here partial outputs are small beside the K and V they come from, and programs of one leaf, which need fewer registers, are faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """Tile sizes of the four kernels. All but the numbers of leaves change results, by rounding."""

    leaf: int
    """Compressed slots of one leaf, a power of two >= 16."""
    rows: int
    """Rows (query, head) of one program over compressed tokens, a power of two >= 16."""
    compression_leaves: int
    """Leaves of one program over compressed tokens: 1, 2 or 4."""
    block_tile: int
    """Tokens of one leaf of the chosen and window blocks, a power of two >= 16."""
    block_leaves: int
    """Leaves of one program over chosen or window blocks: 1, 2 or 4."""
    chunk: int
    """Blocks of which one program of the score kernel keeps the best n: a power of two >= n."""
    warps: int = 4
    """Warps of a program of the first kernel."""


def decode_tiles(q: torch.Tensor, cache: LayerCache, capacity: int, config: SparsityConfig) -> DecodeTiles:
    """The tiles for queries `[B, m, Hq, Dk]` and sequences of at most `capacity` tokens."""
    batch, num_new, num_heads, _ = q.shape
    heads, group = cache.num_kv_heads, num_heads // cache.num_kv_heads
    row_bytes = padded(max(cache.key_dim, cache.value_dim)) * cache.cmp.element_size()
    per_block = config.select_block_size // config.compress_stride
    # fp32 products have no tensor cores: more rows, or a loop over leaves, and the compiler spills thousands of bytes a thread.
    exact = q.dtype == torch.float32
    rows = 16 if exact else min(padded(num_new * group), max(16, 32768 // row_bytes), 128)
    leaf = max(min(128 if rows < 128 else 64, max(16, 32768 // row_bytes)), triton.next_power_of_2(per_block))
    block_tile = min(padded(config.select_block_size), 64, max(16, 32768 // row_bytes))
    leaves = -(-num_blocks(capacity, config) // (leaf // triton.next_power_of_2(per_block)))
    compression = batch * heads * -(-num_new * group // rows) * leaves
    blocks = batch * num_new * heads * sum(block_leaf_counts(config, block_tile))
    sizes = (1,) if exact or num_new * group <= FEW_ROWS else (4, 2, 1)
    count = num_blocks(capacity, config)
    chunk = 128 if count <= 4096 else 512
    return DecodeTiles(
        leaf=leaf,
        rows=rows,
        compression_leaves=next((k for k in sizes if compression // k >= MIN_PROGRAMS), 1),
        block_tile=block_tile,
        block_leaves=next((k for k in sizes if blocks // k >= MIN_PROGRAMS), 1),
        chunk=max(chunk, triton.next_power_of_2(config.num_selected_blocks)),
        warps=8 if rows >= 64 else 4,
    )


def block_leaf_counts(config: SparsityConfig, tile: int) -> tuple[int, int]:
    """Leaves of `tile` tokens of the chosen blocks and of the window's, each rounded up to a multiple of 4."""
    size = config.select_block_size
    per_block = -(-size // tile)
    window = ((config.window_size + size - 2) // size + 1) * per_block
    return -(-config.num_selected_blocks * per_block // 4) * 4, -(-window // 4) * 4


def starts_early(device: torch.device) -> bool:
    """Whether kernels on `device` can start before their predecessor has ended (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def paged_decode(
    q: torch.Tensor, cache: LayerCache, block_table: torch.Tensor, seq_lens: torch.Tensor, gates: torch.Tensor, *, config: SparsityConfig,
    selection: torch.Tensor | None, return_selection: bool, scale: float, out: torch.Tensor | None = None, tiles: DecodeTiles | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`nsa_decode` on Triton kernels; see there. A padded row (length 0) gets output 0 and selection −1.

    Args:
        tiles: other tile sizes than `decode_tiles` gives, for tests and tuning.
    """
    batch, num_new, num_heads, key_dim = q.shape
    heads, page_size, value_dim = cache.num_kv_heads, cache.page_size, cache.value_dim
    group, capacity = num_heads // heads, block_table.shape[1] * page_size
    tiles = tiles or decode_tiles(q, cache, capacity, config)
    out = q.new_empty(batch, num_new, num_heads, value_dim) if out is None else out
    used = torch.empty(batch, num_new, heads, config.num_selected_blocks, dtype=selection_dtype(capacity, config), device=q.device)
    if not batch:
        return (out, used) if return_selection else out
    if q.stride(-1) != 1:
        q = q.contiguous()
    stride, size, num = config.compress_stride, config.select_block_size, config.num_selected_blocks
    per_block = size // stride
    per_block2 = triton.next_power_of_2(per_block)
    groups, count = tiles.leaf // per_block2, num_blocks(capacity, config)
    num_leaves = -(-count // groups)
    num_parts = -(-num_leaves // tiles.compression_leaves)
    chosen_leaves, window_leaves = block_leaf_counts(config, tiles.block_tile)
    all_leaves = chosen_leaves + window_leaves
    raw_parts = all_leaves // tiles.block_leaves
    num_chunks, choose = -(-count // tiles.chunk), count > num
    first = config.compress_block_size // stride - 1

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(batch * num_new * num_heads, *shape, dtype=torch.float32, device=q.device)

    cmp_stats, cmp_parts = (scratch(num_leaves), scratch(num_leaves)), (scratch(num_parts), scratch(num_parts, value_dim))
    raw_partial = (scratch(all_leaves), scratch(all_leaves), scratch(raw_parts), scratch(raw_parts, value_dim))
    scores, leaf_edge = (scratch(num_leaves * groups), scratch(num_leaves)) if choose else (out, out)
    keys = torch.empty(batch * num_new * heads * num_chunks * (tiles.chunk + num) if choose else 0, dtype=torch.int64, device=q.device)
    chunk_keys, candidates = keys.split([len(keys) * tiles.chunk // (tiles.chunk + num), len(keys) * num // (tiles.chunk + num)])
    given = used if selection is None else selection
    common = {"HEADS": heads, "GROUP": group}
    ranking = {"NUM": num, "NUM2": triton.next_power_of_2(num), "CHUNK": tiles.chunk, "CANDIDATES": triton.next_power_of_2(num_chunks * num)}
    picked = choose and batch * num_new * heads >= MIN_PICKED
    dims = {"DK": key_dim, "DV": value_dim, "DK2": padded(key_dim), "DV2": padded(value_dim)}
    raw_dims = {
        "GROUP2": padded(group), "SIZE": size, "TILE": tiles.block_tile, "PAGE": page_size, "ALL_LEAVES": all_leaves,
        "PRECISION": dot_precision(),
    }  # fmt: skip
    pdl = starts_early(q.device)
    after = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    base2 = scale * LOG2_E

    row_tiles = -(-num_new * group // tiles.rows)
    launch(
        first_kernel, (heads * (num_parts * row_tiles + num_new * (window_leaves // tiles.block_leaves)), batch),
        q, cache.cmp, cache.raw, block_table, seq_lens, *cmp_stats, leaf_edge, *cmp_parts, scores, *raw_partial, base2,
        *q.stride()[:3], *cache.cmp.stride()[:3], *cache.raw.stride()[:4], block_table.stride(0), num_leaves, num_parts, count, num_new,
        **common, **dims, **raw_dims, STRIDE=stride, FIRST=first, PER_BLOCK=per_block, PER_BLOCK2=per_block2, PER_PAGE=page_size // stride,
        LEAF=tiles.leaf, ROWS=tiles.rows, CMP_LEAVES=tiles.compression_leaves, WINDOW=config.window_size, WINDOW_SET=cache.set_index("win"),
        CHOSEN_LEAVES=chosen_leaves, RAW_LEAVES=tiles.block_leaves, SCORES=choose, PDL=pdl,
        num_warps=tiles.warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    if choose:
        launch(
            score_kernel, (heads * num_chunks, num_new, batch),
            *cmp_stats, leaf_edge, scores, chunk_keys, candidates, given, seq_lens, *given.stride()[:3], num_leaves, num_chunks, num_new,
            **common, **after, GROUP2=triton.next_power_of_2(group), STRIDE=stride, FIRST=first, PER_BLOCK=per_block, GROUPS=groups, SIZE=size,
            NUM=num, NUM_INIT=config.num_init_blocks, NUM_LOCAL=config.num_local_blocks, CHUNK=tiles.chunk, GIVEN=selection is not None,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    if picked:
        launch(
            pick_kernel, (heads, num_new, batch), seq_lens, candidates, given, used, *given.stride(), num_chunks, num_new,
            HEADS=heads, SIZE=size, **ranking, **after, GIVEN=selection is not None, num_warps=4,
        )  # fmt: skip
    launch(
        blocks_kernel, (heads * (chosen_leaves // tiles.block_leaves), num_new, batch),
        q, cache.raw, block_table, seq_lens, candidates, given, used, *raw_partial, base2,
        *q.stride()[:3], *cache.raw.stride()[:4], block_table.stride(0), *given.stride(), num_chunks, count, num_new, **common, **dims, **raw_dims,
        **after, **ranking, CHOSEN_SET=cache.set_index("slc"), LEAVES=tiles.block_leaves, SCORES=choose and not picked,
        GIVEN=selection is not None and not picked, RETURN=return_selection and not picked, PICKED=picked,
        num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    # One warp adds up a program's part of a row; 32·32 numbers at a time leave it enough registers.
    columns = max(16, min(padded(value_dim), 32 * min(tiles.compression_leaves, tiles.block_leaves)))
    launch(
        combine_kernel, (num_heads * -(-value_dim // columns), num_new, batch),
        *cmp_stats, *cmp_parts, *raw_partial, gates, seq_lens, out, *gates.stride(), num_leaves, num_parts, num_new,
        **common, **after, DV=value_dim, COLUMNS=columns, STRIDE=stride, SLOTS=groups * per_block, CHOSEN_LEAVES=chosen_leaves,
        ALL_LEAVES=all_leaves, CMP_LEAVES=tiles.compression_leaves, RAW_LEAVES=tiles.block_leaves,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return (out, used) if return_selection else out
