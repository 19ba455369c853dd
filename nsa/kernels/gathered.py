"""Attention over chosen blocks, block by block: K and V of a block stay put and the queries that chose it pass by.

What each row got from each of its n blocks waits in a scratch until a second kernel adds it up in slot order. One KV
head and range of queries after another, so that the scratch stays small.

    forward   gathered_forward_kernel (softmax of each block by itself) -> merge_kernel, which also computes the blocks
              that neighbouring queries share (the sequence's first and each query's last), so that they skip the scratch
    backward  gathered_backward_kernel, on Hopper for small groups hopper_backward_kernel of gathered_hopper.py (dk, dv of a
              block; parts of dq) -> add_segments_kernel, add_dq_kernel

No atomics; ranges and parts of lists are cut from each sequence's own start, so results are the same from run to run and
whatever else is in the batch. Leaves out small batches, big groups and fp32 (selected.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.inverse import InverseIndex, Work, cut_lists, query_cuts
from nsa.kernels.launch import LOG2_E, ceil_div, dot_precision, launch, padded, power_of_two
from nsa.kernels.tiles import KernelPlan

MIN_QUERIES = 4096
"""Fewer packed queries than this go query by query."""
MAX_GROUP = 16
MAX_FORWARD_GROUP = 8  # at 16 the query-major forward is faster (18.0 against 21.0 ms at 64k on an H100)
MAX_BLOCK_BYTES = 2**17  # K and V beyond this do not fit into shared memory beside the queries
DTYPES = (torch.bfloat16, torch.float16)
MAX_HOPPER_GROUP = 4
"""Groups up to this take the Hopper kernel in the backward pass (16.7 against 18.8 ms with 4, 43 against 36 ms with 16, at 64k)."""


KEYS_ALONE_PART = 32768
KEYS_ALONE = None
KEYS_ALONE_CHUNK = 2**30


class Launch(NamedTuple):
    """Rows (queries × heads) of a tile, and how its program is scheduled (stages of merge, add_dq: of the loop over slots)."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GatherShapes:
    """Every number of the block-major kernels that is tuned.

    forward_part, backward_part: rows of a list that one program takes at most. forward_scratch, backward_scratch: bytes.
    shared_blocks: compute first and last blocks in the merge kernel.
    """

    forward: Launch
    merge: Launch
    backward: Launch
    add_dq: Launch
    forward_part: int
    backward_part: int
    forward_scratch: int = 2**29
    backward_scratch: int = 2**30
    shared_blocks: bool = True


def gather_shapes(dims: int, group: int, dtype: torch.dtype) -> GatherShapes:
    """The fixed table; `dims` = padded Dk + Dv."""
    if dtype == torch.float32:
        small = Launch(padded(group), 4, 1)
        return GatherShapes(forward=small, merge=small, backward=small, add_dq=small, forward_part=1024, backward_part=8192)
    odd = 32 % group > 0  # such a group needs more registers for its indices
    merge = Launch(32, 8 if dims > 384 else 4, 2) if dims > 256 else Launch(64, 4, 3)
    backward = Launch(16 if dims > 384 or (odd and dims > 256) else 32, 8, 2) if odd or dims > 256 else Launch(32, 4, 3)
    forward, add_dq = Launch(64, 8 if dims > 384 else 4, 2), Launch(32, 4, 3)
    return GatherShapes(forward=forward, merge=merge, backward=backward, add_dq=add_dq, forward_part=1024, backward_part=8192)


