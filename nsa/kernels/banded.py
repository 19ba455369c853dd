"""Attention in which each query sees one contiguous range of keys: the compression branch and the sliding window.

Key i of a band ends at token i·stride + offset of its sequence and is visible from there on, for `window` tokens (0: for
ever): compressed token i has stride d and offset l − 1, a raw key stride 1, offset 0 and window w. One set of kernels in
the manner of FlashAttention-2 serves both. A tile's rows are queries × the heads of one KV head (row r is query r // G,
head r % G), so K and V are read once for a whole group; only tiles on the border of the range are masked.

Backward: dq by query tiles; dk and dv by key tiles that stay in place while the queries that see them pass by. A long
sequence's queries are cut into chunks (their number depends on its length alone) whose partial sums are added in order.
Every sum has one order that no other sequence changes: results are deterministic and batch-invariant.

Leaves out autograd (packed.py), the pooling that makes compressed tokens (compress.py) and the gates' gradients (gating.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.launch import LOG2_E, dot_precision, padded
from nsa.kernels.tiles import KernelPlan

MAX_CHUNKS = tl.constexpr(16)
"""At most this many partial sums of a key's gradient."""
MIN_CHUNK = 1024
"""Queries of a sequence that are never split."""


@dataclass(frozen=True, slots=True)
class Band:
    """Which keys a query sees: compressed tokens complete at its position, or the last w raw keys."""

    kind: Literal["compression", "window"]
    plan: KernelPlan
    config: SparsityConfig

    @property
    def key_ends(self) -> torch.Tensor:
        """int32 `[N+1]`: where each sequence's keys of this band begin and end."""
        return self.plan.compressed_ends if self.kind == "compression" else self.plan.key_ends

    @property
    def geometry(self) -> dict[str, int]:
        """The kernels' stride, offset and window (0: unlimited)."""
        if self.kind == "compression":
            return {"STRIDE": self.config.compress_stride, "OFFSET": self.config.compress_block_size - 1, "WINDOW": 0}
        return {"STRIDE": 1, "OFFSET": 0, "WINDOW": self.config.window_size}

    def key_tiles(self, size: int) -> torch.Tensor:
        """int32 `[tiles, 2]`: (sequence, first key) of tiles of `size` keys."""
        return self.plan.compressed_tiles(size) if self.kind == "compression" else self.plan.key_tiles(size)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile sizes and launch settings of one kernel: rows (queries × heads), keys, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_blocks(kernel: Literal["forward", "dq", "dkdv"], width: int, dtype: torch.dtype) -> Blocks:
    """The settings for head dims up to `width` (a power of two) and a dtype (forward and dq at 128 as swept on an H100).

    Shorter pipelines of dk and dv leave no spills in the loops (`cuobjdump`, Triton 3.6)."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2 if width <= 64 else 1)
    if kernel == "forward":
        return Blocks(64, 64, 4, 3) if width <= 128 else Blocks(128, 64, 8, 2)
    if kernel == "dq":
        return Blocks(128, 64, 8, 3) if width <= 128 else Blocks(64, 64, 8, 1)
    return Blocks(64, 128, 8, 2) if width <= 128 else Blocks(32, 64, 8, 2)


@triton.jit
def load_rows(base, first, stride, count, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """`[BLOCK, WIDTH]`: rows first … of a tensor that has `count` of them; zeros where there is none."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if MASKED:
        mask = ((rows + first >= 0) & (rows + first < count))[:, None]
        if DIM != WIDTH:
            mask = mask & (dims < DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif DIM != WIDTH:
        tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def row_offsets(stride_token, stride_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """int32 `[ROWS]`: where a tile's rows lie, counted from its first query's first head."""
    rows = tl.arange(0, ROWS)
    return (rows // GROUP) * stride_token + (rows % GROUP) * stride_head


@triton.jit
def valid_rows(first, end, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """bool `[ROWS]`: rows of a tile of QUERIES queries from `first` on that are queries before `end`."""
    query = tl.arange(0, ROWS) // GROUP
    return (query < QUERIES) & (first + query < end)


@triton.jit
def load_tile(base, offsets, valid, DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """`[ROWS, WIDTH]` of a query-sided tensor; zeros in rows that are not valid."""
    dims = tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=valid[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM != WIDTH:
        tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def key_range(first, last, num_keys, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Keys that queries at positions first … last see: begin, end of the masked tiles, end of the full ones, end."""
    end = tl.minimum(tl.maximum(last - OFFSET + STRIDE, 0) // STRIDE, num_keys)
    seen_by_all = tl.minimum(tl.maximum(first - OFFSET + STRIDE, 0) // STRIDE, num_keys)
    begin, masked_end = 0, 0
    if WINDOW > 0:
        begin = first - WINDOW + 1
        begin = tl.where(begin < 0, -(tl.maximum(-begin, 0) % BLOCK), begin)
        masked_end = begin + tl.cdiv(tl.maximum(last - WINDOW + 1, 0) - begin, BLOCK) * BLOCK
    full_end = tl.maximum(masked_end, begin + (seen_by_all - begin) // BLOCK * BLOCK)
    return begin, masked_end, full_end, end


@triton.jit
def visible(keys, positions, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr):
    """bool: does the query at each position see each key (shapes broadcast)."""
    ends = keys * STRIDE + OFFSET
    seen = (keys >= 0) & (ends <= positions)
    if WINDOW > 0:
        seen = seen & (ends > positions - WINDOW)
    return seen


@triton.jit
def attend(
    acc, row_sum, row_max, q, k, v, stride_k, stride_v, begin, end, positions, num_keys, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax (base 2) of a query tile over the key tiles from `begin` to `end`."""
    for start in range(begin, end, BLOCK):
        key = load_rows(k, start, stride_k, num_keys, DK, WIDTH_K, BLOCK, MASKED)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            seen = visible(start + tl.arange(0, BLOCK)[None, :], positions[:, None], STRIDE, OFFSET, WINDOW)
            scores = tl.where(seen, scores * scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            probabilities = tl.exp2(scores - shift[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            shift = new_max
            probabilities = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(probabilities, 1)
        acc = acc * decay[:, None]
        value = load_rows(v, start, stride_v, num_keys, DV, WIDTH_V, BLOCK, MASKED)
        acc = tl.dot(probabilities.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def forward_kernel(
    Q, K, V, Gate, Out, Branch, Lse, Tiles, QueryEnds, TokenEnds, KeyEnds,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_o, stride_oh, stride_b, stride_bh, stride_l, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BORDER: tl.constexpr,
    ACCUMULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one KV head: out (+)= gate · o, branch output and LSE."""
    sequence, start = tl.load(Tiles + 2 * tl.program_id(0)), tl.load(Tiles + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    first_query, first_key = tl.load(QueryEnds + sequence), tl.load(KeyEnds + sequence)
    num_queries, num_keys = tl.load(QueryEnds + sequence + 1) - first_query, tl.load(KeyEnds + sequence + 1) - first_key
    ahead = tl.load(TokenEnds + sequence + 1) - tl.load(TokenEnds + sequence) - num_queries
    row = tl.cast(first_query + start, tl.int64)
    valid = valid_rows(start, num_queries, GROUP, QUERIES, ROWS)
    positions = ahead + start + tl.arange(0, ROWS) // GROUP
    q = load_tile(Q + row * stride_q + head * GROUP * stride_qh, row_offsets(stride_q, stride_qh, GROUP, ROWS), valid, DK, WIDTH_K, True)
    k = K + tl.cast(first_key, tl.int64) * stride_k + head * stride_kh
    v = V + tl.cast(first_key, tl.int64) * stride_v + head * stride_vh
    last = ahead + tl.minimum(start + QUERIES, num_queries) - 1
    begin, masked_end, full_end, end = key_range(ahead + start, last, num_keys, STRIDE, OFFSET, WINDOW, KEYS)

    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    if WINDOW > 0:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, k, v, stride_k, stride_v, begin, masked_end, positions, num_keys, scale,
            DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, True, PRECISION,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k, v, stride_k, stride_v, masked_end, full_end, positions, num_keys, scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, False, PRECISION,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k, v, stride_k, stride_v, full_end, end, positions, num_keys, scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, BORDER, True, PRECISION,
    )  # fmt: skip

    some = row_sum > 0
    acc = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, (row_max + tl.log2(tl.where(some, row_sum, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(Lse + row * stride_l + head * GROUP + row_offsets(stride_l, 1, GROUP, ROWS), lse, mask=valid)
    dims = tl.arange(0, WIDTH_V)
    stored = valid[:, None] & (dims < DV)[None, :]
    if KEEP:
        branch = Branch + row * stride_b + head * GROUP * stride_bh + row_offsets(stride_b, stride_bh, GROUP, ROWS)[:, None] + dims[None, :]
        tl.store(branch, acc.to(Branch.dtype.element_ty), mask=stored)
    gate = tl.load(Gate + row * stride_g + head * GROUP * stride_gh + row_offsets(stride_g, stride_gh, GROUP, ROWS), mask=valid, other=0.0)
    out = Out + row * stride_o + head * GROUP * stride_oh + row_offsets(stride_o, stride_oh, GROUP, ROWS)[:, None] + dims[None, :]
    acc = acc * gate.to(tl.float32)[:, None]
    if ACCUMULATE:
        acc += tl.load(out, mask=stored, other=0.0).to(tl.float32)
    tl.store(out, acc.to(Out.dtype.element_ty), mask=stored)


@triton.jit
def gather_dq(
    acc, q, d_out, shift, delta, k, v, stride_k, stride_v, begin, end, positions, num_keys, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a query tile from the key tiles from `begin` to `end` (shift and delta: see `dq_kernel`)."""
    for start in range(begin, end, BLOCK):
        key = load_rows(k, start, stride_k, num_keys, DK, WIDTH_K, BLOCK, MASKED)
        value = load_rows(v, start, stride_v, num_keys, DV, WIDTH_V, BLOCK, MASKED)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale - shift[:, None]
        if MASKED:
            seen = visible(start + tl.arange(0, BLOCK)[None, :], positions[:, None], STRIDE, OFFSET, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        probabilities = tl.exp2(scores)
        d_scores = probabilities * (tl.dot(d_out, tl.trans(value), input_precision=PRECISION) - delta[:, None])
        acc = tl.dot(d_scores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_kernel(
    Q, K, V, DOut, Gate, Lse, Delta, DQ, Before, Stats, Tiles, QueryEnds, TokenEnds, KeyEnds,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_do, stride_doh, stride_g, stride_gh, stride_l, stride_lh,
    stride_d, stride_dh, stride_dq, stride_dqh, stride_b, stride_bh, stride_s, stats_size, score_scale, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BORDER: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one query tile of one KV head, Before added where ACCUMULATE; writes the rows' statistics for `dkdv_kernel`.

    The gate is folded into them: gate · p = exp2(score − shift) with shift = lse − log2(gate), and the gradient of a score
    is that times <d_out, v> − delta / gate. A gate that is not positive counts as 0, which gives gradients of 0.
    """
    sequence, start = tl.load(Tiles + 2 * tl.program_id(0)), tl.load(Tiles + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    first_query, first_key = tl.load(QueryEnds + sequence), tl.load(KeyEnds + sequence)
    num_queries, num_keys = tl.load(QueryEnds + sequence + 1) - first_query, tl.load(KeyEnds + sequence + 1) - first_key
    ahead = tl.load(TokenEnds + sequence + 1) - tl.load(TokenEnds + sequence) - num_queries
    row, group = tl.cast(first_query + start, tl.int64), head * GROUP
    valid = valid_rows(start, num_queries, GROUP, QUERIES, ROWS)
    positions = ahead + start + tl.arange(0, ROWS) // GROUP
    q = load_tile(Q + row * stride_q + group * stride_qh, row_offsets(stride_q, stride_qh, GROUP, ROWS), valid, DK, WIDTH_K, True)
    d_out = load_tile(DOut + row * stride_do + group * stride_doh, row_offsets(stride_do, stride_doh, GROUP, ROWS), valid, DV, WIDTH_V, True)
    lse = tl.load(Lse + row * stride_l + group * stride_lh + row_offsets(stride_l, stride_lh, GROUP, ROWS), mask=valid, other=float("-inf"))
    delta = tl.load(Delta + row * stride_d + group * stride_dh + row_offsets(stride_d, stride_dh, GROUP, ROWS), mask=valid, other=0.0)
    gate = tl.load(Gate + row * stride_g + group * stride_gh + row_offsets(stride_g, stride_gh, GROUP, ROWS), mask=valid, other=0.0).to(tl.float32)
    counts = (gate > 0) & (lse > float("-inf"))
    gate = tl.where(counts, gate, 1.0)
    shift = tl.where(counts, lse * 1.4426950408889634 - tl.log2(gate), float("inf"))
    delta = tl.where(counts, delta / gate, 0.0)
    stats = Stats + row * stride_s + group + row_offsets(stride_s, 1, GROUP, ROWS)
    tl.store(stats, shift, mask=valid)
    tl.store(stats + stats_size, delta, mask=valid)
    k = K + tl.cast(first_key, tl.int64) * stride_k + head * stride_kh
    v = V + tl.cast(first_key, tl.int64) * stride_v + head * stride_vh
    last = ahead + tl.minimum(start + QUERIES, num_queries) - 1
    begin, masked_end, full_end, end = key_range(ahead + start, last, num_keys, STRIDE, OFFSET, WINDOW, KEYS)

    acc = tl.zeros([ROWS, WIDTH_K], tl.float32)
    if WINDOW > 0:
        acc = gather_dq(
            acc, q, d_out, shift, delta, k, v, stride_k, stride_v, begin, masked_end, positions, num_keys, score_scale,
            DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, True, PRECISION,
        )  # fmt: skip
    acc = gather_dq(
        acc, q, d_out, shift, delta, k, v, stride_k, stride_v, masked_end, full_end, positions, num_keys, score_scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, False, PRECISION,
    )  # fmt: skip
    acc = gather_dq(
        acc, q, d_out, shift, delta, k, v, stride_k, stride_v, full_end, end, positions, num_keys, score_scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, BORDER, True, PRECISION,
    )  # fmt: skip

    dims = tl.arange(0, WIDTH_K)
    stored = valid[:, None] & (dims < DK)[None, :]
    acc = acc * scale
    if ACCUMULATE:
        before = Before + row * stride_b + group * stride_bh + row_offsets(stride_b, stride_bh, GROUP, ROWS)[:, None] + dims[None, :]
        acc += tl.load(before, mask=stored, other=0.0)
    d_q = DQ + row * stride_dq + group * stride_dqh + row_offsets(stride_dq, stride_dqh, GROUP, ROWS)[:, None] + dims[None, :]
    tl.store(d_q, acc.to(DQ.dtype.element_ty), mask=stored)


@triton.jit
def query_range(
    first,
    last,
    ahead,
    num_queries,
    chunk,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Queries of a chunk that see keys first … last: begin, end of the masked tiles, end of the full ones, end.

    SPLIT is the fewest queries of a chunk; 0: one chunk holds all."""
    chunk_begin, chunk_end = 0, num_queries
    if SPLIT > 0:
        size = tl.maximum(tl.cdiv(tl.cdiv(num_queries, MAX_CHUNKS), 64) * 64, SPLIT)
        chunk_begin, chunk_end = chunk * size, tl.minimum((chunk + 1) * size, num_queries)
    begin = tl.maximum(first * STRIDE + OFFSET - ahead, chunk_begin)
    end, full_stop = chunk_end, chunk_end
    if WINDOW > 0:
        end = tl.minimum(end, last + WINDOW - ahead)
        full_stop = tl.minimum(end, first + WINDOW - ahead)
    seeing_all = tl.maximum(last * STRIDE + OFFSET - ahead, begin)
    masked_end = begin + tl.cdiv(seeing_all - begin, QUERIES) * QUERIES
    full_end = masked_end + tl.maximum(full_stop - masked_end, 0) // QUERIES * QUERIES
    return begin, tl.minimum(masked_end, tl.maximum(end, begin)), tl.minimum(full_end, tl.maximum(end, begin)), end


@triton.jit
def gather_dkdv(
    d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stride_s, stats_size, begin, end, limit,
    ahead, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a key tile from the query tiles from `begin` to `end`; queries from `limit` on do not count."""
    for start in range(begin, end, QUERIES):
        row = tl.cast(start, tl.int64)
        valid = valid_rows(start, limit, GROUP, QUERIES, ROWS)
        query = load_tile(q + row * stride_q, row_offsets(stride_q, stride_qh, GROUP, ROWS), valid, DK, WIDTH_K, MASKED or QUERIES * GROUP != ROWS)
        d_rows = load_tile(
            d_out + row * stride_do, row_offsets(stride_do, stride_doh, GROUP, ROWS), valid, DV, WIDTH_V, MASKED or QUERIES * GROUP != ROWS
        )
        at = stats + row * stride_s + row_offsets(stride_s, 1, GROUP, ROWS)
        shift = tl.load(at, mask=valid, other=float("inf"))
        delta = tl.load(at + stats_size, mask=valid, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale - shift[None, :]
        if MASKED:
            positions = ahead + start + tl.arange(0, ROWS) // GROUP
            scores = tl.where(visible(keys[:, None], positions[None, :], STRIDE, OFFSET, WINDOW), scores, float("-inf"))
        probabilities = tl.exp2(scores)
        d_value = tl.dot(probabilities.to(d_rows.dtype), d_rows, d_value, input_precision=PRECISION)
        d_scores = probabilities * (tl.dot(value, tl.trans(d_rows), input_precision=PRECISION) - delta[None, :])
        d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def dkdv_kernel(
    Q, K, V, DOut, Stats, DKey, DValue, Tiles, QueryEnds, TokenEnds, KeyEnds,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_do, stride_doh, stride_s, stats_size,
    stride_dk, stride_dkh, stride_dkc, stride_dv, stride_dvh, stride_dvc, score_scale, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile of one KV head from one chunk of the queries."""
    sequence, start = tl.load(Tiles + 2 * tl.program_id(0)), tl.load(Tiles + 2 * tl.program_id(0) + 1)
    head, chunk = tl.program_id(1), tl.program_id(2)
    first_query, first_key = tl.load(QueryEnds + sequence), tl.load(KeyEnds + sequence)
    num_queries, num_keys = tl.load(QueryEnds + sequence + 1) - first_query, tl.load(KeyEnds + sequence + 1) - first_key
    ahead = tl.load(TokenEnds + sequence + 1) - tl.load(TokenEnds + sequence) - num_queries
    last = tl.minimum(start + KEYS, num_keys) - 1
    begin, masked_end, full_end, end = query_range(start, last, ahead, num_queries, chunk, STRIDE, OFFSET, WINDOW, QUERIES, SPLIT)
    if SPLIT > 0:  # noqa: SIM102 (one is known when compiled, the other is not)
        if begin >= end:
            return
    base = tl.cast(first_key, tl.int64)
    key = load_rows(K + base * stride_k + head * stride_kh, start, stride_k, num_keys, DK, WIDTH_K, KEYS, True)
    value = load_rows(V + base * stride_v + head * stride_vh, start, stride_v, num_keys, DV, WIDTH_V, KEYS, True)
    keys = start + tl.arange(0, KEYS)
    row, group = tl.cast(first_query, tl.int64), head * GROUP
    q, d_out, stats = Q + row * stride_q + group * stride_qh, DOut + row * stride_do + group * stride_doh, Stats + row * stride_s + group

    d_key, d_value = tl.zeros([KEYS, WIDTH_K], tl.float32), tl.zeros([KEYS, WIDTH_V], tl.float32)
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stride_s, stats_size, begin, masked_end,
        end, ahead, score_scale, DK, DV, WIDTH_K, WIDTH_V, GROUP, STRIDE, OFFSET, WINDOW, ROWS, QUERIES, True, PRECISION,
    )  # fmt: skip
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stride_s, stats_size, masked_end, full_end,
        end, ahead, score_scale, DK, DV, WIDTH_K, WIDTH_V, GROUP, STRIDE, OFFSET, WINDOW, ROWS, QUERIES, False, PRECISION,
    )  # fmt: skip
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stride_s, stats_size, full_end, end,
        end, ahead, score_scale, DK, DV, WIDTH_K, WIDTH_V, GROUP, STRIDE, OFFSET, WINDOW, ROWS, QUERIES, True, PRECISION,
    )  # fmt: skip

    rows, dims_k, dims_v = base + keys, tl.arange(0, WIDTH_K), tl.arange(0, WIDTH_V)
    d_k = DKey + tl.cast(chunk, tl.int64) * stride_dkc + rows[:, None] * stride_dk + head * stride_dkh + dims_k[None, :]
    d_v = DValue + tl.cast(chunk, tl.int64) * stride_dvc + rows[:, None] * stride_dv + head * stride_dvh + dims_v[None, :]
    present = (keys < num_keys)[:, None]
    tl.store(d_k, (d_key * scale).to(DKey.dtype.element_ty), mask=present & (dims_k < DK)[None, :])
    tl.store(d_v, d_value.to(DValue.dtype.element_ty), mask=present & (dims_v < DV)[None, :])


@triton.jit
def add_chunks_kernel(
    Parts, Out, Tiles, QueryEnds, TokenEnds, KeyEnds, stride_p, stride_ph, stride_pc, stride_o, stride_oh, num_chunks,
    DIM: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Adds up, in order, the partial sums that `dkdv_kernel` wrote for one key tile."""
    sequence, start = tl.load(Tiles + 2 * tl.program_id(0)), tl.load(Tiles + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    first_key = tl.load(KeyEnds + sequence)
    num_queries, num_keys = tl.load(QueryEnds + sequence + 1) - tl.load(QueryEnds + sequence), tl.load(KeyEnds + sequence + 1) - first_key
    ahead = tl.load(TokenEnds + sequence + 1) - tl.load(TokenEnds + sequence) - num_queries
    last = tl.minimum(start + KEYS, num_keys) - 1
    keys, dims = start + tl.arange(0, KEYS), tl.arange(0, WIDTH)
    rows = tl.cast(first_key, tl.int64) + keys
    mask = (keys < num_keys)[:, None] & (dims < DIM)[None, :]
    acc = tl.zeros([KEYS, WIDTH], tl.float32)
    for chunk in range(num_chunks):
        begin, _, _, end = query_range(start, last, ahead, num_queries, chunk, STRIDE, OFFSET, WINDOW, QUERIES, SPLIT)
        if begin < end:
            part = Parts + tl.cast(chunk, tl.int64) * stride_pc + rows[:, None] * stride_p + head * stride_ph + dims[None, :]
            acc += tl.load(part, mask=mask, other=0.0)
    out = Out + rows[:, None] * stride_o + head * stride_oh + dims[None, :]
    tl.store(out, acc.to(Out.dtype.element_ty), mask=mask)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_settings(
    kernel: Literal["forward", "dq", "dkdv"], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band
) -> tuple[dict[str, int], dict[str, int | str]]:
    """Launch settings (num_warps, num_stages) and the constants that describe a kernel's tiles."""
    key_dim, value_dim, group = k.shape[2], v.shape[2], q.shape[1] // k.shape[1]
    width_k, width_v = padded(key_dim), padded(value_dim)
    blocks = choose_blocks(kernel, max(width_k, width_v), q.dtype)
    rows = max(blocks.rows, triton.next_power_of_2(group))
    queries = rows // group
    constants: dict[str, int | str] = {"DK": key_dim, "DV": value_dim, "WIDTH_K": width_k, "WIDTH_V": width_v, "GROUP": group, **band.geometry}
    constants |= {"ROWS": rows, "QUERIES": queries, "KEYS": blocks.keys}
    if kernel != "dkdv":
        rest = band.config.window_size % blocks.keys + queries - 1
        narrow = band.kind == "window" and rest <= blocks.keys // 2
        constants["BORDER"] = padded(rest) if narrow else blocks.keys
    constants["PRECISION"] = dot_precision()
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}, constants


def banded_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band,
    *, scale: float, gate: torch.Tensor, out: torch.Tensor, accumulate: bool, keep: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Attention over a band; `gate · o` is written to `out`, or added to it.

    Args:
        q: `[T, Hq, Dk]`; k, v: `[K, Hkv, Dk]` and `[K, Hkv, Dv]`, the band's keys, all of one dtype. Any strides.
        scale: factor on q·k, > 0.
        gate: `[T, Hq]`, any strides and dtype.
        out: `[T, Hq, Dv]`, last dimension contiguous.
        accumulate: add to `out` instead of overwriting it. keep: also return o without the gate.
    Returns:
        o `[T, Hq, Dv]` in q's dtype or None, and fp32 `[T, Hq]` natural log of Σ exp(scale·q·k), −inf where a query sees
        no key (its o is 0).
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    branch = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device) if keep else None
    launch, constants = tile_settings("forward", q, k, v, band)
    tiles = band.plan.query_tiles(int(constants["QUERIES"]))
    if tiles.shape[0]:
        kept = out if branch is None else branch
        forward_kernel[(tiles.shape[0], k.shape[1])](
            q, k, v, gate, out, kept, lse, tiles, band.plan.query_ends, band.plan.key_ends, band.key_ends,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate.stride(), *out.stride()[:2], *kept.stride()[:2], lse.stride(0), scale * LOG2_E,
            ACCUMULATE=accumulate, KEEP=keep, **constants, **launch,
        )  # fmt: skip
    return branch, lse


def banded_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor, band: Band,
    *, scale: float, dq: torch.Tensor, dq_before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `banded_forward`; the branch's own output gradient is gate · d_out.

    Args:
        d_out: `[T, Hq, Dv]`, gradient of the gated sum of the branches, in q's dtype. lse: as returned by the forward.
        delta: fp32 `[T, Hq]`, gate · <d_out, o>. gate: `[T, Hq]`. scale: as in the forward.
        dq: `[T, Hq, Dk]` in any dtype, last dimension contiguous: becomes this branch's part, plus `dq_before` (fp32, the
            same shape, last dimension contiguous; may be `dq` itself) where given.
    Returns:
        dk, dv in k's dtype and shapes; zero where no query sees a key.
    """
    d_out, q, k, v = rows_contiguous(d_out), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    plan, ends, num_heads = band.plan, (band.plan.query_ends, band.plan.key_ends, band.key_ends), k.shape[1]
    stats = torch.empty(2, *q.shape[:2], dtype=torch.float32, device=q.device)
    launch, constants = tile_settings("dq", q, k, v, band)
    tiles = plan.query_tiles(int(constants["QUERIES"]))
    before = dq if dq_before is None else dq_before
    if tiles.shape[0]:
        dq_kernel[(tiles.shape[0], num_heads)](
            q, k, v, d_out, gate, lse, delta, dq, before, stats, tiles, *ends,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], *gate.stride(), *lse.stride(), *delta.stride(), *dq.stride()[:2],
            *before.stride()[:2], stats.stride(1), stats.stride(0), scale * LOG2_E, scale, ACCUMULATE=dq_before is not None, **constants, **launch,
        )  # fmt: skip
    d_key, d_value = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch, constants = tile_settings("dkdv", q, k, v, band)
    tiles = band.key_tiles(int(constants["KEYS"]))
    if not tiles.shape[0]:
        return d_key, d_value
    num_chunks = min(MAX_CHUNKS.value, triton.cdiv(plan.max_key_length, MIN_CHUNK)) if band.kind == "compression" else 1
    parts = (d_key[None], d_value[None])
    if num_chunks > 1:
        parts = tuple(torch.empty(num_chunks, *x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    dkdv_kernel[(tiles.shape[0], num_heads, num_chunks)](
        q, k, v, d_out, stats, *parts, tiles, *ends,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], stats.stride(1), stats.stride(0),
        *(step for part in parts for step in (part.stride(1), part.stride(2), part.stride(0))), scale * LOG2_E, scale,
        SPLIT=MIN_CHUNK if num_chunks > 1 else 0, **constants, **launch,
    )  # fmt: skip
    if num_chunks > 1:
        for part, total, name in zip(parts, (d_key, d_value), ("K", "V"), strict=True):
            add_chunks_kernel[(tiles.shape[0], num_heads)](
                part, total, tiles, *ends, part.stride(1), part.stride(2), part.stride(0), *total.stride()[:2], num_chunks,
                DIM=constants[f"D{name}"], WIDTH=constants[f"WIDTH_{name}"], **band.geometry, QUERIES=constants["QUERIES"], KEYS=constants["KEYS"],
                SPLIT=MIN_CHUNK, num_warps=8,
            )  # fmt: skip
    return d_key, d_value
