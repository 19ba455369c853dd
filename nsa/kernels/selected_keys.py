"""dk and dv of attention over chosen blocks, block by block: K and V stay put and the queries that chose the block pass by.

A program takes a part of a block's list of queries (inverse.py), rows = queries × heads. Lists of several parts (block 0's
holds every query) leave fp32 sums that a last kernel adds in order. A query's rows are read once for each of its blocks: parts
run in the order of their first queries, so that those which run at the same time find the same rows in L2. No atomics, and
lists are cut from their own start, so results are the same from run to run and whatever else is in the batch. On Hopper
selected_keys_hopper.py does the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.inverse import InverseIndex, Work, cut_lists, whole_range
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded, widths
from nsa.kernels.query_rows import load_rows
from nsa.kernels.tiles import KernelPlan, Tile

PART_ROWS = 8192
"""Rows (queries × heads) of a list that one program takes at most."""
ORDERED = 64
"""Parts that one program puts in order."""


def key_tile(dims: int, group: int, block: int, dtype: torch.dtype) -> Tile:
    """Fixed shapes of the Triton kernel; `dims` = padded Dk + Dv."""
    if dtype == torch.float32:
        return Tile(keys=min(padded(block), 32), rows=max(32 if dims <= 256 else 16, padded(group)), num_warps=4, num_stages=1)
    return Tile(keys=min(padded(block), 64), rows=max(32, padded(group)), num_warps=4 if dims <= 256 else 8, num_stages=3 if dims <= 256 else 2)


@triton.jit(do_not_specialize=["num_items"])
def order_kernel(queries, counts, firsts, sizes, order, num_items, ITEMS: tl.constexpr):
    """order `[Hkv, items]`: the KV head's parts by their first queries, and by their numbers where those are the same."""
    head = tl.program_id(1)
    count = tl.load(counts + head)
    if tl.program_id(0) * ITEMS >= count:
        return
    firsts += head * num_items
    sizes += head * num_items
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    there = (item < count) & (tl.load(sizes + item, mask=item < count, other=0) > 0)
    mine = tl.load(queries + tl.load(firsts + item, mask=there, other=0), mask=there, other=2147483647)
    rank = tl.zeros([ITEMS], tl.int32)
    for base in range(0, count, ITEMS):
        other = base + tl.arange(0, ITEMS)
        there = (other < count) & (tl.load(sizes + other, mask=other < count, other=0) > 0)
        theirs = tl.load(queries + tl.load(firsts + other, mask=there, other=0), mask=there, other=2147483647)
        before = (theirs[None, :] < mine[:, None]) | ((theirs[None, :] == mine[:, None]) & (other[None, :] < item[:, None]))
        rank += tl.sum((before & (other < count)[None, :]).to(tl.int32), 1)
    tl.store(order + head * num_items + rank, item, mask=item < count)


