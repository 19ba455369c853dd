"""The inverse of a selection (inverse.py) where a number on the device says that it is needed.

A sort runs whatever it is for. These kernels count the choices in order instead and end at once where nobody needs the index: 10 µs in
place of 350 at 64k and group 4. Where somebody does they take 500. Memory is linear in the number of choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.inverse import ENTRIES, InverseIndex, plan_tables
from nsa.kernels.launch import ceil_div, launch, power_of_two
from nsa.kernels.tiles import KernelPlan

MIN_CHUNK, MAX_CHUNKS = 64, 256
"""Queries that are counted one after the other, at least; how many such chunks there are at most, so that memory is linear in the length."""


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "chunk", "limit"])
def rank_kernel(
    selection, total, row_sequence, block_ends, lists, ranks, counts, num_rows, num_kv_heads, num_blocks, chunk, limit,
    CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk of queries of one KV head: each choice's block in the packed batch (-1: none) and its rank among the chunk's choices of the
    block, query by query; how often the chunk chose each block, int32 `[chunks, Hkv, B]`. One warp: its queries come one after the other."""
    if tl.load(total) <= limit:
        return
    head = tl.program_id(1)
    own = counts + (tl.program_id(0) * num_kv_heads + head).to(tl.int64) * num_blocks
    lane, slot = tl.arange(0, 128), tl.arange(0, CHOSEN_PAD)
    for base in range(0, num_blocks, 128):
        tl.store(own + base + lane, 0, mask=base + lane < num_blocks)
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, num_rows)
    for base in range(first, end, ROWS):
        row = base + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (slot < CHOSEN)[None, :]
        at = ((row.to(tl.int64) * num_kv_heads + head) * CHOSEN)[:, None] + slot[None, :]
        block = tl.load(selection + at, mask=there, other=-1).to(tl.int32)
        sequence = tl.load(row_sequence + row, mask=row < end, other=0)
        begin = tl.load(block_ends + sequence)
        some = (block >= 0) & (block < (tl.load(block_ends + sequence + 1) - begin)[:, None])
        tl.store(lists + at, tl.where(some, begin[:, None] + block, -1), mask=there)
    tl.debug_barrier()
    at = (first.to(tl.int64) * num_kv_heads + head) * CHOSEN + slot
    coming = tl.load(lists + at, mask=slot < CHOSEN, other=-1).to(tl.int32)
    for row in range(first, end):
        block = coming
        coming = tl.load(lists + at + num_kv_heads * CHOSEN, mask=slot < tl.where(row + 1 < end, CHOSEN, 0), other=-1).to(tl.int32)
        rank = tl.load(own + block, mask=block >= 0, other=0)
        tl.store(own + block, rank + 1, mask=block >= 0)
        tl.store(ranks + at, rank, mask=slot < CHOSEN)
        at += num_kv_heads * CHOSEN
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_lists", "num_chunks", "limit"])
def starts_kernel(counts, total, ends, num_lists, num_chunks, limit, LISTS: tl.constexpr, CHUNKS: tl.constexpr):
    """counts become sums over the chunks before; ends[1 + list]: the list's length."""
    if tl.load(total) <= limit:
        return
    number = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    before = tl.zeros([LISTS], tl.int32)
    for base in range(0, num_chunks, CHUNKS):
        chunk = base + tl.arange(0, CHUNKS)
        mask = (chunk < num_chunks)[:, None] & (number < num_lists)[None, :]
        at = counts + chunk.to(tl.int64)[:, None] * num_lists + number[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, axis=0) - count, mask=mask)
        before += tl.sum(count, axis=0)
    tl.store(ends + 1 + number, before.to(tl.int64), mask=number < num_lists)


@triton.jit(do_not_specialize=["num_lists", "limit"])
def ends_kernel(ends, total, num_lists, limit, LISTS: tl.constexpr):
    """Lengths of the lists, one place on, become where each begins; one program."""
    if tl.load(total) <= limit:
        return
    tl.store(ends, 0)
    number, before = tl.arange(0, LISTS), tl.full([], 0, tl.int64)
    for base in range(0, num_lists, LISTS):
        mask = base + number < num_lists
        length = tl.load(ends + 1 + base + number, mask=mask, other=0)
        tl.store(ends + 1 + base + number, before + tl.cumsum(length, axis=0), mask=mask)
        before += tl.sum(length, axis=0)


