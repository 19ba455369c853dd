"""Decode attention over the paged cache: the last few queries of each sequence, in four or five launches that a CUDA graph can hold.

1. `compression_kernel`: compressed tokens, split along the sequence, with each block's share of the score, per head.
2. `choose_kernel`: block scores (the heads' shares, normalised), and the best n blocks. For very long block tables instead `score_kernel`,
   which keeps the best n of each chunk of blocks, and `pick_kernel`, which finds the n best of those.
3. `blocks_kernel`: attention over the window and over the chosen blocks, split by blocks. The window's programs come first and wait for
   nothing, so that they read while blocks are still being chosen.
4. `combine_kernel`: partial results of the three branches, times the gates.

On Hopper and later each of 2 to 4 starts while its predecessor ends. Grids depend on shapes alone; programs past a sequence's end
leave at once. On Hopper 1 and 3 are kernels in Gluon for half precision (decode_hopper.py,
which says what they do otherwise, and decode_blocks_hopper.py).

Every partial sum is kept relative to a whole power of two, so rescaling is exact, and outputs are summed over a fixed binary tree
of leaves (`tree_sum`). Other sums have tiles of one shape or an order of their own, and no layout depends on the capacity
(`do_not_specialize`). So neither the batch nor how many leaves a program takes changes a bit of a result, and equal logits give equal
scores wherever they stand. Leaves out prefill, φ (the cache holds its outputs) and gradients.

Names: m queries per sequence, rows = m·G of one KV head, row r = (query r // G, head r % G). Slot s of a sequence's
compressed pages holds compressed token s − first with first = l/d − 1, complete once the sequence has (s+1)·d tokens; the
l'/d slots of one block form a group. Block j scores the slots of group j and the first `first` of group j+1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from nsa.attention import LayerCache
from nsa.blocks import num_blocks, selection_dtype
from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.decode_choice import choose_kernel, pick_kernel, score_kernel
from nsa.kernels.decode_kernels import blocks_kernel, combine_kernel, compression_kernel
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded

MIN_PROGRAMS = 512
"""A program of many rows takes several leaves where at least this many programs remain: four to each of an H100's SMs."""
MAX_PROGRAMS = 2048
"""A sequence's programs go round its leaves where there would be more than this: with 512 short sequences in tables for 65,000 tokens the
programs that have nothing to do took six times as long as the others."""
MIN_EARLY = 64
"""From this many queries × KV heads on the window is read as soon as the first kernel leaves room, in smaller batches while blocks are chosen:
there the first kernel is one wave, which it would hold up."""
MAX_CHOSEN = 32768
"""Scores (heads of a group, at least two, × blocks of the table) of a program that chooses; longer tables are cut into chunks."""
MAX_SCORING = 1024
"""As MAX_PROGRAMS, of the score kernel."""
FEW_ROWS = 8
"""Up to here partial outputs are small beside the K and V they come from, and programs of one leaf, which need fewer registers, are faster
(but not on Hopper)."""


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
    hopper = takes_hopper(q, cache, config)
    if hopper and cache.key_dim + cache.value_dim <= 128:
        leaf = max(64, per_block)  # short sequences fill less than that
    block_tile = min(padded(config.select_block_size), 64, max(16, 32768 // row_bytes))
    leaves = -(-num_blocks(capacity, config) // (leaf // triton.next_power_of_2(per_block)))
    compression = batch * heads * -(-num_new * group // rows) * leaves
    blocks = batch * num_new * heads * sum(block_leaf_counts(config, block_tile))
    sizes = (1,) if exact or (num_new * group <= FEW_ROWS and not hopper) else (4, 2, 1)
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


def takes_hopper(q: torch.Tensor, cache: LayerCache, config: SparsityConfig) -> bool:
    """Whether decode_hopper.py's kernels compute the call: tiles that tensor cores take, and pages that copies of 16 bytes do.

    Like the tiles this depends on nothing that varies with the batch."""
    per_block = config.select_block_size // config.compress_stride
    return (
        runs_hopper_kernels(q.device)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == cache.cmp.dtype == cache.raw.dtype
        and cache.key_dim in (64, 128, 256)
        and cache.value_dim in (64, 128, 256)
        and q.shape[1] * q.shape[2] // cache.num_kv_heads <= 64
        and config.select_block_size % 64 == 0
        and per_block & (per_block - 1) == 0
        and in_16_bytes(cache.cmp)
        and in_16_bytes(cache.raw)
    )


def strides(x: torch.Tensor) -> list[int]:
    """Strides of all dimensions but the last, 0 where there is one element."""
    return [stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def in_16_bytes(x: torch.Tensor) -> bool:
    """Whether rows of the last dimension begin where the kernels know that 16 bytes can be copied at once."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides(x))


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
    hopper = takes_hopper(q, cache, config) and tiles.leaf % 64 == 0 and tiles.leaf >= config.select_block_size // config.compress_stride
    if q.stride(-1) != 1 or (hopper and not in_16_bytes(q)):
        q = q.clone(memory_format=torch.contiguous_format)
    stride, size, num = config.compress_stride, config.select_block_size, config.num_selected_blocks
    per_block = size // stride
    per_block2 = triton.next_power_of_2(per_block)
    groups, count = tiles.leaf // per_block2, num_blocks(capacity, config)
    num_leaves = -(-count // groups)
    width = triton.next_power_of_2(num_leaves) * groups
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
    row_stats = scratch(2) if choose else out
    keys = torch.empty(batch * num_new * heads * num_chunks * (tiles.chunk + num) if choose else 0, dtype=torch.int64, device=q.device)
    chunk_keys, candidates = keys.split([len(keys) * tiles.chunk // (tiles.chunk + num), len(keys) * num // (tiles.chunk + num)])
    given = used if selection is None else selection
    statistics = (*cmp_stats, leaf_edge, scores, row_stats)
    common = {"HEADS": heads, "GROUP": group}
    ranked = {"NUM": num, "NUM2": triton.next_power_of_2(num)}
    chosen_at_once = choose and width * max(group, 2) <= MAX_CHOSEN
    dims, dims2 = {"DK": key_dim, "DV": value_dim}, {"DK2": padded(key_dim), "DV2": padded(value_dim)}
    pdl = starts_early(q.device)
    after = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    base2 = scale * LOG2_E
    # Where chosen blocks and window are both the whole sequence and have the same keys, the window's result is a copy.
    once = selection is None and cache.set_index("slc") == cache.set_index("win")

    row_tiles = -(-num_new * group // tiles.rows)
    compressed: dict[str, Any] = {"DK": key_dim, "DV": value_dim, "STRIDE": stride, "FIRST": first, "PER_BLOCK": per_block}
    compressed |= {"PER_PAGE": page_size // stride, "LEAF": tiles.leaf, "LEAVES": tiles.compression_leaves, "SCORES": choose, "PDL": pdl}
    of_blocks = {
        "SIZE": size, "PAGE": page_size, "WINDOW": config.window_size, "CHOSEN_SET": cache.set_index("slc"), "WINDOW_SET": cache.set_index("win"),
        "CHOSEN_LEAVES": chosen_leaves, "ALL_LEAVES": all_leaves, "LEAVES": tiles.block_leaves, "PICKED": choose,
        "GIVEN": selection is not None and not choose, "REPLAYED": selection is not None, "ONCE": once,
    }  # fmt: skip
    first_arguments = (
        q, cache.cmp, block_table, seq_lens, *cmp_stats, leaf_edge, *cmp_parts, scores, base2, *strides(q), *strides(cache.cmp),
        block_table.stride(0), num_leaves, num_parts, count,
    )  # fmt: skip
    if hopper:
        from nsa.kernels import decode_blocks_hopper, decode_hopper

        decode_hopper.compression(first_arguments, q, heads, num_parts, {**common, **compressed})
    else:
        programs = min(num_parts, -(-MAX_PROGRAMS // (batch * heads * row_tiles)))
        launch(
            compression_kernel, (heads * programs * row_tiles, batch), *first_arguments, programs, num_new,
            **common, **compressed, **dims2, PER_BLOCK2=per_block2, ROWS=tiles.rows, LONE=programs == num_parts, PRECISION=dot_precision(),
            num_warps=tiles.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    scoring = {
        "GROUP2": triton.next_power_of_2(group), "STRIDE": stride, "FIRST": first, "PER_BLOCK": per_block, "GROUPS": groups, "SIZE": size,
        "NUM": num, "NUM_INIT": config.num_init_blocks, "NUM_LOCAL": config.num_local_blocks, "GIVEN": selection is not None,
    }  # fmt: skip
    if chosen_at_once:
        launch(
            choose_kernel, (heads, num_new, batch), *statistics, given, used, seq_lens, *given.stride(), num_leaves, num_new,
            **common, **after, **scoring, LEAVES=width // groups, NUM2=triton.next_power_of_2(num), LATE=batch * num_new * heads < MIN_EARLY,
            num_warps=max(4, min(16, width * group // 2048)), enable_fp_fusion=False,
        )  # fmt: skip
    elif choose:
        programs = min(num_chunks, -(-MAX_SCORING // (batch * num_new * heads)))
        launch(
            score_kernel, (heads * programs, num_new, batch),
            *statistics, chunk_keys, candidates, given, seq_lens, *given.stride()[:3], num_leaves, num_chunks, programs, num_new,
            **common, **after, **scoring, CHUNK=tiles.chunk, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        launch(
            pick_kernel, (heads, num_new, batch), seq_lens, candidates, given, used, *given.stride(), num_chunks, num_new,
            HEADS=heads, SIZE=size, **ranked, **after, CHUNK=tiles.chunk, CANDIDATES=triton.next_power_of_2(num_chunks * num),
            GIVEN=selection is not None, num_warps=4,
        )  # fmt: skip
    block_arguments = (
        q, cache.raw, block_table, seq_lens, given, used, *raw_partial, base2,
        *strides(q), *strides(cache.raw), block_table.stride(0), *given.stride(), count, batch,
    )  # fmt: skip
    if hopper:
        decode_blocks_hopper.blocks(block_arguments, q, heads, {**common, **dims, **after, **ranked, **of_blocks})
    else:
        launch(
            blocks_kernel, (heads * raw_parts * num_new * batch,), *block_arguments, num_new,
            **common, **dims, **dims2, **after, **ranked, **of_blocks, GROUP2=padded(group), TILE=tiles.block_tile,
            RETURN=return_selection and not choose, PRECISION=dot_precision(), num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    # One warp adds up a program's part of a row; 32·32 numbers at a time leave it enough registers.
    columns = max(16, min(padded(value_dim), 32 * min(tiles.compression_leaves, tiles.block_leaves)))
    launch(
        combine_kernel, (num_heads * -(-value_dim // columns), num_new, batch),
        *cmp_stats, *cmp_parts, *raw_partial, gates, seq_lens, out, *gates.stride(), num_leaves, num_parts, num_new,
        **common, **after, DV=value_dim, COLUMNS=columns, STRIDE=stride, SLOTS=groups * per_block, CHOSEN_LEAVES=chosen_leaves,
        ALL_LEAVES=all_leaves, CMP_LEAVES=tiles.compression_leaves, RAW_LEAVES=tiles.block_leaves,
        SIZE=size, TILE=tiles.block_tile, NUM=num, WINDOW=config.window_size, ONCE=once, REPLAYED=selection is not None,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return (out, used) if return_selection else out