@triton.jit(do_not_specialize=["num_segments"])
def dkdv_kernel(
    d_out, q, k, v, lse, delta, gate, dk, dv, segment_dk, segment_dv, queries, counts, order, blocks, firsts, sizes, segments,
    block_sequence, block_ends, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head, num_segments,
    scale, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of KEYS keys of one block from one part of its list; fp32 sums where the list has more parts."""
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    if tl.program_id(0) >= tl.load(counts + kv_head):
        return
    item = kv_head * tl.num_programs(0) + tl.load(order + kv_head * tl.num_programs(0) + tl.program_id(0))
    block, size = tl.load(blocks + item), tl.load(sizes + item)
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    offset = key_end - key_start - tl.load(query_ends + sequence + 1)  # position = packed query row + offset
    inner = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    exists = (inner < SELECT) & (key < key_end - key_start)
    key_row = (key_start + key).to(tl.int64)
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_mask, value_mask = exists[:, None] & (key_dim < KEY_DIM)[None, :], exists[:, None] & (value_dim < VALUE_DIM)[None, :]
    k_tile = tl.load(k + key_row[:, None] * k_row + kv_head * k_head + key_dim[None, :], mask=key_mask, other=0.0)
    v_tile = tl.load(v + key_row[:, None] * v_row + kv_head * v_head + value_dim[None, :], mask=value_mask, other=0.0)
    queries += tl.load(firsts + item)
    TILE: tl.constexpr = ROWS // GROUP
    lane = tl.arange(0, ROWS)
    acc_k = tl.zeros([KEYS, KEY_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, VALUE_PAD], tl.float32)
    head = kv_head * GROUP + lane % GROUP
    for start in range(0, size, TILE):
        valid = (lane < TILE * GROUP) & (start + lane // GROUP < size)
        row = tl.load(queries + start + lane // GROUP, mask=valid, other=0)
        seen = exists[:, None] & (key[:, None] <= (row + offset)[None, :]) & valid[None, :]
        row = row.to(tl.int64)
        q_tile, do_tile, gates, deltas, lse_log2 = load_rows(
            d_out, q, lse, delta, gate, row, head, valid, num_kv_heads * GROUP, d_out_row, d_out_head, q_row, q_head, delta_row, delta_head,
            gate_row, gate_head, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD,
        )  # fmt: skip
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(s - lse_log2[None, :]), 0.0)
        acc_v += tl.dot((p * gates[None, :]).to(do_tile.dtype), do_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        ds = p * (dp * gates[None, :] - deltas[None, :])
        acc_k += tl.dot(ds.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    acc_k *= scale
    segment = tl.load(segments + item)
    if segment >= 0:
        row = (kv_head * num_segments + segment).to(tl.int64) * SELECT + inner
        tl.store(segment_dk + row[:, None] * KEY_DIM + key_dim[None, :], acc_k, mask=key_mask)
        tl.store(segment_dv + row[:, None] * VALUE_DIM + value_dim[None, :], acc_v, mask=value_mask)
    else:
        row = key_row * num_kv_heads + kv_head
        tl.store(dk + row[:, None] * KEY_DIM + key_dim[None, :], acc_k, mask=key_mask)
        tl.store(dv + row[:, None] * VALUE_DIM + value_dim[None, :], acc_v, mask=value_mask)


@triton.jit
def add_parts(sums, target, count, sum_row, target_row, exists, KEYS: tl.constexpr, SELECT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """The sum of `count` partial sums of KEYS keys, first to last."""
    dim = tl.arange(0, DIM_PAD)[None, :]
    mask = exists[:, None] & (dim < DIM)
    acc = tl.zeros([KEYS, DIM_PAD], tl.float32)
    for number in range(0, count):
        acc += tl.load(sums + (sum_row + number * SELECT) * DIM + dim, mask=mask, other=0.0)
    tl.store(target + target_row * DIM + dim, acc, mask=mask)


@triton.jit(do_not_specialize=["num_segments"])
def add_segments_kernel(
    segment_dk, segment_dv, dk, dv, segment_firsts, segment_counts, block_sequence, block_ends, key_ends, num_segments,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """dk (z = 0) and dv (z = 1) of KEYS keys of the blocks that have several parts."""
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    STEPS: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    block = tl.program_id(0) // STEPS
    item = kv_head * (tl.num_programs(0) // STEPS) + block
    count = tl.load(segment_counts + item)
    if count <= 1:
        return
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    inner = tl.program_id(0) % STEPS * KEYS + tl.arange(0, KEYS)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    exists = (inner < SELECT) & (key < key_end - key_start)
    target_row = ((key_start + key).to(tl.int64) * num_kv_heads + kv_head)[:, None]
    sum_row = ((kv_head * num_segments + tl.load(segment_firsts + item)).to(tl.int64) * SELECT + inner)[:, None]
    if tl.program_id(2) == 0:
        add_parts(segment_dk, dk, count, sum_row, target_row, exists, KEYS, SELECT, KEY_DIM, KEY_PAD)
    else:
        add_parts(segment_dv, dv, count, sum_row, target_row, exists, KEYS, SELECT, VALUE_DIM, VALUE_PAD)


def most_segments(entries: int, part: int, num_blocks: int) -> int:
    """How many parts lists of several parts can have together (at least 1), where all lists have `entries` at most: each list may have one
    that is not full beside its full ones."""
    full = entries // part
    return max(1, full + min(full, num_blocks))


def by_first_query(index: InverseIndex, work: Work) -> torch.Tensor:
    """int32 `[Hkv, parts]`: the parts of one range in the order of their first queries, those without any last; nothing of use beyond their count."""
    _, num_kv_heads, num_parts = work.blocks.shape
    order = torch.empty(num_kv_heads, num_parts, dtype=torch.int32, device=work.blocks.device)
    launch(
        order_kernel, (-(-num_parts // ORDERED), num_kv_heads),
        index.queries, work.counts, work.firsts, work.sizes, order, num_parts, ITEMS=ORDERED, num_warps=4,
    )  # fmt: skip
    return order


def takes_hopper(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Whether selected_keys_hopper.py computes dk and dv; it is imported only where it can run."""
    if not runs_hopper_kernels(q.device):
        return False
    from nsa.kernels import selected_keys_hopper

    return selected_keys_hopper.takes(d_out, q, k, v, size)


def selected_dkdv(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta_b: torch.Tensor, gate: torch.Tensor,
    index: InverseIndex, plan: KernelPlan, config: SparsityConfig, *, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dk `[Tk, Hkv, Dk]` and dv `[Tk, Hkv, Dv]` of `selected_backward` in k's dtype; zero for keys nobody chose."""
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    part = max(1, PART_ROWS // group)
    num_segments = most_segments(q.shape[0] * n, part, index.num_blocks)
    ((_, work),) = cut_lists(index, whole_range(plan), plan, size, part, q.shape[0] * n, init=0, local=-1, backward=True)
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=k.dtype, device=k.device)
    sums = tuple(torch.empty(num_kv_heads, num_segments, size, dim, dtype=torch.float32, device=q.device) for dim in (key_dim, value_dim))
    tables = (
        dk, dv, *sums, index.queries, work.counts, by_first_query(index, work), work.blocks, work.firsts, work.sizes, work.segments,
        index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends,
    )  # fmt: skip
    grid, dims = (work.blocks.shape[2], num_kv_heads), widths(key_dim, value_dim)
    if takes_hopper(d_out, q, k, v, size):
        from nsa.kernels import selected_keys_hopper

        selected_keys_hopper.dkdv(grid, d_out, q, k, v, lse, delta_b, gate, tables, num_segments, scale=scale)
    else:
        shape = key_tile(padded(key_dim) + padded(value_dim), group, size, q.dtype)
        launch(
            dkdv_kernel, (*grid, -(-size // shape.keys)),
            d_out, q, k, v, lse, delta_b, gate, *tables, *d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *delta_b.stride(), *gate.stride(), num_segments, scale, scale * LOG2_E,
            GROUP=group, **dims, ROWS=shape.rows, KEYS=shape.keys, SELECT=size, PRECISION=dot_precision(),
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
    keys = min(padded(size), 32)
    launch(
        add_segments_kernel, (index.num_blocks * -(-size // keys), num_kv_heads, 2),
        *sums, dk, dv, work.segment_firsts, work.segment_counts, index.block_sequence, index.block_ends, plan.key_ends, num_segments,
        **dims, KEYS=keys, SELECT=size, num_warps=4,
    )  # fmt: skip
    return dk, dv
