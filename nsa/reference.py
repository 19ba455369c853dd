"""The oracle: native sparse attention written from the paper (arXiv 2502.11089, §3.2-3.3), one query at a time.

Slow, plain, differentiable PyTorch in fp32 or fp64, for tests. It shares no helper with `nsa/blocks.py`,
`nsa/torch_backend.py` or the kernels: whatever they get wrong together, it does not. It leaves out caches, batching
tricks and argument checks beyond those that keep a wrong call from giving a silent wrong answer.

Names: T packed query tokens, Hq query heads, Hkv key/value heads, G = Hq / Hkv, M compressed tokens of one sequence,
J selection blocks of one sequence. Positions and block numbers are 0-based and count from each sequence's start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from nsa.attention import BranchKV, CompressorWeights, Phi
    from nsa.config import SparsityConfig

RECOMPUTE = -2
"""First entry of a given selection row that asks for the query's own choice."""


def reference_attention(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    *,
    phi: Phi | None,
    config: SparsityConfig,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    selection: Tensor | None = None,
    return_selection: bool = False,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated sum of compressed, selected and window attention (NSA Eq. 3-12).

    Args:
        q: queries `[T, Hq, Dk]`, fp32 or fp64.
        kv: per branch (k `[Tk, Hkv, Dk]`, v `[Tk, Hkv, Dv]`).
        gates: `[T, Hq, 3]` for compression, selection, window.
        phi: the compressor's weights; None with `config.compressor == "mean"`.
        config: l, d, l', n, w and the forced blocks.
        cu_seqlens: `[N + 1]` ends of the packed sequences' queries; None: one sequence.
        cu_seqlens_k: `[N + 1]` ends of their keys, where there are more keys than queries: the queries are then each
            sequence's last tokens. None: as `cu_seqlens`.
        selection: `[T, Hkv, n]` block numbers to use in place of the query's own choice; -1 is no block, and a row that
            starts with -2 is chosen anew.
        return_selection: also return the blocks used.
        scale: factor on q·k in every branch, also where blocks are scored; None: Dk ** -0.5.

    Returns:
        Output `[T, Hq, Dv]`; with `return_selection` also int16 `[T, Hkv, n]`, ascending, then -1.

    Raises:
        ValueError: another dtype, `phi` that does not fit `config.compressor`, or lengths that do not fit.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = kv.slc[0].shape[1]
    group = q.shape[1] // num_kv_heads
    outputs: list[Tensor] = []
    chosen: list[list[int]] = []
    for queries, keys in _sequences(q, kv, phi, config, cu_seqlens, cu_seqlens_k):
        cmp_k = compress(kv.cmp[0][keys], phi.k if phi else None, config)
        cmp_v = compress(kv.cmp[1][keys], phi.v if phi else None, config)
        slc_k, slc_v = kv.slc[0][keys], kv.slc[1][keys]
        win_k, win_v = kv.win[0][keys], kv.win[1][keys]
        num_keys = slc_k.shape[0]
        for row in range(queries.start, queries.stop):
            t = num_keys - (queries.stop - row)
            window = range(max(0, t - config.window_size + 1), t + 1)
            heads = []
            for h in range(num_kv_heads):
                query = q[row, h * group : (h + 1) * group]
                p_cmp = _compressed_probabilities(query, cmp_k[:, h], t, config, factor)
                if selection is None or int(selection[row, h, 0]) == RECOMPUTE:
                    blocks = _choose(_block_scores(p_cmp, t, config), config)
                else:
                    blocks = [int(j) for j in selection[row, h] if int(j) >= 0]
                chosen.append(blocks + [-1] * (config.num_selected_blocks - len(blocks)))
                selected = [s for s in range(t + 1) if s // config.select_block_size in blocks]
                branches = [
                    p_cmp @ cmp_v[: p_cmp.shape[1], h],
                    _attend(query, slc_k[selected, h], slc_v[selected, h], factor),
                    _attend(query, win_k[window.start : window.stop, h], win_v[window.start : window.stop, h], factor),
                ]
                gate = gates[row, h * group : (h + 1) * group]
                heads.append(sum(gate[:, c, None] * branch for c, branch in enumerate(branches)))
            outputs.append(torch.cat(heads))
    out = torch.stack(outputs) if outputs else q.new_zeros(0, q.shape[1], kv.slc[1].shape[2])
    if not return_selection:
        return out
    return out, torch.tensor(chosen, dtype=torch.int16).reshape(q.shape[0], num_kv_heads, config.num_selected_blocks)


def reference_block_scores(
    q: Tensor,
    kv: BranchKV,
    *,
    phi: Phi | None,
    config: SparsityConfig,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Importance of every selection block for every query (NSA Eq. 8-10), before any block is forced.

    Arguments as in `reference_attention`.

    Returns:
        fp64 `[T, Hkv, J]`, J of the longest sequence; -inf where a block starts after the query.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    num_kv_heads = kv.slc[0].shape[1]
    group = q.shape[1] // num_kv_heads
    sequences = list(_sequences(q, kv, phi, config, cu_seqlens, cu_seqlens_k))
    longest = max((keys.stop - keys.start for _, keys in sequences), default=0)
    scores = torch.full((q.shape[0], num_kv_heads, -(-longest // config.select_block_size)), -torch.inf, dtype=torch.float64)
    for queries, keys in sequences:
        cmp_k = compress(kv.cmp[0][keys], phi.k if phi else None, config)
        for row in range(queries.start, queries.stop):
            t = keys.stop - keys.start - (queries.stop - row)
            for h in range(num_kv_heads):
                p_cmp = _compressed_probabilities(q[row, h * group : (h + 1) * group], cmp_k[:, h], t, config, factor)
                row_scores = _block_scores(p_cmp, t, config)
                scores[row, h, : len(row_scores)] = torch.tensor(row_scores, dtype=torch.float64)
    return scores


def compress(x: Tensor, weights: CompressorWeights | None, config: SparsityConfig) -> Tensor:
    """φ over the complete blocks of one sequence (NSA Eq. 7): `[S, Hkv, D]` → `[M, Hkv, D]`, M = ⌊(S - l) / d⌋ + 1 or 0.

    Block i holds tokens i·d … i·d + l - 1. `mean` pools them; `mlp` adds down·silu(up·flatten(block + position)).
    """
    l, d = config.compress_block_size, config.compress_stride
    pooled = []
    for start in range(0, x.shape[0] - l + 1, d):
        block = x[start : start + l]
        token = block.mean(dim=0)
        if weights is not None:
            flat = (block + weights.position[:, None]).transpose(0, 1).flatten(1)
            token = token + F.silu(flat @ weights.up.T) @ weights.down.T
        pooled.append(token)
    return torch.stack(pooled) if pooled else x.new_zeros(0, *x.shape[1:])


def overlap(i: int, j: int, config: SparsityConfig) -> int:
    """Tokens that compressed token i and selection block j have in common, in units of d."""
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size
    return max(0, min(i * d + l, (j + 1) * size) - max(i * d, j * size)) // d


def overlap_scores(p_cmp: Sequence[float], num_blocks: int, config: SparsityConfig) -> list[float]:
    """Compressed tokens' probabilities → selection blocks' scores: Eq. 9 read as "weight by overlap"."""
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size
    scores = []
    for j in range(num_blocks):
        touching = range(max(0, (j * size - l) // d), min(len(p_cmp), (j + 1) * size // d))
        scores.append(sum(overlap(i, j, config) * p_cmp[i] for i in touching))
    return scores


def literal_eq9(p_cmp: Sequence[float], num_blocks: int, config: SparsityConfig) -> list[float]:
    """Eq. 9 as printed, blocks and compressed tokens numbered from 1: p_slc[j] = Σ_m Σ_n p_cmp[(l'/d)·j - m - n].

    A term that names no compressed token is 0. For l = l' = d the double sum is p_cmp[j] itself, as the paper asks.
    """
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size
    scores = []
    for j in range(1, num_blocks + 1):
        terms = [(size // d) * j - m - n for m in range(size // d) for n in range(l // d)]
        scores.append(sum(p_cmp[i - 1] for i in terms if 1 <= i <= len(p_cmp)))
    return scores


def _sequences(
    q: Tensor, kv: BranchKV, phi: Phi | None, config: SparsityConfig, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """The rows of q and of the keys that belong to each sequence, after checking that the call makes sense."""
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the reference computes in float32 or float64, got {q.dtype}")
    if (phi is not None) != (config.compressor == "mlp"):
        raise ValueError(f"phi goes with compressor='mlp' and only with it, got compressor={config.compressor!r}, phi {'given' if phi else 'None'}")
    num_keys = kv.slc[0].shape[0]
    query_ends = [0, q.shape[0]] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    key_ends = [0, num_keys] if cu_seqlens is None else query_ends
    if cu_seqlens_k is not None:
        key_ends = [int(end) for end in cu_seqlens_k]
    if query_ends[-1] != q.shape[0] or key_ends[-1] != num_keys or len(query_ends) != len(key_ends):
        raise ValueError(f"cu_seqlens must end at the {q.shape[0]} queries and cu_seqlens_k at the {num_keys} keys, got {query_ends} and {key_ends}")
    for n in range(len(query_ends) - 1):
        queries, keys = slice(query_ends[n], query_ends[n + 1]), slice(key_ends[n], key_ends[n + 1])
        if queries.stop - queries.start > keys.stop - keys.start:
            raise ValueError(f"sequence {n} has {queries.stop - queries.start} queries but only {keys.stop - keys.start} keys")
        yield queries, keys


def _compressed_probabilities(query: Tensor, cmp_k: Tensor, t: int, config: SparsityConfig, scale: float) -> Tensor:
    """Softmax of a group's queries `[G, Dk]` over the compressed tokens whose last token is ≤ t: `[G, M_t]` (Eq. 8)."""
    visible = [i for i in range(cmp_k.shape[0]) if i * config.compress_stride + config.compress_block_size - 1 <= t]
    return torch.softmax(scale * (query @ cmp_k[: len(visible)].T), dim=-1)


def _block_scores(p_cmp: Tensor, t: int, config: SparsityConfig) -> list[float]:
    """Scores of the blocks that start at or before t, summed over the group's heads (Eq. 9-10).

    Summed in double: probabilities that are equal give scores that are equal, so that ties are ties.
    """
    return overlap_scores(p_cmp.detach().double().sum(dim=0).tolist(), t // config.select_block_size + 1, config)


def _choose(scores: Sequence[float], config: SparsityConfig) -> list[int]:
    """The n blocks of highest score in ascending order, forced ones first, ties to the lower number (Eq. 11-12)."""
    last = len(scores) - 1

    def rank(j: int) -> tuple[bool, float, int]:
        forced = j < config.num_init_blocks or j > last - config.num_local_blocks
        return (not forced, -scores[j], j)

    return sorted(sorted(range(len(scores)), key=rank)[: config.num_selected_blocks])


def _attend(query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of `[G, Dk]` over `[S, Dk]`, `[S, Dv]`."""
    return torch.softmax(scale * (query @ k.T), dim=-1) @ v