def takes_hopper(d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Whether the backward pass runs on gathered_hopper.py, which is imported only where it can run: small groups, head
    dimensions of 128, blocks of 64 keys, rows that can be copied 16 bytes at a time."""
    fits = q.shape[2] == v.shape[2] == 128 and size == 64 and q.shape[1] <= MAX_HOPPER_GROUP * k.shape[1] and q.dtype in DTYPES
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 for x in (d_out, q, k, v))
    return fits and aligned and runs_hopper_kernels(q.device)


def gathers(group: int, num_queries: int | None, block_bytes: int, dtype: torch.dtype, *, backward: bool) -> bool:
    """Whether to go block by block: the fixed rule on group size, packed queries (None: whatever their number), bytes of a
    block's K and V, and dtype."""
    many = num_queries is None or num_queries >= MIN_QUERIES
    return group <= (MAX_GROUP if backward else MAX_FORWARD_GROUP) and many and block_bytes <= MAX_BLOCK_BYTES and dtype in DTYPES


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


@triton.jit(do_not_specialize=["range_number", "first_head", "first_query", "num_rows"])
def gathered_forward_kernel(
    q, k, v, partial, stats, queries, slots, counts, blocks, firsts, sizes, block_sequence, block_ends, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, num_kv_heads, range_number, first_head, first_query, num_rows, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block against a part of the range's queries that chose it: each row's own softmax over the block's keys.

    partial `[heads, rows, n, G, Dv]` = normalised output, stats fp32 `[heads, rows, n, G]` = log2 of the sum of exp2;
    -inf where the row sees none of the keys."""
    kv_head = first_head + tl.program_id(1)
    owner = range_number * num_kv_heads + kv_head
    if tl.program_id(0) >= tl.load(counts + owner):
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


@triton.jit(do_not_specialize=["first_head", "first_query", "num_rows"])
def merge_kernel(
    q, k, v, partial, stats, selection, gate, out, branch_out, lse, row_sequence, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, out_row, out_head, num_kv_heads, first_head, first_query, num_rows, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    STAGES: tl.constexpr, ACCUMULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (+)= gate · o, branch_out = o, lse: attention over the chosen ones of a sequence's first INIT and each query's
    last LOCAL blocks, then the partial results of the other blocks, slot by slot."""
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


@triton.jit
def add_range(acc, total, target, total_place, target_place, mask, first_range, last_range):
    """Adds a range's sum to those of the ranges before; the last one's goes to its target."""
    if first_range == 0:
        acc += tl.load(total + total_place, mask=mask, other=0.0)
    if last_range != 0:
        tl.store(target + target_place, acc, mask=mask)
    else:
        tl.store(total + total_place, acc, mask=mask)


@triton.jit(do_not_specialize=["num_keys", "num_segments", "range_number", "first_head", "first_query", "num_rows", "first_range", "last_range"])
def gathered_backward_kernel(
    d_out, q, k, v, lse, delta, gate, dk, dv, total_dk, total_dv, segment_dk, segment_dv, partial, queries, slots, counts, blocks, firsts, sizes,
    segments, block_sequence, block_ends, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head,
    num_kv_heads, num_keys, num_segments, range_number, first_head, first_query, num_rows, first_range, last_range, scale, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, CHOSEN: tl.constexpr, WITH_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of a block from one part of its list within the range, and the part of dq that each row gets from the block.

    partial `[heads, rows, n, G, Dk]` = dS K. Where the list has more parts, segment_dk, segment_dv take fp32 sums."""
    kv_head = first_head + tl.program_id(1)
    owner = range_number * num_kv_heads + kv_head
    if tl.program_id(0) >= tl.load(counts + owner):
        return
    item = owner * tl.num_programs(0) + tl.program_id(0)
    block, size = tl.load(blocks + item), tl.load(sizes + item)
    key, key_row, exists, offset, k_tile, v_tile = load_block(
        block, kv_head, k, v, k_row, k_head, v_row, v_head, block_sequence, block_ends, query_ends, key_ends,
        KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD, KEYS, SELECT,
    )  # fmt: skip
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    inner = tl.arange(0, KEYS)
    key_mask, value_mask = exists[:, None] & (key_dim < KEY_DIM)[None, :], exists[:, None] & (value_dim < VALUE_DIM)[None, :]
    first = tl.load(firsts + item)
    queries += first
    slots += first
    TILE: tl.constexpr = ROWS // GROUP
    lane = tl.arange(0, ROWS)
    head = kv_head * GROUP + lane % GROUP
    acc_k = tl.zeros([KEYS, KEY_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, VALUE_PAD], tl.float32)
    for start in range(0, size, TILE):
        entry = start + lane // GROUP
        valid = (lane < TILE * GROUP) & (entry < size)
        row = tl.load(queries + entry, mask=valid, other=0)
        slot = tl.load(slots + entry, mask=valid, other=0).to(tl.int32)
        seen = exists[:, None] & (key[:, None] <= (row + offset)[None, :]) & valid[None, :]
        place = ((tl.program_id(1) * num_rows + row - first_query) * CHOSEN + slot) * GROUP + lane % GROUP
        row = row.to(tl.int64)
        q_tile = tl.load(q + (row * q_row + head * q_head)[:, None] + key_dim[None, :], mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        do_mask = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
        do_tile = tl.load(d_out + (row * d_out_row + head * d_out_head)[:, None] + value_dim[None, :], mask=do_mask, other=0.0)
        gates = tl.load(gate + row * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)
        deltas = tl.load(delta + row * delta_row + head * delta_head, mask=valid, other=0.0)
        lse_log2 = tl.load(lse + row * (num_kv_heads * GROUP) + head, mask=valid, other=float("inf")) * 1.4426950408889634
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(s - lse_log2[None, :]), 0.0)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        acc_v += tl.dot((p * gates[None, :]).to(do_tile.dtype), do_tile, input_precision=PRECISION)
        ds = (p * (dp * gates[None, :] - deltas[None, :])).to(q_tile.dtype)
        acc_k += tl.dot(ds, q_tile, input_precision=PRECISION)
        if WITH_DQ:
            dq = tl.dot(tl.trans(k_tile), ds, input_precision=PRECISION)
            target = partial + place.to(tl.int64)[None, :] * KEY_DIM + key_dim[:, None]
            tl.store(target, dq, mask=valid[None, :] & (key_dim < KEY_DIM)[:, None], eviction_policy="evict_first")
    acc_k *= scale
    segment = tl.load(segments + item)
    if segment >= 0:
        sum_row = (tl.program_id(1) * num_segments + segment).to(tl.int64) * SELECT + inner
        tl.store(segment_dk + sum_row[:, None] * KEY_DIM + key_dim[None, :], acc_k, mask=key_mask)
        tl.store(segment_dv + sum_row[:, None] * VALUE_DIM + value_dim[None, :], acc_v, mask=value_mask)
    else:
        total_row = (tl.program_id(1).to(tl.int64) * num_keys + key_row)[:, None]
        target_row = (key_row * num_kv_heads + kv_head)[:, None]
        k_place, v_place = total_row * KEY_DIM + key_dim[None, :], total_row * VALUE_DIM + value_dim[None, :]
        add_range(acc_k, total_dk, dk, k_place, target_row * KEY_DIM + key_dim[None, :], key_mask, first_range, last_range)
        add_range(acc_v, total_dv, dv, v_place, target_row * VALUE_DIM + value_dim[None, :], value_mask, first_range, last_range)


@triton.jit
def add_parts(
    sums, total, target, count, sum_row, total_row, target_row, exists, first_range, last_range,
    KEYS: tl.constexpr, SELECT: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """The sum of `count` partial sums of KEYS keys, first to last, to where `add_range` puts it."""
    dim = tl.arange(0, DIM_PAD)[None, :]
    mask = exists[:, None] & (dim < DIM)
    acc = tl.zeros([KEYS, DIM_PAD], tl.float32)
    for number in range(0, count):
        acc += tl.load(sums + (sum_row + number * SELECT) * DIM + dim, mask=mask, other=0.0)
    add_range(acc, total, target, total_row * DIM + dim, target_row * DIM + dim, mask, first_range, last_range)


@triton.jit(do_not_specialize=["num_keys", "num_segments", "range_number", "first_head", "first_range", "last_range"])
def add_segments_kernel(
    segment_dk, segment_dv, total_dk, total_dv, dk, dv, segment_firsts, segment_counts, block_sequence, block_ends, key_ends,
    num_kv_heads, num_keys, num_segments, range_number, first_head, first_range, last_range,
    KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """dk (z = 0) and dv (z = 1) of KEYS keys of the blocks that have several parts, first part to last."""
    kv_head = first_head + tl.program_id(1)
    steps: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    block = tl.program_id(0) // steps
    item = (range_number * num_kv_heads + kv_head) * (tl.num_programs(0) // steps) + block
    count = tl.load(segment_counts + item)
    if count <= 1:
        return
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    inner = tl.program_id(0) % steps * KEYS + tl.arange(0, KEYS)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    exists = (inner < SELECT) & (key < key_end - key_start)
    key_row = (key_start + key).to(tl.int64)
    total_row = (tl.program_id(1).to(tl.int64) * num_keys + key_row)[:, None]
    target_row = (key_row * num_kv_heads + kv_head)[:, None]
    sum_row = ((tl.program_id(1) * num_segments + tl.load(segment_firsts + item)).to(tl.int64) * SELECT + inner)[:, None]
    if tl.program_id(2) == 0:
        add_parts(segment_dk, total_dk, dk, count, sum_row, total_row, target_row, exists, first_range, last_range, KEYS, SELECT, KEY_DIM, KEY_PAD)
    else:
        add_parts(
            segment_dv, total_dv, dv, count, sum_row, total_row, target_row, exists, first_range, last_range, KEYS, SELECT, VALUE_DIM, VALUE_PAD
        )


@triton.jit(do_not_specialize=["first_head", "first_query", "num_rows"])
def add_dq_kernel(
    partial, selection, dq, dq_before, dq_row, dq_head, before_row, before_head, num_kv_heads, first_head, first_query, num_rows, scale,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, ROWS: tl.constexpr, CHOSEN: tl.constexpr,
    STAGES: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """dq = dq_before (with BEFORE) + scale · the sum of the parts, slot by slot."""
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


def widths(key_dim: int, value_dim: int) -> dict[str, int]:
    """Head dimensions as kernels take them."""
    return {"KEY_DIM": key_dim, "KEY_PAD": padded(key_dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim)}


def launches(cuts: list[int], works: list[tuple[int, Work]], num_kv_heads: int, heads: int) -> Iterator[tuple[Work, int, int, int, int, int, int]]:
    """(work tables, range in them, range in all, first KV head, KV heads, first query, queries): all ranges of some heads,
    then those of the next."""
    for first_head in range(0, num_kv_heads, heads):
        for base, work in works:
            for number in range(work.blocks.shape[0]):
                first, end = cuts[base + number], cuts[base + number + 1]
                yield work, number, base + number, first_head, min(heads, num_kv_heads - first_head), first, end - first


def gathered_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: torch.Tensor,
    index: InverseIndex,
    plan: KernelPlan,
    config: SparsityConfig,
    *,
    scale: float,
    gate: torch.Tensor,
    out: torch.Tensor,
    branch_out: torch.Tensor | None,
    lse: torch.Tensor,
    accumulate: bool,
) -> None:
    """`selected_forward` block by block; fills out, branch_out and lse."""
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    shapes = gather_shapes(padded(key_dim) + padded(value_dim), group, q.dtype)
    init, local = (config.num_init_blocks, config.num_local_blocks) if shapes.shared_blocks else (0, 0)
    row_bytes = n * group * value_dim * q.element_size()
    cuts, device_cuts = query_cuts(plan, max(64, shapes.forward_scratch // row_bytes))
    most = max(end - start for start, end in pairwise(cuts))
    heads = min(num_kv_heads, max(1, shapes.forward_scratch // (most * row_bytes)))
    partial = torch.empty(heads * most * n * group, value_dim, dtype=q.dtype, device=q.device)
    stats = torch.empty(heads * most * n * group, dtype=torch.float32, device=q.device)
    part = max(1, shapes.forward_part // group)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    dims, precision = widths(key_dim, value_dim), dot_precision()
    shared = {"GROUP": group, **dims, "KEYS": padded(size), "SELECT": size, "CHOSEN": n, "PRECISION": precision}
    (rows, num_warps, num_stages), (merge_rows, merge_warps, merge_stages) = shapes.forward, shapes.merge
    works = list(cut_lists(index, device_cuts, plan, size, part, most * n, init=init, local=local, backward=False))
    for work, number, _, first_head, taken, first, count in launches(cuts, works, num_kv_heads, heads):
        launch(
            gathered_forward_kernel, (work.blocks.shape[2], taken),
            q, k, v, partial, stats, index.queries, index.slots, work.counts, work.blocks, work.firsts, work.sizes, index.block_sequence,
            index.block_ends, plan.query_ends, plan.key_ends, *strides, num_kv_heads, number, first_head, first, count, scale * LOG2_E,
            **shared, ROWS=rows, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        launch(
            merge_kernel, (ceil_div(count, merge_rows // group), taken),
            q, k, v, partial, stats, selection, gate, out, out if branch_out is None else branch_out, lse, index.row_sequence,
            plan.query_ends, plan.key_ends, *strides, *gate.stride(), *out.stride()[:2], num_kv_heads, first_head, first, count, scale * LOG2_E,
            **shared, ROWS=merge_rows, CHOSEN_PAD=power_of_two(n), INIT=init, LOCAL=local, STAGES=merge_stages, ACCUMULATE=accumulate,
            KEEP=branch_out is not None, num_warps=merge_warps, num_stages=1,
        )  # fmt: skip


def gathered_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: torch.Tensor,
    lse: torch.Tensor,
    delta_b: torch.Tensor,
    gate: torch.Tensor,
    index: InverseIndex,
    plan: KernelPlan,
    config: SparsityConfig,
    *,
    scale: float,
    dq: torch.Tensor,
    dq_before: torch.Tensor | None,
    with_dq: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selected_backward` block by block."""
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    shapes, hopper = gather_shapes(padded(key_dim) + padded(value_dim), group, q.dtype), takes_hopper(d_out, q, k, v, size)
    if hopper:
        shapes = replace(shapes, backward_part=4096, backward_scratch=2**29)
    if not with_dq:
        shapes = replace(shapes, backward_part=KEYS_ALONE_PART, backward=KEYS_ALONE or shapes.backward)
    row_bytes = n * group * key_dim * q.element_size()
    cuts, device_cuts = query_cuts(plan, max(64, shapes.backward_scratch // row_bytes) if with_dq else KEYS_ALONE_CHUNK)
    most, last = max(end - start for start, end in pairwise(cuts)), len(cuts) - 2
    heads = min(num_kv_heads, max(1, shapes.backward_scratch // (most * row_bytes))) if with_dq else num_kv_heads
    part = max(1, shapes.backward_part // group)
    num_segments = max(1, 2 * most * n // part)

    scratch = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partial = scratch(heads * most * n * group if with_dq else 0, key_dim, dtype=q.dtype)
    segment_sums = (scratch(heads, num_segments, size, key_dim), scratch(heads, num_segments, size, value_dim))
    dk, dv = scratch(*k.shape, dtype=k.dtype), scratch(*v.shape, dtype=k.dtype)
    totals = (scratch(heads, k.shape[0], key_dim), scratch(heads, k.shape[0], value_dim)) if last else (dk, dv)
    strides = (*d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *delta_b.stride(), *gate.stride())
    dims, keys, before = widths(key_dim, value_dim), min(padded(size), 32), dq if dq_before is None else dq_before
    (rows, num_warps, num_stages), (dq_rows, dq_warps, dq_stages) = shapes.backward, shapes.add_dq
    stats = None
    if hopper:
        from nsa.kernels import gathered_hopper

        stats = gathered_hopper.row_stats(lse, delta_b, gate, scale)
    works = list(cut_lists(index, device_cuts, plan, size, part, most * n, init=0, local=-1, backward=True))
    for work, number, place, first_head, taken, first, count in launches(cuts, works, num_kv_heads, heads):
        sums, ends = (num_kv_heads, k.shape[0], num_segments, number, first_head), (int(place == 0), int(place == last))
        tables = (
            dk, dv, *totals, *segment_sums, partial, index.queries, index.slots, work.counts, work.blocks, work.firsts, work.sizes, work.segments,
            index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends,
        )  # fmt: skip
        grid = (work.blocks.shape[2], taken)
        if stats is not None:
            gathered_hopper.hopper_backward(grid, d_out, q, k, v, stats, tables, (*sums, first, count, *ends), scale=scale, chosen=n, with_dq=with_dq)
        else:
            launch(
                gathered_backward_kernel, grid, d_out, q, k, v, lse, delta_b, gate, *tables, *strides, *sums, first, count, *ends, scale,
                scale * LOG2_E, GROUP=group, **dims, ROWS=rows, KEYS=padded(size), SELECT=size, CHOSEN=n, WITH_DQ=with_dq, PRECISION=dot_precision(),
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        launch(
            add_segments_kernel, (index.num_blocks * -(-size // keys), taken, 2),
            *segment_sums, *totals, dk, dv, work.segment_firsts, work.segment_counts, index.block_sequence, index.block_ends, plan.key_ends,
            *sums, *ends, **dims, KEYS=keys, SELECT=size, num_warps=4,
        )  # fmt: skip
        if not with_dq:
            continue
        launch(
            add_dq_kernel, (ceil_div(count, dq_rows // group), taken),
            partial, selection, dq, before, *dq.stride()[:2], *before.stride()[:2], num_kv_heads, first_head, first, count, scale, GROUP=group,
            KEY_DIM=key_dim, KEY_PAD=padded(key_dim), ROWS=dq_rows, CHOSEN=n, STAGES=dq_stages, BEFORE=dq_before is not None, num_warps=dq_warps,
        )  # fmt: skip
    return dk, dv