@triton.jit(do_not_specialize=["num_entries", "num_blocks", "chunk", "limit"])
def index_kernel(
    lists, ranks, counts, ends, total, queries, slots, num_entries, num_kv_heads, num_blocks, chunk, limit,
    CHOSEN: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """queries and slots: each choice goes behind those of its list in chunks before, and those of its own that came first."""
    if tl.load(total) <= limit:
        return
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    block = tl.load(lists + entry, mask=entry < num_entries, other=-1).to(tl.int32)
    some = block >= 0
    head, query = entry // CHOSEN % num_kv_heads, entry // (num_kv_heads * CHOSEN)
    number = head * num_blocks + block
    place = tl.load(ends + number, mask=some, other=0) + tl.load(ranks + entry, mask=some, other=0)
    place += tl.load(counts + query // chunk * num_kv_heads * num_blocks + number, mask=some, other=0)
    tl.store(queries + place, query.to(tl.int32), mask=some)
    tl.store(slots + place, (entry % CHOSEN).to(tl.int16), mask=some)


def invert_where(selection: torch.Tensor, plan: KernelPlan, config: SparsityConfig, total: torch.Tensor, limit: int) -> InverseIndex:
    """`invert_selection` where `total` (int32 `[1]`) is above `limit`; otherwise the index is of no use.

    Args:
        selection: integers `[T, Hkv, n]`, a query's blocks all different, counted from the sequence's start; negative ones and those after the
            sequence's last block are none.
        plan: rows of the sequences.
    """
    num_kv_heads, n = selection.shape[1:]
    selection, device, num_entries, num_rows = selection.contiguous(), selection.device, selection.numel(), selection.shape[0]
    row_sequence, block_sequence, block_ends = plan_tables(plan, config.select_block_size)
    num_blocks = block_sequence.shape[0]
    num_lists = num_kv_heads * num_blocks
    chunk = max(MIN_CHUNK, power_of_two(ceil_div(num_rows, MAX_CHUNKS)))
    num_chunks = ceil_div(num_rows, chunk)
    queries = torch.empty(num_entries, dtype=torch.int32, device=device)
    slots = torch.empty(num_entries, dtype=torch.int16, device=device)
    ends = (torch.empty if num_entries else torch.zeros)(num_lists + 1, dtype=torch.int64, device=device)
    if num_entries:
        # int16 takes half the time to read and write.
        lists = torch.empty(num_entries, dtype=torch.int16 if num_blocks < 2**15 else torch.int32, device=device)
        ranks = torch.empty(num_entries, dtype=torch.int16 if chunk < 2**15 else torch.int32, device=device)
        counts = torch.empty(num_chunks, num_lists, dtype=torch.int32, device=device)
        launch(
            rank_kernel, (num_chunks, num_kv_heads),
            selection, total, row_sequence, block_ends, lists, ranks, counts, num_rows, num_kv_heads, num_blocks, chunk, limit,
            CHOSEN=n, CHOSEN_PAD=power_of_two(n), ROWS=32, num_warps=1,
        )  # fmt: skip
        launch(starts_kernel, (ceil_div(num_lists, 32),), counts, total, ends, num_lists, num_chunks, limit, LISTS=32, CHUNKS=64)
        launch(ends_kernel, (1,), ends, total, num_lists, limit, LISTS=ENTRIES)
        launch(
            index_kernel, (ceil_div(num_entries, ENTRIES),),
            lists, ranks, counts, ends, total, queries, slots, num_entries, num_kv_heads, num_blocks, chunk, limit,
            CHOSEN=n, ENTRIES=ENTRIES
        )  # fmt: skip
    return InverseIndex(ends, queries, slots, row_sequence, block_sequence, block_ends)
