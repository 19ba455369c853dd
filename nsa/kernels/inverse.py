"""The inverse of a selection in CSR form: for each KV head and block, the queries that chose it, ascending.

Memory is linear in the number of choices, nothing is read back by the host, and a stable sort makes the order the
same every time. `cut_lists` cuts the lists into pieces of work for block-major kernels (gathered.py), which walk them a
range of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.tiles import KernelPlan

MAX_BOUNDS = 2**22
"""Entries of a table of list bounds; more ranges than it holds are cut in several goes."""


@dataclass(frozen=True, slots=True)
class InverseIndex:
    """Who chose which block. Blocks are numbered over all packed sequences in order, B in total.

    ends: int64 `[Hkv·B + 1]`; the list of KV head h and block b is `[ends[h·B + b], ends[h·B + b + 1])`.
    queries: int32 `[T·Hkv·n]`, packed query rows; beyond `ends[-1]` it holds nothing of use.
    slots: int16 `[T·Hkv·n]`, which of its n choices the block is to that query.
    row_sequence: int32 `[T]`, the sequence of a packed query row.
    block_sequence: int32 `[B]`, the sequence of a block. block_ends: int32 `[N + 1]`, blocks of the sequences, cumulative.
    """

    ends: torch.Tensor
    queries: torch.Tensor
    slots: torch.Tensor
    row_sequence: torch.Tensor
    block_sequence: torch.Tensor
    block_ends: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.block_sequence.shape[0]


def invert_selection(selection: torch.Tensor, plan: KernelPlan, config: SparsityConfig) -> InverseIndex:
    """Group the choices by KV head and block.

    Args:
        selection: integers `[T, Hkv, n]`, block numbers from the sequence's start; negative means none.
        plan: rows of the sequences.
    """
    num_queries, num_kv_heads, n = selection.shape
    device, size = selection.device, config.select_block_size
    num_blocks = plan.key_tiles(size).shape[0]
    lengths = plan.key_ends.diff()
    block_ends = torch.zeros(plan.num_sequences + 1, dtype=torch.int32, device=device)
    block_ends[1:] = ((lengths + (size - 1)) // size).cumsum(0)
    block_sequence = torch.searchsorted(block_ends[1:], torch.arange(num_blocks, dtype=torch.int32, device=device), right=True, out_int32=True)
    rows = torch.arange(num_queries, dtype=torch.int32, device=device)
    row_sequence = torch.searchsorted(plan.query_ends[1:], rows, right=True, out_int32=True)
    num_lists = num_kv_heads * num_blocks
    dtype = torch.int16 if num_lists < 2**15 else torch.int32  # a radix sort of int16 takes half the passes
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=device) * num_blocks
    lists = selection.int() + (block_ends[row_sequence][:, None] + heads)[..., None]
    lists = torch.where(selection < 0, num_lists, lists).to(dtype).flatten()
    lists, order = torch.sort(lists, stable=True)
    boundaries = torch.arange(num_lists + 1, dtype=torch.int32, device=device).to(dtype)
    ends = torch.searchsorted(lists, boundaries)
    return InverseIndex(ends, (order // (num_kv_heads * n)).int(), (order % n).short(), row_sequence, block_sequence, block_ends)


class Work(NamedTuple):
    """What each program of a range and KV head does. Tables are `[ranges, Hkv, programs]` or `[ranges, Hkv, B]`.

    blocks: int32, -1 for no work. firsts: int64, its first entry in the index. sizes: int32, how many.
    segments: int32, where its partial sums go, -1 if the block has this program alone.
    segment_firsts, segment_counts: int32 `[…, B]`, the partial sums of a block (count 0 or 1: none).
    """

    blocks: torch.Tensor
    firsts: torch.Tensor
    sizes: torch.Tensor
    segments: torch.Tensor
    segment_firsts: torch.Tensor
    segment_counts: torch.Tensor


@lru_cache(maxsize=64)
def query_cuts(plan: KernelPlan, chunk: int) -> tuple[list[int], torch.Tensor]:
    """Borders of ranges of at most `chunk` packed queries (int32 on the device too). A sequence is cut at multiples of
    `chunk` from its own start and nowhere else."""
    cuts, row = [0], 0
    for length in plan.host_query_ends.diff().tolist():
        for start in range(0, length, chunk):
            size = min(chunk, length - start)
            if row - cuts[-1] + size > chunk:
                cuts.append(row)
            row += size
    cuts.append(row)
    return cuts, torch.tensor(cuts, dtype=torch.int32).to(plan.device, non_blocking=True)


@triton.jit
def bounds_kernel(
    queries, ends, cuts, bounds, block_sequence, block_ends, query_ends, key_ends, num_blocks, num_lists,
    SELECT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """bounds[c, list] = the list's first entry whose query row is >= cuts[c], by binary search; with LOCAL >= 0 past the
    entries that are computed as shared blocks (a prefix of the list: queries up to LOCAL - 1 blocks after it)."""
    owner = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    there = owner < num_lists
    low = tl.load(ends + owner, mask=there, other=0)
    high = tl.load(ends + owner + 1, mask=there, other=0)
    least = tl.load(cuts + tl.program_id(1)) + tl.zeros([LISTS], tl.int32)
    if LOCAL >= 0:
        block = owner % num_blocks
        sequence = tl.load(block_sequence + block, mask=there, other=0)
        offset = tl.load(key_ends + sequence + 1) - tl.load(key_ends + sequence) - tl.load(query_ends + sequence + 1)
        number = block - tl.load(block_ends + sequence)
        least = tl.maximum(least, tl.where(number < INIT, 2147483647, (number + LOCAL) * SELECT - offset))
    while tl.max(high - low, axis=0) > 0:
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(queries + middle, mask=searching, other=0) < least
        low, high = tl.where(searching & below, middle + 1, low), tl.where(searching & ~below, middle, high)
    tl.store(bounds + tl.program_id(1).to(tl.int64) * num_lists + owner, low, mask=there)


def cut_lists(
    index: InverseIndex, cuts: torch.Tensor, plan: KernelPlan, size: int, part: int, most: int, *, init: int, local: int, keep_empty: bool
) -> Iterator[tuple[int, Work]]:
    """Cut every list at the ranges' borders, and what is left into parts; longest first.

    Args:
        cuts: int32 `[ranges + 1]`, from `query_cuts`. size: keys of a block. part: entries of a program at most.
        most: entries of one KV head and range at most.
        init, local: leave out the choices of the first `init` blocks, and those by queries fewer than `local` blocks
            later; local < 0 leaves out nothing.
        keep_empty: a block nobody chose gets a program too.
    Yields:
        (number of the first range, its and the next ranges' work), in order.
    """
    num_blocks, num_lists = index.num_blocks, index.ends.shape[0] - 1
    num_kv_heads, num_ranges, together = num_lists // num_blocks, cuts.shape[0] - 1, max(1, MAX_BOUNDS // num_lists)
    numbers = torch.arange(num_blocks + most // part, device=cuts.device)
    for base in range(0, num_ranges, together):
        count = min(together, num_ranges - base)
        bounds = torch.empty(count + 1, num_kv_heads, num_blocks, dtype=torch.int64, device=cuts.device)
        bounds_kernel[(triton.cdiv(num_lists, 256), count + 1)](
            index.queries, index.ends, cuts[base:], bounds, index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends,
            num_blocks, num_lists, SELECT=size, INIT=init, LOCAL=local, LISTS=256,
        )  # fmt: skip
        parts = (bounds.diff(dim=0) + (part - 1)) // part
        parts = parts.clamp(min=1) if keep_empty else parts
        part_ends = parts.cumsum(-1)
        segments = torch.where(parts > 1, parts, 0)
        segment_firsts = segments.cumsum(-1) - segments
        owners = torch.searchsorted(part_ends, numbers.expand(count, num_kv_heads, -1).contiguous(), right=True)
        there, owners = owners < num_blocks, owners.clamp(max=num_blocks - 1)
        number = numbers - (part_ends - parts).gather(-1, owners)
        firsts = bounds[:-1].gather(-1, owners) + number * part
        sizes = torch.where(there, (bounds[1:].gather(-1, owners) - firsts).clamp(max=part), -1)
        places = torch.where(segments.gather(-1, owners) > 0, segment_firsts.gather(-1, owners) + number, -1)
        sizes, order = sizes.sort(dim=-1, descending=True, stable=True)
        tables = (torch.where(there, owners, -1).int(), firsts, places.int())
        blocks, firsts, places = (x.gather(-1, order) for x in tables)
        yield base, Work(blocks, firsts, sizes.int(), places, segment_firsts.int(), segments.int())
