"""The inverse of a selection in CSR form: for each KV head and block, the queries that chose it, ascending.

Memory is linear in the number of choices, nothing is read back by the host, and a stable sort makes the order the
same every time. Leaves out how the lists are cut into work (selected.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.config import SparsityConfig
from nsa.kernels.tiles import KernelPlan


@dataclass(frozen=True, slots=True)
class InverseIndex:
    """Who chose which block. Blocks are numbered over all packed sequences in order, B in total.

    ends: int64 `[Hkv·B + 1]`; the list of KV head h and block b is `[ends[h·B + b], ends[h·B + b + 1])`.
    queries: int32 `[T·Hkv·n]`, packed query rows; beyond `ends[-1]` it holds nothing of use.
    slots: int16 `[T·Hkv·n]`, which of its n choices the block is to that query.
    block_sequence: int32 `[B]`, the sequence of a block. block_ends: int32 `[N + 1]`, blocks of the sequences, cumulative.
    """

    ends: torch.Tensor
    queries: torch.Tensor
    slots: torch.Tensor
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
    row_sequence = torch.searchsorted(plan.query_ends[1:], rows, right=True)
    num_lists = num_kv_heads * num_blocks
    dtype = torch.int16 if num_lists < 2**15 else torch.int32  # a radix sort of int16 takes half the passes
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=device) * num_blocks
    lists = selection.int() + (block_ends[row_sequence][:, None] + heads)[..., None]
    lists = torch.where(selection < 0, num_lists, lists).to(dtype).flatten()
    lists, order = torch.sort(lists, stable=True)
    boundaries = torch.arange(num_lists + 1, dtype=torch.int32, device=device).to(dtype)
    ends = torch.searchsorted(lists, boundaries)
    return InverseIndex(ends, (order // (num_kv_heads * n)).int(), (order % n).short(), block_sequence, block_ends)
