"""Attention over chosen blocks, block by block, where neighbouring queries choose differently (selected.py): forward and dq.

K and V of a block stay put and the queries that chose it pass by. What each row got from each of its n blocks waits in a
scratch until a second kernel adds it up in slot order. One KV head and range of queries after another, so that the scratch
stays small.

    forward   gathered_forward_kernel (softmax of each block by itself) -> merge_kernel, which also computes the blocks
              that neighbouring queries share (the sequence's first and each query's last), so that they skip the scratch
    dq        gathered_dq_kernel (a block's part of dq) -> add_dq_kernel

Whether the choices are of that kind is known on the device alone: every kernel ends at once where the unions of the choices
(unions.py) are small, `total` <= `limit`. No atomics, the same results from run to run. Leaves out big groups and fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.inverse import InverseIndex, Work, cut_lists, query_cuts
from nsa.kernels.launch import LOG2_E, ceil_div, dot_precision, launch, padded, power_of_two, widths
from nsa.kernels.query_rows import load_rows
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import BlockUnions

MAX_GROUP = 8
"""Beyond it a tile has so few queries that their union costs no more, whatever they choose (19.0 against 18.6 ms at 64k, group 16, random
blocks)."""
MAX_BLOCK_BYTES = 2**17  # K and V beyond this do not fit into shared memory beside the queries
MIN_BLOCKS = 128
"""In sequences of fewer blocks than this no union is large."""
LIMIT = 4
"""Block by block is faster where the unions of 64 rows' choices have more than this many times n blocks on average (group 4 at 64k: 12.0 ms
against 6.5 with 32 blocks and 30 with 158, n = 16)."""
DTYPES = (torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """Rows (queries × heads) of a tile, and how its program is scheduled (stages of merge, add_dq: of the loop over slots)."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GatherShapes:
    """Every number of the block-major kernels that is tuned.

    part: rows of a list that one program takes at most. scratch: bytes. shared_blocks: compute first and last blocks in the
    merge kernel.
    """

    block: Launch
    merge: Launch
    add_dq: Launch
    part: int = 1024
    scratch: int = 2**29
    shared_blocks: bool = True


def gather_shapes(dims: int, group: int, dtype: torch.dtype) -> GatherShapes:
    """The fixed table; `dims` = padded Dk + Dv."""
    if dtype == torch.float32:
        small = Launch(padded(group), 4, 1)
        return GatherShapes(block=small, merge=small, add_dq=small)
    merge = Launch(32, 8 if dims > 384 else 4, 2) if dims > 256 else Launch(64, 4, 3)
    return GatherShapes(block=Launch(64, 8 if dims > 384 else 4, 2), merge=merge, add_dq=Launch(32, 4, 3))


def may_gather(group: int, plan: KernelPlan, config: SparsityConfig, block_bytes: int, dtype: torch.dtype) -> bool:
    """Whether these kernels are launched beside those for shared blocks: small groups, sequences of many blocks, blocks
    whose K and V (`block_bytes`) fit, half precision."""
    long = plan.max_key_length > MIN_BLOCKS * config.select_block_size
    return group <= MAX_GROUP and long and block_bytes <= MAX_BLOCK_BYTES and dtype in DTYPES


def most_shared(unions: BlockUnions, config: SparsityConfig, factor: int) -> int:
    """The largest total of union sizes up to which blocks count as shared, over tiles of `factor` · 64 rows."""
    return LIMIT * factor * config.num_selected_blocks * unions.counts.shape[0]


