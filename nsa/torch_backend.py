"""The vectorised PyTorch backend: packed attention for training and prefill, gathered attention for decode.

Packed: sequences are padded on the right in groups (packing.py), branches are masked matrix products, long sequences are
cut into query chunks so that no more than `CHUNK_SCORES` scores of a branch exist at once. Time grows with T²/2 in the
selection branch (it masks instead of gathering): this backend is the CPU path and the fallback, not the fast path.
Decode gathers s/d + n·l' + w tokens a query and nothing else.

Shapes: N sequences, Hkv KV heads, G query heads of a KV head, Q queries, S keys, C compressed tokens, J blocks, E dims.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nsa.attention import BranchKV, CompressorWeights, KeyValue, LayerCache, Phi, replayed
from nsa.blocks import block_scores, num_blocks, num_compressed, select_blocks, selection_dtype, selection_mask, visible_compressed
from nsa.config import SparsityConfig
from nsa.packing import Packing, pad_all, unpad_all

CHUNK_SCORES = 2**26


def compress_blocks(blocks: torch.Tensor, weights: CompressorWeights | None) -> torch.Tensor:
    """φ over whole blocks: `[..., l, D]` → `[..., D]`; the mean where `weights` is None."""
    pooled = blocks.mean(dim=-2)
    if weights is None:
        return pooled
    hidden = functional.linear((blocks + weights.position.to(blocks.dtype)).flatten(-2), weights.up.to(blocks.dtype))
    return pooled + functional.linear(functional.silu(hidden), weights.down.to(blocks.dtype))


def _compress(tokens: torch.Tensor, weights: CompressorWeights | None, config: SparsityConfig) -> torch.Tensor:
    """`[N, H, S, D]` → `[N, H, C, D]` with C the number of complete blocks of S tokens.

    Neighbouring blocks share l − d tokens, so the sums over a block are taken over chunks of d tokens once and added up
    afterwards: no overlapping copies, neither forward nor backward."""
    count = num_compressed(tokens.shape[2], config)
    if count == 0:
        return tokens[:, :, :0]
    l, d = config.compress_block_size, config.compress_stride
    ratio = l // d
    chunks = tokens[:, :, : (count + ratio - 1) * d].unflatten(2, (-1, d))
    sums = chunks.sum(dim=3)
    pooled = sum((sums[:, :, j : j + count] for j in range(1, ratio)), start=sums[:, :, :count]) / l
    if weights is None:
        return pooled
    hidden_size, dim = weights.up.shape[0], tokens.shape[-1]
    up = weights.up.to(tokens.dtype).view(hidden_size, ratio, d * dim).transpose(0, 1).flatten(0, 1)
    parts = functional.linear(chunks.flatten(3), up).unflatten(-1, (ratio, hidden_size))
    hidden = functional.linear(weights.position.to(tokens.dtype).flatten(), weights.up.to(tokens.dtype))
    for j in range(ratio):
        hidden = hidden + parts[:, :, j : j + count, j]
    return pooled + functional.linear(functional.silu(hidden), weights.down.to(tokens.dtype))


def _softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """fp32 (or fp64) softmax over the masked-in entries; a row without any gives zeros."""
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1).masked_fill(~mask, 0.0)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Masked attention. q `[N, Hkv, G, Q, E]`, k/v `[N, Hkv, S, E]`, mask `[N, Hkv|1, Q, S]` (a row is never empty)."""
    num, heads, group, queries, _ = q.shape
    mask = mask.expand(num, heads, queries, k.shape[2]).flatten(0, 1)[:, None]
    rows = (num * heads, group, k.shape[2])
    out = functional.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1)[:, None].expand(*rows, -1), v.flatten(0, 1)[:, None].expand(*rows, -1), attn_mask=mask, scale=scale
    )
    return out.unflatten(0, (num, heads))


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compression(
    q: torch.Tensor, compressed: KeyValue, positions: torch.Tensor, count: int, config: SparsityConfig, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compression branch and the block scores it gives (Eq. 8-10).

    Args:
        q: `[N, Hkv, G, Q, Dk]`; compressed: k, v `[N, Hkv, C, …]`; positions: `[N, Q]`; count: number of blocks J.
    Returns:
        branch output `[N, Hkv, G, Q, Dv]` (zero where nothing is visible), scores `[N, Hkv, Q, J]` without gradient.
    """
    key, value = compressed
    group, queries = q.shape[2:4]
    scores_dtype = _score_dtype(q.dtype)
    logits = torch.matmul(q.flatten(2, 3).to(scores_dtype) * scale, key.to(scores_dtype).transpose(-1, -2))
    mask = visible_compressed(positions, key.shape[2], config)[:, None, None]
    probabilities = _softmax(logits.unflatten(2, (group, queries)), mask)
    out = torch.matmul(probabilities.flatten(2, 3).to(value.dtype), value).unflatten(2, (group, queries))
    with torch.no_grad():
        scores = block_scores(probabilities.detach().sum(dim=2), count, config)
    return out, scores


def _window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """Causal sliding-window attention of whole sequences: blocks of w queries against bands of 2w keys."""
    num, heads, _, length, _ = q.shape
    size = min(window, length)
    count = -(-length // size)
    pad = count * size - length
    bands = []
    for x in (k, v):
        blocks = functional.pad(x, (0, 0, size, pad)).unflatten(2, (count + 1, size))
        bands.append(torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3))
    q = functional.pad(q, (0, 0, 0, pad)).unflatten(3, (count, size)).permute(0, 1, 3, 2, 4, 5)
    row, column = torch.arange(size, device=q.device)[:, None], torch.arange(2 * size, device=q.device) - size
    band = (column <= row) & (column > row - window)
    first = column >= 0
    mask = torch.stack([band & first, band]) if count > 1 else (band & first)[None]
    mask = mask[torch.arange(count, device=q.device).clamp(max=1)]
    k, v = (x.flatten(1, 2) for x in bands)
    mask = mask.expand(heads, count, size, 2 * size).flatten(0, 1)[None].expand(num, -1, -1, -1)
    out = _attend(q.flatten(1, 2), k, v, mask, scale)
    return out.unflatten(1, (heads, count)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)[:, :, :, :length]


def _group_attention(
    q: torch.Tensor, kv: dict[str, KeyValue], gates: torch.Tensor, given: torch.Tensor | None, offsets: torch.Tensor, whole: bool, phi: Phi | None,
    config: SparsityConfig, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One padded group. q `[N, Q, Hq, Dk]`, k/v `[N, S, Hkv, …]`, gates `[N, Q, Hq, 3]`, given `[N, Q, Hkv, n]`.

    Returns out `[N, Q, Hq, Dv]` and the selection `[N, Q, Hkv, n]` (int64)."""
    num, queries, num_heads, _ = q.shape
    length, heads = kv["slc"][0].shape[1:3]
    group = num_heads // heads
    branch = {name: (key.transpose(1, 2), value.transpose(1, 2)) for name, (key, value) in kv.items()}
    q = q.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)
    compressed = (
        _compress(branch["cmp"][0], phi.k if phi else None, config),
        _compress(branch["cmp"][1], phi.v if phi else None, config),
    )
    weights = gates.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4).to(q.dtype)
    count = num_blocks(length, config)
    window = _window(q, *branch["win"], config.window_size, scale) if whole else None
    keys = torch.arange(length, device=q.device)
    step = max(1, min(queries, CHUNK_SCORES // (num * num_heads * length)))
    outs, selections = [], []
    for start in range(0, queries, step):
        part = slice(start, min(start + step, queries))
        positions = offsets[:, None] + torch.arange(part.start, part.stop, device=q.device)
        out_cmp, scores = _compression(q[:, :, :, part], compressed, positions, count, config, scale)
        chosen = select_blocks(scores, positions[:, None], config)
        chosen = replayed(chosen, None if given is None else given[:, part].transpose(1, 2))
        end = length if not whole else part.stop
        causal = keys[:end] <= positions[:, None, :, None]
        selected = selection_mask(chosen, count).repeat_interleave(config.select_block_size, dim=-1)[..., :end] & causal
        out_slc = _attend(q[:, :, :, part], branch["slc"][0][:, :, :end], branch["slc"][1][:, :, :end], selected, scale)
        if window is None:
            near = causal & (keys[:end] > positions[:, None, :, None] - config.window_size)
            out_win = _attend(q[:, :, :, part], branch["win"][0][:, :, :end], branch["win"][1][:, :, :end], near, scale)
        else:
            out_win = window[:, :, :, part]
        gate = weights[:, :, :, part]
        outs.append(gate[..., :1] * out_cmp + gate[..., 1:2] * out_slc + gate[..., 2:] * out_win)
        selections.append(chosen)
    out = torch.cat(outs, dim=3) if len(outs) > 1 else outs[0]
    selection = torch.cat(selections, dim=2) if len(selections) > 1 else selections[0]
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), selection.transpose(1, 2)


def packed_attention(
    q: torch.Tensor, kv: BranchKV, gates: torch.Tensor, *, phi: Phi | None, config: SparsityConfig, packing: Packing,
    selection: torch.Tensor | None, return_selection: bool, scale: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`nsa_attention` in plain PyTorch; see there."""
    if packing.num_queries != q.shape[0] or packing.num_keys != kv.slc[0].shape[0]:
        raise ValueError(f"cu_seqlens counts {packing.num_queries} queries and {packing.num_keys} keys, got {q.shape[0]} and {kv.slc[0].shape[0]}")
    if not packing.groups:
        empty = q.new_zeros(0, q.shape[1], kv.slc[1].shape[2])
        none = torch.zeros(0, kv.slc[0].shape[1], config.num_selected_blocks, dtype=torch.int16, device=q.device)
        return (empty, none) if return_selection else empty
    with torch.autocast(q.device.type, enabled=False):
        tensors: dict[int, list[torch.Tensor]] = {}
        for key, value in (kv.cmp, kv.slc, kv.win):
            for tensor in (key, value):
                if id(tensor) not in tensors:
                    tensors[id(tensor)] = pad_all(tensor, packing, keys=True)
        queries, gate_parts = pad_all(q, packing, keys=False), pad_all(gates, packing, keys=False)
        given = None if selection is None else pad_all(selection, packing, keys=False)
        outs, selections = [], []
        for index, group in enumerate(packing.groups):
            branch = {
                name: (tensors[id(pair[0])][index], tensors[id(pair[1])][index]) for name, pair in (("cmp", kv.cmp), ("slc", kv.slc), ("win", kv.win))
            }
            out, chosen = _group_attention(
                queries[index], branch, gate_parts[index], None if given is None else given[index], group.offsets, group.whole, phi, config, scale
            )
            outs.append(out)
            selections.append(chosen)
        out = unpad_all(outs, packing)
        if not return_selection:
            return out
        return out, unpad_all(selections, packing).to(selection_dtype(packing.max_key_length, config))


def _token_rows(cache: LayerCache, block_table: torch.Tensor, tokens: torch.Tensor, kind: int, branch_set: int) -> torch.Tensor:
    """Row numbers in `raw.view(-1, D)` of tokens `[B, m, Hkv, X]` of each KV head."""
    page_size, rows = cache.page_size, cache.raw.shape[3]
    table = block_table.long()[:, None, None].expand(*tokens.shape[:3], -1)
    pages = table.gather(-1, tokens // page_size)
    heads = torch.arange(cache.num_kv_heads, device=tokens.device)[:, None] + branch_set * cache.num_kv_heads
    return ((pages * 2 + kind) * page_size + tokens % page_size) * rows + heads


def _attend_tokens(
    q: torch.Tensor, cache: LayerCache, block_table: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, branch_set: int, scale: float
) -> torch.Tensor:
    """Attention of each query over its own tokens: q `[B, Hkv, G, m, Dk]`, tokens and mask `[B, m, Hkv, X]` → `[B, Hkv, G, m, Dv]`.

    Masked-out places are gathered from a token that is there, so nothing stale is read."""
    group, shape = q.shape[2], tokens.shape
    filled = torch.where(mask, tokens, 0)
    flat = cache.raw.view(-1, cache.raw.shape[-1])
    key, value = (
        flat.index_select(0, _token_rows(cache, block_table, filled, kind, branch_set).flatten()).view(-1, 1, shape[-1], flat.shape[-1])
        for kind in (0, 1)
    )
    queries = q.permute(0, 3, 1, 2, 4).flatten(0, 2)[:, None]
    visible = mask.reshape(-1, 1, 1, shape[-1]).expand(-1, 1, group, -1)
    out = functional.scaled_dot_product_attention(queries, key[..., : cache.key_dim], value[..., : cache.value_dim], attn_mask=visible, scale=scale)
    return out[:, 0].unflatten(0, shape[:3]).permute(0, 2, 3, 1, 4)


def paged_decode(
    q: torch.Tensor, cache: LayerCache, block_table: torch.Tensor, seq_lens: torch.Tensor, gates: torch.Tensor, *, config: SparsityConfig,
    selection: torch.Tensor | None, return_selection: bool, scale: float, out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`nsa_decode` in plain PyTorch; see there."""
    target = out
    num_new, num_heads = q.shape[1:3]
    heads, page_size = cache.num_kv_heads, cache.page_size
    group = num_heads // heads
    capacity = block_table.shape[1] * page_size
    positions = (seq_lens.long()[:, None] - num_new + torch.arange(num_new, device=q.device)).clamp(min=0)
    grouped = q.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)
    weights = gates.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)

    first = config.compress_block_size // config.compress_stride - 1
    pages = cache.cmp[block_table.long()].flatten(1, 2)[:, first : first + num_compressed(capacity, config)].transpose(1, 2)
    key, value = pages[..., : cache.key_dim], pages[..., cache.key_dim :]
    visible = visible_compressed(positions, pages.shape[2], config)
    value = value.masked_fill(~visible.any(dim=1)[:, None, :, None], 0.0)
    out, scores = _compression(grouped, (key, value), positions, num_blocks(capacity, config), config, scale)
    chosen = replayed(select_blocks(scores, positions[:, None], config), None if selection is None else selection.transpose(1, 2))

    at = positions[:, :, None, None]
    block_tokens = chosen.transpose(1, 2)[..., None] * config.select_block_size + torch.arange(config.select_block_size, device=q.device)
    window = min(config.window_size, capacity)
    window_tokens = (at - (window - 1) + torch.arange(window, device=q.device)).expand(-1, -1, heads, -1)
    out = weights[..., :1].to(out.dtype) * out
    for index, branch_set, tokens in ((1, cache.set_index("slc"), block_tokens.flatten(-2)), (2, cache.set_index("win"), window_tokens)):
        near = _attend_tokens(grouped, cache, block_table, tokens, (tokens >= 0) & (tokens <= at), branch_set, scale)
        out = out + weights[..., index : index + 1].to(out.dtype) * near
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
    out = out if target is None else target.copy_(out)
    if not return_selection:
        return out
    return out, chosen.transpose(1, 2).to(selection_dtype(capacity, config))
