"""The inverse of a selection in CSR form: for each KV head and block, the queries that chose it, ascending.

Memory is linear in the number of choices, nothing is read back by the host, and a stable sort makes the order the
same every time. `cut_lists` cuts the lists into pieces of work for block-major kernels (gathered.py), which walk them a
range of queries at a time. Few launches: at short lengths the host is what takes the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.launch import ceil_div, launch
from nsa.kernels.tiles import KernelPlan, on_device

MAX_BOUNDS = 2**22
"""Lists that are cut in one go (KV heads × blocks × ranges); more ranges take several."""
ENTRIES = 1024
"""Choices (or lists) that one program of the small kernels here takes."""


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


@lru_cache(maxsize=64)
def plan_tables(plan: KernelPlan, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row_sequence, block_sequence and block_ends of an index; the same for all layers of a batch."""
    blocks = -(-np.diff(plan.host_key_ends.numpy()) // size)
    sequences = np.arange(plan.num_sequences)
    tables = np.repeat(sequences, np.diff(plan.host_query_ends.numpy())), np.repeat(sequences, blocks), np.array([0, *blocks.cumsum()])
    # Made here and copied at once: a dozen launches less. Each begins at 16 bytes.
    padded = [np.pad(table.astype(np.int32), (0, -len(table) % 4)) for table in tables]
    row_sequence, block_sequence, block_ends = on_device(torch.from_numpy(np.concatenate(padded)), plan.device).split([len(x) for x in padded])
    return row_sequence[: len(tables[0])], block_sequence[: len(tables[1])], block_ends[: len(tables[2])]


@triton.jit(do_not_specialize=["num_entries", "num_blocks"])
def list_numbers_kernel(
    selection, lists, row_sequence, block_ends, num_entries, num_kv_heads, num_blocks, CHOSEN: tl.constexpr, ENTRIES: tl.constexpr
):
    """The list each choice belongs to; those that are none go to a list after the last."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < num_entries
    block = tl.load(selection + entry, mask=there, other=-1).to(tl.int32)
    first = tl.load(block_ends + tl.load(row_sequence + entry // (num_kv_heads * CHOSEN), mask=there, other=0))
    number = (entry // CHOSEN % num_kv_heads).to(tl.int32) * num_blocks + first + block
    tl.store(lists + entry, tl.where(block < 0, num_kv_heads * num_blocks, number), mask=there)


@triton.jit(do_not_specialize=["num_entries", "num_lists", "steps"])
def index_kernel(lists, order, queries, slots, ends, num_entries, num_lists, num_kv_heads, steps, CHOSEN: tl.constexpr, ENTRIES: tl.constexpr):
    """queries and slots from the order of the sorted choices (first programs); where each list begins, by binary search (last)."""
    program = tl.program_id(0)
    last = tl.cdiv(num_entries, ENTRIES)
    if program < last:
        entry = program.to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        there = entry < num_entries
        choice = tl.load(order + entry, mask=there, other=0)
        tl.store(queries + entry, (choice // (num_kv_heads * CHOSEN)).to(tl.int32), mask=there)
        tl.store(slots + entry, (choice % CHOSEN).to(tl.int16), mask=there)
    else:
        number = (program - last) * ENTRIES + tl.arange(0, ENTRIES)
        low = tl.zeros([ENTRIES], tl.int64)
        high = low + num_entries
        for _ in range(steps):
            middle = (low + high) // 2
            searching = low < high
            below = tl.load(lists + middle, mask=searching, other=0).to(tl.int32) < number
            low, high = tl.where(searching & below, middle + 1, low), tl.where(searching & ~below, middle, high)
        tl.store(ends + number, low, mask=number <= num_lists)


def invert_selection(selection: torch.Tensor, plan: KernelPlan, config: SparsityConfig) -> InverseIndex:
    """Group the choices by KV head and block.

    Args:
        selection: integers `[T, Hkv, n]`, block numbers from the sequence's start; negative means none.
        plan: rows of the sequences.
    """
    num_kv_heads, n = selection.shape[1:]
    selection, device, num_entries = selection.contiguous(), selection.device, selection.numel()
    row_sequence, block_sequence, block_ends = plan_tables(plan, config.select_block_size)
    num_blocks = block_sequence.shape[0]
    num_lists = num_kv_heads * num_blocks
    # A radix sort of int16 takes half the passes.
    lists = torch.empty(num_entries, dtype=torch.int16 if num_lists < 2**15 else torch.int32, device=device)
    programs = ceil_div(num_entries, ENTRIES)
    if programs:
        launch(
            list_numbers_kernel, (programs,),
            selection, lists, row_sequence, block_ends, num_entries, num_kv_heads, num_blocks, CHOSEN=n, ENTRIES=ENTRIES
        )  # fmt: skip
    lists, order = torch.sort(lists, stable=True)
    queries = torch.empty(num_entries, dtype=torch.int32, device=device)
    slots = torch.empty(num_entries, dtype=torch.int16, device=device)
    ends = torch.empty(num_lists + 1, dtype=torch.int64, device=device)
    launch(
        index_kernel, (programs + ceil_div(num_lists + 1, ENTRIES),),
        lists, order, queries, slots, ends, num_entries, num_lists, num_kv_heads, num_entries.bit_length(), CHOSEN=n, ENTRIES=ENTRIES
    )  # fmt: skip
    return InverseIndex(ends, queries, slots, row_sequence, block_sequence, block_ends)


class Work(NamedTuple):
    """What each program of a range and KV head does. Tables are `[ranges, Hkv, programs]` or `[ranges, Hkv, B]`.

    counts: int32 `[ranges, Hkv]`, how many programs have work; the tables hold nothing of use beyond.
    blocks: int32. firsts: int64, the program's first entry in the index. sizes: int32, how many.
    segments: int32, where its partial sums go, -1 if the block has this program alone.
    segment_firsts, segment_counts: int32 `[…, B]`, the partial sums of a block (count 0: none).
    """

    counts: torch.Tensor
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


@lru_cache(maxsize=64)
def whole_range(plan: KernelPlan) -> torch.Tensor:
    """The borders of one range that holds all packed queries: int32 `[2]`."""
    return torch.tensor([0, plan.num_queries], dtype=torch.int32).to(plan.device, non_blocking=True)


@triton.jit
def first_from(queries, low, high, least, steps):
    """The first entry in [low, high) whose query row is >= least, else high; by binary search."""
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(queries + middle, mask=searching, other=0) < least
        low, high = tl.where(searching & below, middle + 1, low), tl.where(searching & ~below, middle, high)
    return low


@triton.jit
def bounds_of(
    queries, ends, block, there, head, first_query, end_query, block_sequence, block_ends, query_ends, key_ends, num_blocks, steps,
    SELECT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Entries of the lists of some blocks that belong to the range's queries; with LOCAL >= 0 past those that are computed
    as shared blocks (a prefix of the list: queries up to LOCAL - 1 blocks after it)."""
    low = tl.load(ends + head * num_blocks + block, mask=there, other=0)
    high = tl.load(ends + head * num_blocks + block + 1, mask=there, other=0)
    least = first_query + tl.zeros_like(block)
    if LOCAL >= 0:
        sequence = tl.load(block_sequence + block, mask=there, other=0)
        offset = tl.load(key_ends + sequence + 1) - tl.load(key_ends + sequence) - tl.load(query_ends + sequence + 1)
        number = block - tl.load(block_ends + sequence)
        least = tl.maximum(least, tl.where(number < INIT, 2147483647, (number + LOCAL) * SELECT - offset))
    low = first_from(queries, low, high, least, steps)
    return low, (first_from(queries, low, high, end_query, steps) - low).to(tl.int32)


@triton.jit(do_not_specialize=["num_blocks", "num_programs", "steps", "limit"], do_not_specialize_on_alignment=["cuts"])
def cut_kernel(
    queries, ends, total, cuts, counts, blocks, firsts, sizes, segments, segment_firsts, segment_counts, block_sequence, block_ends,
    query_ends, key_ends, num_blocks, num_programs, part, steps, limit,
    SELECT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, KEEP_EMPTY: tl.constexpr, SEGMENTS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """The work of one range (x) and KV head (y): whole parts first, then what is left of each list."""
    if tl.load(total) <= limit:
        return
    head = tl.program_id(1)
    owner = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    first_query, end_query = tl.load(cuts + tl.program_id(0)), tl.load(cuts + tl.program_id(0) + 1)
    items = owner * num_programs
    written = 0
    for rest in tl.static_range(2):
        sums = 0
        for base in range(0, num_blocks, LISTS):
            block = base + tl.arange(0, LISTS)
            there = block < num_blocks
            low, size = bounds_of(
                queries, ends, block, there, head, first_query, end_query, block_sequence, block_ends, query_ends, key_ends, num_blocks,
                steps, SELECT, INIT, LOCAL,
            )  # fmt: skip
            whole = size // part
            left = size - whole * part
            number = whole + (left > 0).to(tl.int32)
            if KEEP_EMPTY:
                number = tl.maximum(number, 1)
            number = tl.where(there, number, 0)
            partial = tl.where(number > 1, number, 0)
            sum_first = sums + tl.cumsum(partial, axis=0) - partial
            sums += tl.sum(partial, axis=0)
            mine = number - whole if rest else tl.where(there, whole, 0)
            item = items + written + tl.cumsum(mine, axis=0) - mine
            written += tl.sum(mine, axis=0)
            for turn in range(0, tl.max(mine, axis=0)):
                store = turn < mine
                which = whole if rest else turn + tl.zeros_like(whole)
                tl.store(blocks + item + turn, block, mask=store)
                tl.store(firsts + item + turn, low + which * part, mask=store)
                tl.store(sizes + item + turn, tl.minimum(size - which * part, part), mask=store)
                if SEGMENTS:
                    tl.store(segments + item + turn, tl.where(number > 1, sum_first + which, -1), mask=store)
            if SEGMENTS and rest:
                tl.store(segment_firsts + owner * num_blocks + block, sum_first, mask=there)
                tl.store(segment_counts + owner * num_blocks + block, partial, mask=there)
    tl.store(counts + owner, written)


def aligned_vectors(sizes: list[int], device: torch.device) -> list[torch.Tensor]:
    """int32 vectors of these sizes in one allocation; each begins at 16 bytes, so that no size asks for another kernel."""
    rooms = [-(-size // 4) * 4 for size in sizes]
    parts = torch.empty(sum(rooms), dtype=torch.int32, device=device).split(rooms)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def cut_lists(
    index: InverseIndex, cuts: torch.Tensor, plan: KernelPlan, size: int, part: int, most: int, *, init: int, local: int, backward: bool,
    guard: tuple[torch.Tensor, int] | None = None,
) -> Iterator[tuple[int, Work]]:  # fmt: skip
    """Cut every list at the ranges' borders, and what is left into parts; whole parts first.

    Args:
        cuts: int32 `[ranges + 1]`, from `query_cuts`. size: keys of a block. part: entries of a program at most.
        most: entries of one KV head and range at most.
        init, local: leave out the choices of the first `init` blocks, and those by queries fewer than `local` blocks
            later; local < 0 leaves out nothing.
        backward: a block nobody chose gets a program too, and there are tables of segments.
        guard: a number on the device and a limit: where the number is not above the limit, nothing is done.
    Yields:
        (number of the first range, its and the next ranges' work), in order.
    """
    num_blocks, num_lists = index.num_blocks, index.ends.shape[0] - 1
    num_kv_heads, num_ranges, together = num_lists // num_blocks, cuts.shape[0] - 1, max(1, MAX_BOUNDS // num_lists)
    programs = num_blocks + most // part
    total, limit = (index.ends, -1) if guard is None else guard  # the first list begins at 0
    for base in range(0, num_ranges, together):
        count = min(together, num_ranges - base)
        widths = [count * num_kv_heads * width for width in (1, programs, programs, *((programs, num_blocks, num_blocks) if backward else ()))]
        counts, *tables = (x.view(count, num_kv_heads, -1) for x in aligned_vectors(widths, cuts.device))
        firsts = torch.empty(count, num_kv_heads, programs, dtype=torch.int64, device=cuts.device)
        blocks, sizes, segments, segment_firsts, segment_counts = tables if backward else (*tables, *tables[:1] * 3)
        work = Work(counts, blocks, firsts, sizes, segments, segment_firsts, segment_counts)
        launch(
            cut_kernel, (count, num_kv_heads),
            index.queries, index.ends, total, cuts[base:], *work, index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends,
            num_blocks, programs, part, plan.num_queries.bit_length(), limit,
            SELECT=size, INIT=init, LOCAL=local, KEEP_EMPTY=backward, SEGMENTS=backward, LISTS=128 if num_blocks <= 128 else 1024,
        )  # fmt: skip
        yield base, work
