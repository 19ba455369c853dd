"""Calls that have the prefill kernels compiled before the first request, and their memory measured by vLLM.

A kernel is compiled when it is first met, for the kinds of lengths that it meets; vLLM's own warm-up reaches decodes in its CUDA graphs only.
"""

from __future__ import annotations

import torch

from nsa.attention import BranchKV, LayerCache, Phi, nsa_attention, nsa_decode, plan_batch
from nsa.config import SparsityConfig

DECODES = ((1, 1), (16, 1), (64, 1), (512, 1), (1, 16), (8, 16), (32, 16))
"""Sequences of the decode calls and tokens of each: how a call is cut into programs depends on their numbers."""


def prefill_lengths(num_tokens: int, max_length: int) -> list[tuple[int, int, int]]:
    """(sequences, queries, keys of each) of the calls: long and short chunks, whole and cached sequences, one and several, and
    keys in powers of two up to the longest sequence."""
    long, short = max(1, min(num_tokens, max_length)), max(1, min(64, num_tokens, max_length))
    half = max(1, long // 2)
    calls = [
        (1, long, long),
        (2, half, half),
        (1, short, short),
        (4, short, short),
        (1, long, min(2 * long, max_length)),
        (2, half, min(4 * half, max_length)),
    ]
    powers = [2**k for k in range(7, max_length.bit_length())] + [max_length]
    return calls + [(4, short, max(short, min(128, max_length)))] + [(1, short, max(short, keys)) for keys in powers]


@torch.no_grad()
def warm_up(
    config: SparsityConfig, phi: Phi | None, *, num_heads: int, num_kv_heads: int, num_sets: int, key_dim: int, value_dim: int, page_size: int,
    dtype: torch.dtype, device: torch.device, num_tokens: int, max_length: int, record: bool,
) -> None:  # fmt: skip
    """Prefill once in every way, and decode few and many sequences: steps of at most `num_tokens` tokens, sequences of at most
    `max_length`.

    Args:
        phi: the compressor's tensors; None for the mean. record: selections are asked for.
    """
    from nsa.kernels.page_read import read_pages
    from nsa.kernels.page_write import write_pages
    from nsa.kernels.tiles import KernelPlan

    rows = num_sets * num_kv_heads
    raw = torch.zeros(2, 2, page_size, rows, max(key_dim, value_dim), dtype=dtype, device=device)
    cmp = torch.zeros(2, page_size // config.compress_stride, num_kv_heads, key_dim + value_dim, dtype=dtype, device=device)
    cache = LayerCache(raw, cmp, key_dim, value_dim, num_sets)
    for count, queries, keys in prefill_lengths(num_tokens, max_length):
        q = torch.zeros(count * queries, num_heads, key_dim, dtype=dtype, device=device)
        gates = torch.ones(*q.shape[:2], 3, device=device)
        k, v = (torch.zeros(count * keys, rows, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim))
        sets = list(zip(k.split(num_kv_heads, dim=1), v.split(num_kv_heads, dim=1), strict=True))
        kv = BranchKV(*sets) if num_sets == 3 else BranchKV(sets[0], sets[0], sets[0])
        ends = torch.arange(count + 1)
        plan = plan_batch(ends * queries, ends * keys, config=config, num_heads=num_heads, device=device, backend="triton")
        assert isinstance(plan, KernelPlan)
        table = torch.zeros(count, -(-keys // page_size), dtype=torch.int32, device=device)
        _, compressed = read_pages(cache, table, plan, raw=queries < keys, config=config)
        nsa_attention(q, kv, gates, phi=phi, config=config, cu_seqlens=plan, return_selection=record, compressed=compressed)
    tokens = torch.zeros(config.compress_block_size, dtype=torch.int64, device=device)
    for batch, together in DECODES:
        q = torch.zeros(batch, together, num_heads, key_dim, dtype=dtype, device=device)
        table = torch.zeros(batch, -(-max_length // page_size), dtype=torch.int32, device=device)
        gates, lengths = torch.ones(*q.shape[:3], 3, device=device), torch.ones(batch, dtype=torch.int32, device=device)
        nsa_decode(q, cache, table, lengths, gates, phi=phi, config=config, return_selection=record, backend="triton")
    write_pages(
        cache, raw[0, 0, :1, :, :key_dim].expand(len(tokens), -1, -1),
        raw[0, 1, :1, :, :value_dim].expand(len(tokens), -1, -1), torch.ones(1, 1, dtype=torch.int32, device=device),
        torch.arange(len(tokens), device=device), rows=tokens, complete=tokens[-1:] + len(tokens) - 1, phi=phi, config=config,
    )  # fmt: skip
