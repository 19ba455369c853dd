"""Triton kernels of attention in which each query sees one contiguous range of keys (banded.py says which, and launches them).

One set of kernels in the manner of FlashAttention-2 for both bands. A tile's rows are queries × the heads of one KV head
(row r is query r // G, head r % G), so K and V are read once for a whole group; only tiles on the border of the range are
masked. They run on every GPU that Triton supports and in its interpreter, with any head dims, group size and strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_CHUNKS = tl.constexpr(16)
"""At most this many partial sums of a key's gradient."""


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
def add_exactly(total, lost, x):
    """total + x by Kahan's summation; `lost` is what rounding has added too much so far."""
    x -= lost
    grown = total + x
    return grown, (grown - total) - x


@triton.jit
def attend(
    state, q, k, v, stride_k, stride_v, begin, end, positions, num_keys, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax (base 2) of a query tile over the key tiles from `begin` to `end`.

    In fp32 sums over tiles are compensated: a row may have 65,536 compressed tokens, and what the sums lose there comes back in
    gradients of φ, most of whose parts cancel."""
    acc, acc_lost, row_sum, sum_lost, row_max = state
    EXACT: tl.constexpr = q.dtype == tl.float32
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
        row_sum, acc = row_sum * decay, acc * decay[:, None]
        value = load_rows(v, start, stride_v, num_keys, DV, WIDTH_V, BLOCK, MASKED)
        if EXACT:
            row_sum, sum_lost = add_exactly(row_sum, sum_lost * decay, tl.sum(probabilities, 1))
            acc, acc_lost = add_exactly(acc, acc_lost * decay[:, None], tl.dot(probabilities, value, input_precision=PRECISION))
        else:
            row_sum += tl.sum(probabilities, 1)
            acc = tl.dot(probabilities.to(value.dtype), value, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, acc_lost, row_sum, sum_lost, row_max


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

    nothing, none = tl.zeros([ROWS, WIDTH_V], tl.float32), tl.zeros([ROWS], tl.float32)
    state = (nothing, nothing, none, none, tl.full([ROWS], float("-inf"), tl.float32))
    if WINDOW > 0:
        state = attend(
            state, q, k, v, stride_k, stride_v, begin, masked_end, positions, num_keys, scale,
            DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, True, PRECISION,
        )  # fmt: skip
    state = attend(
        state, q, k, v, stride_k, stride_v, masked_end, full_end, positions, num_keys, scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, False, PRECISION,
    )  # fmt: skip
    state = attend(
        state, q, k, v, stride_k, stride_v, full_end, end, positions, num_keys, scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, BORDER, True, PRECISION,
    )  # fmt: skip

    acc, _, row_sum, _, row_max = state
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
    state, q, d_out, shift, delta, k, v, stride_k, stride_v, begin, end, positions, num_keys, scale,
    DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    STRIDE: tl.constexpr, OFFSET: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a query tile from the key tiles from `begin` to `end` (shift and delta: see `dq_kernel`; exactness as in `attend`)."""
    acc, lost = state
    EXACT: tl.constexpr = q.dtype == tl.float32
    for start in range(begin, end, BLOCK):
        key = load_rows(k, start, stride_k, num_keys, DK, WIDTH_K, BLOCK, MASKED)
        value = load_rows(v, start, stride_v, num_keys, DV, WIDTH_V, BLOCK, MASKED)
        scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale - shift[:, None]
        if MASKED:
            seen = visible(start + tl.arange(0, BLOCK)[None, :], positions[:, None], STRIDE, OFFSET, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        probabilities = tl.exp2(scores)
        d_scores = probabilities * (tl.dot(d_out, tl.trans(value), input_precision=PRECISION) - delta[:, None])
        if EXACT:
            acc, lost = add_exactly(acc, lost, tl.dot(d_scores, key, input_precision=PRECISION))
        else:
            acc = tl.dot(d_scores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc, lost


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
    stats = Stats + tl.cast(head, tl.int64) * stride_s + row * GROUP + tl.arange(0, ROWS)
    tl.store(stats, shift, mask=valid)
    tl.store(stats + stats_size, delta, mask=valid)
    k = K + tl.cast(first_key, tl.int64) * stride_k + head * stride_kh
    v = V + tl.cast(first_key, tl.int64) * stride_v + head * stride_vh
    last = ahead + tl.minimum(start + QUERIES, num_queries) - 1
    begin, masked_end, full_end, end = key_range(ahead + start, last, num_keys, STRIDE, OFFSET, WINDOW, KEYS)

    nothing = tl.zeros([ROWS, WIDTH_K], tl.float32)
    state = (nothing, nothing)
    if WINDOW > 0:
        state = gather_dq(
            state, q, d_out, shift, delta, k, v, stride_k, stride_v, begin, masked_end, positions, num_keys, score_scale,
            DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, True, PRECISION,
        )  # fmt: skip
    state = gather_dq(
        state, q, d_out, shift, delta, k, v, stride_k, stride_v, masked_end, full_end, positions, num_keys, score_scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, KEYS, False, PRECISION,
    )  # fmt: skip
    state = gather_dq(
        state, q, d_out, shift, delta, k, v, stride_k, stride_v, full_end, end, positions, num_keys, score_scale,
        DK, DV, WIDTH_K, WIDTH_V, STRIDE, OFFSET, WINDOW, BORDER, True, PRECISION,
    )  # fmt: skip

    dims = tl.arange(0, WIDTH_K)
    stored = valid[:, None] & (dims < DK)[None, :]
    acc = state[0] * scale
    if ACCUMULATE:
        before = Before + row * stride_b + group * stride_bh + row_offsets(stride_b, stride_bh, GROUP, ROWS)[:, None] + dims[None, :]
        acc += tl.load(before, mask=stored, other=0.0)
    d_q = DQ + row * stride_dq + group * stride_dqh + row_offsets(stride_dq, stride_dqh, GROUP, ROWS)[:, None] + dims[None, :]
    tl.store(d_q, acc.to(DQ.dtype.element_ty), mask=stored)


@triton.jit
def chunk_size(num_queries, SPLIT: tl.constexpr):
    """Queries of a chunk, SPLIT or more (`banded.chunk_size` says the same).

    Tiles of 128 compressed tokens begin 2048 tokens and a few apart: chunks that divide those would end in slivers of tiles."""
    size = tl.cdiv(tl.cdiv(num_queries, MAX_CHUNKS), 64) * 64
    size += ((size % 1024 == 0) & (size < 4096)).to(tl.int32) * 64
    return tl.maximum(size, SPLIT)


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
        size = chunk_size(num_queries, SPLIT)
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
    d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stats_size, begin, end, limit,
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
        at = stats + row * GROUP + tl.arange(0, ROWS)
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
    q, d_out, stats = (
        Q + row * stride_q + group * stride_qh,
        DOut + row * stride_do + group * stride_doh,
        Stats + tl.cast(head, tl.int64) * stride_s + row * GROUP,
    )

    d_key, d_value = tl.zeros([KEYS, WIDTH_K], tl.float32), tl.zeros([KEYS, WIDTH_V], tl.float32)
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stats_size, begin, masked_end,
        end, ahead, score_scale, DK, DV, WIDTH_K, WIDTH_V, GROUP, STRIDE, OFFSET, WINDOW, ROWS, QUERIES, True, PRECISION,
    )  # fmt: skip
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stats_size, masked_end, full_end,
        end, ahead, score_scale, DK, DV, WIDTH_K, WIDTH_V, GROUP, STRIDE, OFFSET, WINDOW, ROWS, QUERIES, False, PRECISION,
    )  # fmt: skip
    d_key, d_value = gather_dkdv(
        d_key, d_value, key, value, keys, q, d_out, stats, stride_q, stride_qh, stride_do, stride_doh, stats_size, full_end, end,
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