@triton.jit
def load_block(
    block, kv_head, k, v, k_row, k_head, v_row, v_head, block_sequence, block_ends, query_ends, key_ends,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """A block's keys in their sequence, as packed rows, and which exist; what makes a packed query row a position; K, V."""
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    inner, key_dim, value_dim = tl.arange(0, KEYS), tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    exists = (inner < SELECT) & (key < key_end - key_start)
    row = (key_start + key).to(tl.int64)
    key_mask, value_mask = exists[:, None] & (key_dim < KEY_DIM)[None, :], exists[:, None] & (value_dim < VALUE_DIM)[None, :]
    k_tile = tl.load(k + row[:, None] * k_row + kv_head * k_head + key_dim[None, :], mask=key_mask, other=0.0)
    v_tile = tl.load(v + row[:, None] * v_row + kv_head * v_head + value_dim[None, :], mask=value_mask, other=0.0)
    return key, row, exists, key_end - key_start - tl.load(query_ends + sequence + 1), k_tile, v_tile


@triton.jit(do_not_specialize=["range_number", "first_head", "first_query", "num_rows", "limit"])
def gathered_forward_kernel(
    q, k, v, union_total, partial, stats, queries, slots, counts, blocks, firsts, sizes, block_sequence, block_ends, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, num_kv_heads, range_number, first_head, first_query, num_rows, limit, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block against a part of the range's queries that chose it: each row's own softmax over the block's keys.

    partial `[heads, rows, n, G, Dv]` = normalised output, stats fp32 `[heads, rows, n, G]` = log2 of the sum of exp2;
    -inf where the row sees none of the keys."""
    kv_head = first_head + tl.program_id(1)
    owner = range_number * num_kv_heads + kv_head
    if (tl.load(union_total) <= limit) | (tl.program_id(0) >= tl.load(counts + owner)):
        return
    item = owner * tl.num_programs(0) + tl.program_id(0)
    block, size = tl.load(blocks + item), tl.load(sizes + item)
    key, _key_row, exists, offset, k_tile, v_tile = load_block(
        block, kv_head, k, v, k_row, k_head, v_row, v_head, block_sequence, block_ends, query_ends, key_ends,
        KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, KEYS, SELECT,
    )  # fmt: skip
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    first = tl.load(firsts + item)
    queries += first
    slots += first
    TILE: tl.constexpr = ROWS // GROUP
    lane = tl.arange(0, ROWS)
    for start in range(0, size, TILE):
        entry = start + lane // GROUP
        valid = (lane < TILE * GROUP) & (entry < size)
        row = tl.load(queries + entry, mask=valid, other=0)
        slot = tl.load(slots + entry, mask=valid, other=0).to(tl.int32)
        source = row.to(tl.int64) * q_row + (kv_head * GROUP + lane % GROUP) * q_head
        q_mask = valid[:, None] & (key_dim < KEY_DIM)[None, :]
        q_tile = tl.load(q + source[:, None] + key_dim[None, :], mask=q_mask, other=0.0, eviction_policy="evict_last")
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        s = tl.where(exists[None, :] & (key[None, :] <= (row + offset)[:, None]), s, float("-inf"))
        highest = tl.max(s, axis=1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s - highest[:, None])
        total = tl.sum(p, axis=1)
        some = total > 0
        safe = tl.where(some, total, 1.0)
        result = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION) * (1.0 / safe)[:, None]
        place = ((tl.program_id(1) * num_rows + row - first_query).to(tl.int64) * CHOSEN + slot) * GROUP + lane % GROUP
        tl.store(stats + place, tl.where(some, highest + tl.log2(safe), float("-inf")), mask=valid)
        target = partial + place[:, None] * VALUE_DIM + value_dim[None, :]
        tl.store(target, result, mask=valid[:, None] & (value_dim < VALUE_DIM)[None, :], eviction_policy="evict_first")


@triton.jit(do_not_specialize=["first_head", "first_query", "num_rows", "limit"])
def merge_kernel(
    q, k, v, union_total, partial, stats, selection, gate, out, branch_out, lse, row_sequence, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, out_row, out_head,
    num_kv_heads, first_head, first_query, num_rows, limit, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    STAGES: tl.constexpr, ACCUMULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (+)= gate · o, branch_out = o, lse: attention over the chosen ones of a sequence's first INIT and each query's
    last LOCAL blocks, then the partial results of the other blocks, slot by slot."""
    if tl.load(union_total) <= limit:
        return
    TILE: tl.constexpr = ROWS // GROUP
    kv_head = first_head + tl.program_id(1)
    lane = tl.arange(0, ROWS)
    begin = tl.program_id(0) * TILE
    local = begin + lane // GROUP
    valid = (lane < TILE * GROUP) & (local < num_rows)
    row = first_query + local
    row_wide = row.to(tl.int64)
    head = kv_head * GROUP + lane % GROUP
    own = tl.load(row_sequence + row, mask=valid, other=0)
    position = row - tl.load(query_ends + own + 1) + tl.load(key_ends + own + 1) - tl.load(key_ends + own)
    current = position // SELECT
    slot = tl.arange(0, CHOSEN_PAD)
    slot_mask = valid[:, None] & (slot < CHOSEN)[None, :]
    chosen = tl.load(selection + ((row_wide * num_kv_heads + kv_head) * CHOSEN)[:, None] + slot[None, :], mask=slot_mask, other=-1)
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    store = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    if INIT + LOCAL > 0:
        q_source = q + (row_wide * q_row + head * q_head)[:, None] + key_dim[None, :]
        q_tile = tl.load(q_source, mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        first_row = first_query + begin
        last_row = first_query + tl.minimum(begin + TILE, num_rows) - 1
        inner = tl.arange(0, KEYS)
        for sequence in range(tl.load(row_sequence + first_row), tl.load(row_sequence + last_row) + 1):
            query_start, query_end = tl.load(query_ends + sequence), tl.load(query_ends + sequence + 1)
            key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
            offset = key_end - key_start - query_end
            lowest = tl.maximum((tl.maximum(first_row, query_start) + offset) // SELECT - LOCAL + 1, INIT)
            last_block = (tl.minimum(last_row, query_end - 1) + offset) // SELECT
            steps = tl.where(query_start < query_end, INIT + tl.maximum(last_block - lowest + 1, 0), 0)
            keys = k + key_start.to(tl.int64) * k_row + kv_head * k_head
            values = v + key_start.to(tl.int64) * v_row + kv_head * v_head
            for step in range(0, steps):
                block = tl.where(step < INIT, step, lowest + step - INIT)
                key = block * SELECT + inner
                exists = (inner < SELECT) & (key < key_end - key_start)
                wide = key.to(tl.int64)[:, None]
                k_tile = tl.load(keys + wide * k_row + key_dim[None, :], mask=exists[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
                v_tile = tl.load(values + wide * v_row + value_dim[None, :], mask=exists[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
                mine = valid & (own == sequence) & (tl.max((chosen == block).to(tl.int32), axis=1) > 0)
                mine &= (block < INIT) | (block > current - LOCAL)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
                s = tl.where(mine[:, None] & exists[None, :] & (key[None, :] <= position[:, None]), s, float("-inf"))
                new = tl.maximum(highest, tl.max(s, axis=1))
                base = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp2(s - base[:, None])
                shrink = tl.exp2(highest - base)
                total = total * shrink + tl.sum(p, axis=1)
                acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
                highest = new
    place = ((tl.program_id(1) * num_rows + local) * (CHOSEN * GROUP)).to(tl.int64) + lane % GROUP
    waits = (chosen >= INIT) & (chosen <= current[:, None] - LOCAL)
    logs = tl.load(stats + place[:, None] + slot[None, :] * GROUP, mask=waits, other=float("-inf"))
    base = tl.maximum(highest, tl.max(logs, axis=1))
    base = tl.where(base == float("-inf"), 0.0, base)
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(tl.exp2(logs - base[:, None]), axis=1)
    some = total > 0
    log = base + tl.log2(tl.where(some, total, 1.0))
    acc *= tl.where(some, tl.exp2(highest - log), 0.0)[:, None]
    for number in tl.range(0, CHOSEN, num_stages=STAGES):
        block = tl.load(selection + (row_wide * num_kv_heads + kv_head) * CHOSEN + number, mask=valid, other=-1)
        there = (block >= INIT) & (block <= current - LOCAL)
        weight = tl.exp2(tl.load(stats + place + number * GROUP, mask=there, other=float("-inf")) - log)
        source = partial + (place + number * GROUP)[:, None] * VALUE_DIM + value_dim[None, :]
        mask = there[:, None] & (value_dim < VALUE_DIM)[None, :]
        acc += weight[:, None] * tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(lse + row_wide * (num_kv_heads * GROUP) + head, tl.where(some, log * 0.6931471805599453, float("-inf")), mask=valid)
    if KEEP:
        tl.store(branch_out + (row_wide * (num_kv_heads * GROUP) + head)[:, None] * VALUE_DIM + value_dim[None, :], acc, mask=store)
    acc *= tl.load(gate + row_wide * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)[:, None]
    target = out + (row_wide * out_row + head * out_head)[:, None] + value_dim[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=store, other=0.0).to(tl.float32)
    tl.store(target, acc, mask=store)


@triton.jit(do_not_specialize=["range_number", "first_head", "first_query", "num_rows", "limit"])
def gathered_dq_kernel(
    d_out, q, k, v, lse, delta, gate, union_total, partial, queries, slots, counts, blocks, firsts, sizes, block_sequence, block_ends, query_ends,
    key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head,
    num_kv_heads, range_number, first_head, first_query, num_rows, limit, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a part of the range's queries get for dq from one block: partial `[heads, rows, n, G, Dk]` = dS K."""
    kv_head = first_head + tl.program_id(1)
    owner = range_number * num_kv_heads + kv_head
    if (tl.load(union_total) <= limit) | (tl.program_id(0) >= tl.load(counts + owner)):
        return
    item = owner * tl.num_programs(0) + tl.program_id(0)
    block, size = tl.load(blocks + item), tl.load(sizes + item)
    key, _key_row, exists, offset, k_tile, v_tile = load_block(
        block, kv_head, k, v, k_row, k_head, v_row, v_head, block_sequence, block_ends, query_ends, key_ends,
        KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, KEYS, SELECT,
    )  # fmt: skip
    key_dim = tl.arange(0, KEY_PAD)
    first = tl.load(firsts + item)
    queries += first
    slots += first
    TILE: tl.constexpr = ROWS // GROUP
    lane = tl.arange(0, ROWS)
    head = kv_head * GROUP + lane % GROUP
    for start in range(0, size, TILE):
        entry = start + lane // GROUP
        valid = (lane < TILE * GROUP) & (entry < size)
        row = tl.load(queries + entry, mask=valid, other=0)
        slot = tl.load(slots + entry, mask=valid, other=0).to(tl.int32)
        seen = exists[None, :] & (key[None, :] <= (row + offset)[:, None]) & valid[:, None]
        place = ((tl.program_id(1) * num_rows + row - first_query).to(tl.int64) * CHOSEN + slot) * GROUP + lane % GROUP
        row = row.to(tl.int64)
        q_tile, do_tile, gates, deltas, lse_log2 = load_rows(
            d_out, q, lse, delta, gate, row, head, valid, num_kv_heads * GROUP, d_out_row, d_out_head, q_row, q_head, delta_row, delta_head,
            gate_row, gate_head, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD,
        )  # fmt: skip
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(s - lse_log2[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = (p * (dp * gates[:, None] - deltas[:, None])).to(k_tile.dtype)
        dq = tl.dot(ds, k_tile, input_precision=PRECISION)
        target = partial + place[:, None] * KEY_DIM + key_dim[None, :]
        tl.store(target, dq, mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], eviction_policy="evict_first")


@triton.jit(do_not_specialize=["first_head", "first_query", "num_rows", "limit"])
def add_dq_kernel(
    union_total, partial, selection, dq, dq_before, dq_row, dq_head, before_row, before_head,
    num_kv_heads, first_head, first_query, num_rows, limit, scale,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, ROWS: tl.constexpr, CHOSEN: tl.constexpr,
    STAGES: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dq = dq_before (with BEFORE) + scale · the sum of the parts, slot by slot."""
    if tl.load(union_total) <= limit:
        return
    TILE: tl.constexpr = ROWS // GROUP
    kv_head = first_head + tl.program_id(1)
    lane = tl.arange(0, ROWS)
    local = tl.program_id(0) * TILE + lane // GROUP
    valid = (lane < TILE * GROUP) & (local < num_rows)
    row = (first_query + local).to(tl.int64)
    dim = tl.arange(0, KEY_PAD)
    place = ((tl.program_id(1) * num_rows + local) * (CHOSEN * GROUP)).to(tl.int64) + lane % GROUP
    acc = tl.zeros([ROWS, KEY_PAD], tl.float32)
    for number in tl.range(0, CHOSEN, num_stages=STAGES):
        there = tl.load(selection + (row * num_kv_heads + kv_head) * CHOSEN + number, mask=valid, other=-1) >= 0
        source = partial + (place + number * GROUP)[:, None] * KEY_DIM + dim[None, :]
        acc += tl.load(source, mask=there[:, None] & (dim < KEY_DIM)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
    mask, head = valid[:, None] & (dim < KEY_DIM)[None, :], kv_head * GROUP + lane % GROUP
    acc *= scale
    if BEFORE:
        acc += tl.load(dq_before + (row * before_row + head * before_head)[:, None] + dim[None, :], mask=mask, other=0.0)
    tl.store(dq + (row * dq_row + head * dq_head)[:, None] + dim[None, :], acc, mask=mask)


def launches(cuts: list[int], works: list[tuple[int, Work]], num_kv_heads: int, heads: int) -> Iterator[tuple[Work, int, int, int, int, int, int]]:
    """(work tables, range in them, range in all, first KV head, KV heads, first query, queries): all ranges of some heads,
    then those of the next."""
    for first_head in range(0, num_kv_heads, heads):
        for base, work in works:
            for number in range(work.blocks.shape[0]):
                first, end = cuts[base + number], cuts[base + number + 1]
                yield work, number, base + number, first_head, min(heads, num_kv_heads - first_head), first, end - first


def scratch_ranges(q: torch.Tensor, plan: KernelPlan, row_bytes: int, scratch: int, num_kv_heads: int) -> tuple[list[int], torch.Tensor, int, int]:
    """Borders of the ranges (host, device), queries of the longest, and KV heads whose parts of one range fit into the scratch together."""
    cuts, device_cuts = query_cuts(plan, max(64, scratch // row_bytes))
    most = max(end - start for start, end in pairwise(cuts))
    return cuts, device_cuts, most, min(num_kv_heads, max(1, scratch // (most * row_bytes)))


def gathered_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: torch.Tensor, unions: BlockUnions, index: InverseIndex, plan: KernelPlan,
    config: SparsityConfig, *, scale: float, gate: torch.Tensor, out: torch.Tensor, branch_out: torch.Tensor | None, lse: torch.Tensor,
    accumulate: bool, limit: int,
) -> None:  # fmt: skip
    """`selected_forward` block by block where blocks are not shared, the unions' total above `limit`; fills out, branch_out and lse then."""
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    shapes = gather_shapes(padded(key_dim) + padded(value_dim), group, q.dtype)
    init, local = (config.num_init_blocks, config.num_local_blocks) if shapes.shared_blocks else (0, 0)
    cuts, device_cuts, most, heads = scratch_ranges(q, plan, n * group * value_dim * q.element_size(), shapes.scratch, num_kv_heads)
    partial = torch.empty(heads * most * n * group, value_dim, dtype=q.dtype, device=q.device)
    stats = torch.empty(heads * most * n * group, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    shared = {"GROUP": group, **widths(key_dim, value_dim), "KEYS": padded(size), "SELECT": size, "CHOSEN": n, "PRECISION": dot_precision()}
    (rows, num_warps, num_stages), (merge_rows, merge_warps, merge_stages) = shapes.block, shapes.merge
    part = max(1, shapes.part // group)
    works = list(cut_lists(index, device_cuts, plan, size, part, most * n, init=init, local=local, backward=False, guard=(unions.total, limit)))
    for work, number, _, first_head, taken, first, count in launches(cuts, works, num_kv_heads, heads):
        launch(
            gathered_forward_kernel, (work.blocks.shape[2], taken),
            q, k, v, unions.total, partial, stats, index.queries, index.slots, work.counts, work.blocks, work.firsts, work.sizes,
            index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends, *strides, num_kv_heads, number, first_head, first, count,
            limit, scale * LOG2_E, **shared, ROWS=rows, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        launch(
            merge_kernel, (ceil_div(count, merge_rows // group), taken),
            q, k, v, unions.total, partial, stats, selection, gate, out, out if branch_out is None else branch_out, lse, index.row_sequence,
            plan.query_ends, plan.key_ends, *strides, *gate.stride(), *out.stride()[:2], num_kv_heads, first_head, first, count, limit,
            scale * LOG2_E, **shared, ROWS=merge_rows, CHOSEN_PAD=power_of_two(n), INIT=init, LOCAL=local, STAGES=merge_stages,
            ACCUMULATE=accumulate, KEEP=branch_out is not None, num_warps=merge_warps, num_stages=1,
        )  # fmt: skip


def gathered_dq(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: torch.Tensor, lse: torch.Tensor, delta_b: torch.Tensor,
    gate: torch.Tensor, unions: BlockUnions, index: InverseIndex, plan: KernelPlan, config: SparsityConfig, *, scale: float, dq: torch.Tensor,
    dq_before: torch.Tensor | None, limit: int,
) -> None:  # fmt: skip
    """dq of `selected_backward` block by block where blocks are not shared: where the unions' total is above `limit`."""
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    shapes = gather_shapes(padded(key_dim) + padded(value_dim), group, q.dtype)
    cuts, device_cuts, most, heads = scratch_ranges(q, plan, n * group * key_dim * q.element_size(), shapes.scratch, num_kv_heads)
    partial = torch.empty(heads * most * n * group, key_dim, dtype=q.dtype, device=q.device)
    strides = (*d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *delta_b.stride(), *gate.stride())
    dims, before = widths(key_dim, value_dim), dq if dq_before is None else dq_before
    (rows, num_warps, num_stages), (dq_rows, dq_warps, dq_stages) = shapes.block, shapes.add_dq
    part = max(1, shapes.part // group)
    works = list(cut_lists(index, device_cuts, plan, size, part, most * n, init=0, local=-1, backward=False, guard=(unions.total, limit)))
    for work, number, _, first_head, taken, first, count in launches(cuts, works, num_kv_heads, heads):
        launch(
            gathered_dq_kernel, (work.blocks.shape[2], taken),
            d_out, q, k, v, lse, delta_b, gate, unions.total, partial, index.queries, index.slots, work.counts, work.blocks, work.firsts, work.sizes,
            index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends, *strides, num_kv_heads, number, first_head, first, count,
            limit, scale * LOG2_E, GROUP=group, **dims, ROWS=rows, KEYS=padded(size), SELECT=size, CHOSEN=n, PRECISION=dot_precision(),
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        launch(
            add_dq_kernel, (ceil_div(count, dq_rows // group), taken),
            unions.total, partial, selection, dq, before, *dq.stride()[:2], *before.stride()[:2], num_kv_heads, first_head, first, count, limit,
            scale, GROUP=group, KEY_DIM=key_dim, KEY_PAD=padded(key_dim), ROWS=dq_rows, CHOSEN=n, STAGES=dq_stages,
            BEFORE=dq_before is not None, num_warps=dq_warps,
        )  # fmt: skip
