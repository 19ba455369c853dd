"""Index arithmetic of compressed tokens and selection blocks: Eq. 7, 9-12 of the NSA paper, 0-based, on tensors.

Compressed token i pools raw tokens [i·d, i·d + l) and is visible to query t once complete: i·d + l − 1 <= t. Block j
holds tokens [j·l', (j+1)·l') and is visible to t where j·l' <= t. Blocks count from each sequence's own start.
Leaves out attention itself. The oracle (reference.py) shares nothing with this file.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nsa.config import SparsityConfig

MAX_COMPARISONS = 2**25
"""Up to this many pairs of block scores are ranked by comparing, more by sorting."""


def num_compressed(length: int, config: SparsityConfig) -> int:
    """Complete compressed tokens of a sequence of `length` tokens (Eq. 7)."""
    return max(0, (length - config.compress_block_size) // config.compress_stride + 1)


def num_blocks(length: int, config: SparsityConfig) -> int:
    """Selection blocks of a sequence of `length` tokens, the last perhaps incomplete."""
    return -(-length // config.select_block_size)


def visible_compressed(positions: torch.Tensor, count: int, config: SparsityConfig) -> torch.Tensor:
    """Which of the first `count` compressed tokens each query may see.

    Args:
        positions: integer tensor `[...]`, the queries' positions in their sequences.
    Returns:
        bool `[..., count]`.
    """
    last_token = torch.arange(count, device=positions.device) * config.compress_stride + (config.compress_block_size - 1)
    return last_token <= positions[..., None]


def block_scores(probabilities: torch.Tensor, count: int, config: SparsityConfig) -> torch.Tensor:
    """Map compression probabilities to scores of the first `count` selection blocks (Eq. 9, read as block overlap).

    Block j takes compressed tokens (l'/d)·j − (l/d − 1) … (l'/d)·(j+1) − 1, each weighted with its overlap with the
    block in units of d; for l 32, d 16, l' 64 the weights are 1, 2, 2, 2, 1. The additions are per element and in one
    order, whatever the shape.

    Args:
        probabilities: `[..., C]`, zero where a compressed token is not visible.
    Returns:
        `[..., count]` in the same dtype.
    """
    per_block = config.select_block_size // config.compress_stride
    per_token = config.compress_block_size // config.compress_stride
    span = per_block + per_token - 1
    left = per_token - 1
    right = max(0, (count - 1) * per_block + span - left - probabilities.shape[-1])
    windows = functional.pad(probabilities, (left, right)).unfold(-1, span, per_block)[..., :count, :]
    scores = torch.zeros_like(windows[..., 0])
    for offset in range(span):
        weight = min(offset + 1, span - offset, per_block, per_token)
        scores = scores + windows[..., offset] * weight
    return scores


def _ranks(keys: torch.Tensor) -> torch.Tensor:
    """Place of each entry in descending order, ties to the lower index, along the last dimension.

    Few entries are compared pair by pair (one or two kernels), many are sorted; both give the same ranks."""
    count = keys.shape[-1]
    if keys.numel() * count <= MAX_COMPARISONS:
        index = torch.arange(count, device=keys.device)
        mine, other = keys[..., :, None], keys[..., None, :]
        return ((other > mine) | ((other == mine) & (index < index[:, None]))).sum(-1)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=keys.device).expand_as(order))


def select_blocks(scores: torch.Tensor, positions: torch.Tensor, config: SparsityConfig) -> torch.Tensor:
    """The n blocks each query attends to (Eq. 11-12): forced initial and local blocks, then the best of the others.

    Ties go to the lower block. Forced blocks are placed by mask; no arithmetic touches the masked values.

    Args:
        scores: fp32 `[..., J]`, >= 0, already summed over the heads of a group (Eq. 10).
        positions: integers that broadcast against `scores`' leading dimensions.
    Returns:
        int64 `[..., n]`: block numbers in ascending order, then −1 where fewer than n blocks are visible.
    """
    n, count = config.num_selected_blocks, scores.shape[-1]
    blocks = torch.arange(count, device=scores.device)
    current = (positions // config.select_block_size)[..., None]
    visible = blocks <= current
    if count <= n:
        chosen = torch.where(visible, blocks, -1).expand(*scores.shape)
        return functional.pad(chosen, (0, n - count), value=-1)
    forced = (blocks < config.num_init_blocks) | (blocks > current - config.num_local_blocks)
    keys = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -1.0)
    selected = (_ranks(keys) < n) & visible
    place = torch.where(selected, selected.cumsum(-1) - 1, n)
    chosen = torch.full((*scores.shape[:-1], n + 1), -1, dtype=torch.int64, device=scores.device)
    return chosen.scatter_(-1, place, blocks.expand_as(place))[..., :n]


def selection_mask(selection: torch.Tensor, count: int) -> torch.Tensor:
    """Block numbers `[..., n]` (−1 = none) → bool `[..., count]`: is block j selected."""
    mask = torch.zeros(*selection.shape[:-1], count + 1, dtype=torch.bool, device=selection.device)
    mask.scatter_(-1, torch.where(selection < 0, count, selection).long(), True)
    return mask[..., :count]


def selection_dtype(num_positions: int, config: SparsityConfig) -> torch.dtype:
    """int16 while every block number of `num_positions` tokens fits, int32 above."""
    return torch.int16 if num_blocks(num_positions, config) <= 32767 else torch.int32
