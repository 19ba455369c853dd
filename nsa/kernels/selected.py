"""Attention over chosen blocks: forward and dq here, dk and dv in selected_keys.py.

A program takes a tile of neighbouring queries with all heads of a KV head through the blocks that any of them chose
(unions.py): neighbours choose mostly the same ones, so K and V are read a few times less than query by query, and tiles of
64 rows keep the tensor cores busy. To a row a block that its query did not choose is worth exactly nothing, so a result
depends on the query's own blocks alone. On Hopper selected_hopper.py computes the forward pass and selected_dq_hopper.py dq.

Where neighbours choose differently, as with random choices, small groups are better off block by block (gathered.py).
That depends on the choices, which the host does not know: both kinds of kernels are launched, and the wrong ones end at
once. `deterministic` never takes that way. Leaves out the gate's own gradient (gating.py) and the choice of blocks
(scoring.py). No atomics on floating-point numbers: results are the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.counted_inverse import invert_where
from nsa.kernels.gathered import gathered_dq, gathered_forward, may_gather, most_shared
from nsa.kernels.inverse import invert_selection
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded, widths
from nsa.kernels.query_rows import load_rows
from nsa.kernels.selected_keys import selected_dkdv
from nsa.kernels.tiles import KernelPlan, Tile
from nsa.kernels.unions import MAX_QUERIES, unite_choices

HOPPER_ROWS = 128
"""Rows of a tile on Hopper. Their queries choose more blocks than those of 64 rows do: dq is as fast as block by block
(14.4 ms at 64k, group 4) with 124 of them, by a line through 5.7 ms with 38 and 27.6 with 255."""
NO_LIMIT = 2**31 - 1
"""What a total of union sizes never exceeds: the kernels here run whatever was chosen."""


def query_tile(dims: int, group: int, block: int, dtype: torch.dtype, *, backward: bool) -> Tile:
    """Fixed shapes of forward and dq; `dims` = padded Dk + Dv."""
    wide = dims > 256 or dtype == torch.float32
    keys = min(padded(block), 32 if wide and dims > 256 else 64)
    rows = padded(group) if dtype == torch.float32 else max(64, padded(group))
    return Tile(keys=keys, rows=rows, num_warps=4, num_stages=2 if wide or backward else 3)


def tile_queries(rows: int, group: int) -> int:
    """Queries of a tile of rows."""
    return min(max(1, rows // group), MAX_QUERIES)


def takes_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int, *others: torch.Tensor | None) -> bool:
    """Whether selected_hopper.py computes the forward pass and selected_dq_hopper.py dq, which are imported only where they can run.
    others: what is read or written with q's rows."""
    if not runs_hopper_kernels(q.device):
        return False
    from nsa.kernels import selected_hopper

    return selected_hopper.takes(q, k, v, size, [x for x in others if x is not None])


@triton.jit
def locate_tile(tiles, query_ends, key_ends, lane, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """Of each row of the program's tile: its query in the tile, packed row, position in its sequence, and whether there is
    one; the sequence's first key and number of keys."""
    tile = tiles + tl.program_id(0) * 2
    sequence, start = tl.load(tile), tl.load(tile + 1)
    query_start, key_start = tl.load(query_ends + sequence), tl.load(key_ends + sequence)
    num_queries, num_keys = tl.load(query_ends + sequence + 1) - query_start, tl.load(key_ends + sequence + 1) - key_start
    query = lane // GROUP
    valid = (query < QUERIES) & (start + query < num_queries)
    row = tl.where(valid, query_start + start + query, query_start)
    return query, row.to(tl.int64), num_keys - num_queries + start + query, valid, key_start.to(tl.int64), num_keys


@triton.jit
def shared_keys(blocks, bits, step, query, position, num_keys, KEYS: tl.constexpr, SELECT: tl.constexpr):
    """Keys of a step through a tile's blocks: their numbers, which exist, and which of them each row sees `[rows, keys]`."""
    STEPS: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    inner = step % STEPS * KEYS + tl.arange(0, KEYS)
    key = tl.load(blocks + step // STEPS) * SELECT + inner
    exists = key < num_keys
    if SELECT % KEYS != 0:
        exists &= inner < SELECT
        key = tl.where(inner < SELECT, key, num_keys)
    last = tl.where((tl.load(bits + step // STEPS) >> query) & 1 != 0, position, -1)
    return key.to(tl.int64), exists, key[None, :] <= last[:, None]


@triton.jit(do_not_specialize=["capacity", "limit"])
def selected_forward_kernel(
    q, k, v, blocks, bits, counts, total_blocks, gate, out, branch_out, lse, tiles, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, out_row, out_head, capacity, limit, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, QUERIES: tl.constexpr, ACCUMULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (+)= gate · o, branch_out = o, lse, for the group's heads of a tile of queries."""
    if tl.load(total_blocks) > limit:
        return
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, ROWS)
    query, row, position, valid, key_start, num_keys = locate_tile(tiles, query_ends, key_ends, lane, GROUP, QUERIES)
    item = tl.program_id(0).to(tl.int64) * num_kv_heads + kv_head
    count = tl.load(counts + item)
    blocks += item * capacity
    bits += item * capacity
    head = kv_head * GROUP + lane % GROUP
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    source = q + (row * q_row + head * q_head)[:, None] + key_dim[None, :]
    q_tile = tl.load(source, mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
    keys = k + key_start * k_row + kv_head * k_head
    values = v + key_start * v_row + kv_head * v_head
    STEPS: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for step in range(0, count * STEPS):
        key, exists, seen = shared_keys(blocks, bits, step, query, position, num_keys, KEYS, SELECT)
        k_tile = tl.load(keys + key[:, None] * k_row + key_dim[None, :], mask=exists[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        v_tile = tl.load(values + key[:, None] * v_row + value_dim[None, :], mask=exists[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        highest = new
    some = total > 0
    result = acc * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    log = tl.where(some, (highest + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse + row * (num_kv_heads * GROUP) + head, log, mask=valid)
    store = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
    if KEEP:
        tl.store(branch_out + (row * (num_kv_heads * GROUP) + head)[:, None] * VALUE_DIM + value_dim[None, :], result, mask=store)
    result *= tl.load(gate + row * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)[:, None]
    target = out + (row * out_row + head * out_head)[:, None] + value_dim[None, :]
    if ACCUMULATE:
        result += tl.load(target, mask=store, other=0.0).to(tl.float32)
    tl.store(target, result, mask=store)


@triton.jit(do_not_specialize=["capacity", "limit"])
def selected_dq_kernel(
    d_out, q, k, v, blocks, bits, counts, total_blocks, lse, delta, gate, dq, dq_before, tiles, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head, dq_row, dq_head,
    before_row, before_head, capacity, limit, scale, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, QUERIES: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = dq_before (with BEFORE) + scale · dS K, for the group's heads of a tile of queries."""
    if tl.load(total_blocks) > limit:
        return
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, ROWS)
    query, row, position, valid, key_start, num_keys = locate_tile(tiles, query_ends, key_ends, lane, GROUP, QUERIES)
    item = tl.program_id(0).to(tl.int64) * num_kv_heads + kv_head
    count = tl.load(counts + item)
    blocks += item * capacity
    bits += item * capacity
    head = kv_head * GROUP + lane % GROUP
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_mask = valid[:, None] & (key_dim < KEY_DIM)[None, :]
    q_tile, do_tile, gates, deltas, lse_log2 = load_rows(
        d_out, q, lse, delta, gate, row, head, valid, num_kv_heads * GROUP, d_out_row, d_out_head, q_row, q_head, delta_row, delta_head,
        gate_row, gate_head, KEY_DIM, KEY_PAD, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip
    keys = k + key_start * k_row + kv_head * k_head
    values = v + key_start * v_row + kv_head * v_head
    STEPS: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    acc = tl.zeros([ROWS, KEY_PAD], tl.float32)
    for step in range(0, count * STEPS):
        key, exists, seen = shared_keys(blocks, bits, step, query, position, num_keys, KEYS, SELECT)
        k_tile = tl.load(keys + key[:, None] * k_row + key_dim[None, :], mask=exists[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        v_tile = tl.load(values + key[:, None] * v_row + value_dim[None, :], mask=exists[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(s - lse_log2[:, None]), 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp * gates[:, None] - deltas[:, None])
        acc += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    acc *= scale
    if BEFORE:
        before = dq_before + (row * before_row + head * before_head)[:, None] + key_dim[None, :]
        acc += tl.load(before, mask=key_mask, other=0.0).to(tl.float32)
    tl.store(dq + (row * dq_row + head * dq_head)[:, None] + key_dim[None, :], acc, mask=key_mask)


def selected_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: torch.Tensor,
    plan: KernelPlan,
    config: SparsityConfig,
    *,
    scale: float,
    gate: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    keep: bool,
    deterministic: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The selection branch: out (+)= gate · softmax(scale · q·k) v over the tokens of each query's blocks.

    Args:
        q: `[T, Hq, Dk]`. k: `[Tk, Hkv, Dk]`. v: `[Tk, Hkv, Dv]`, one dtype, last dimensions contiguous.
        selection: int32 `[T, Hkv, n]`, contiguous; block numbers from the sequence's start first, then -1.
        gate: `[T, Hq]`. out: `[T, Hq, Dv]`, written, or added to with `accumulate`.
        keep: return the branch's own output too (training).
        deterministic: one way whatever was chosen, so that a sequence's results do not depend on the rest of the batch.
    Returns:
        branch output `[T, Hq, Dv]` in q's dtype or None; LSE fp32 `[T, Hq]`, natural log, -inf where nothing is seen.
    """
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size = num_heads // num_kv_heads, config.select_block_size
    lse = torch.empty(q.shape[0], num_heads, dtype=torch.float32, device=q.device)
    branch_out = torch.empty(q.shape[0], num_heads, value_dim, dtype=q.dtype, device=q.device) if keep else None
    if not lse.numel():
        return branch_out, lse
    dims, hopper = padded(key_dim) + padded(value_dim), takes_hopper(q, k, v, size, out)
    shape = query_tile(dims, group, size, q.dtype, backward=False)
    unions = unite_choices(selection, tile_queries(HOPPER_ROWS if hopper else shape.rows, group), plan, config)
    both = not deterministic and may_gather(group, plan, config, padded(size) * dims * q.element_size(), q.dtype)
    limit = most_shared(unions, config, HOPPER_ROWS // shape.rows if hopper else 1) if both else NO_LIMIT
    if hopper:
        from nsa.kernels import selected_hopper

        selected_hopper.forward(q, k, v, gate, out, branch_out, lse, unions, plan, limit=limit, scale=scale * LOG2_E, accumulate=accumulate)
    else:
        launch(
            selected_forward_kernel, (unions.tiles.shape[0], num_kv_heads),
            q, k, v, unions.blocks, unions.bits, unions.counts, unions.total, gate, out, out if branch_out is None else branch_out, lse,
            unions.tiles, plan.query_ends, plan.key_ends, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate.stride(), *out.stride()[:2],
            unions.blocks.shape[1], limit, scale * LOG2_E, GROUP=group, **widths(key_dim, value_dim), ROWS=shape.rows, KEYS=shape.keys, SELECT=size,
            QUERIES=unions.queries, ACCUMULATE=accumulate, KEEP=keep, PRECISION=dot_precision(), num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )  # fmt: skip
    if both:
        index = invert_where(selection, plan, config, unions.total, limit)
        gathered_forward(
            q, k, v, selection, unions, index, plan, config, scale=scale, gate=gate, out=out, branch_out=branch_out, lse=lse,
            accumulate=accumulate, limit=limit,
        )  # fmt: skip
    return branch_out, lse


def selected_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: torch.Tensor,
    lse: torch.Tensor,
    delta_b: torch.Tensor,
    gate: torch.Tensor,
    plan: KernelPlan,
    config: SparsityConfig,
    *,
    scale: float,
    dq: torch.Tensor,
    dq_before: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `selected_forward`.

    Args:
        d_out: gradient of the summed output, `[T, Hq, Dv]` in q's dtype (the branch's own is gate · d_out).
        lse: as `selected_forward` returned it. delta_b: fp32 `[T, Hq]`, gate · <d_out, branch output>.
        gate: `[T, Hq]`; one that is not positive may count as 0, which gives gradients of 0.
        dq: `[T, Hq, Dk]`, written: dq_before (`[T, Hq, Dk]`, may be the same tensor; None: 0) + this branch's gradient.
        deterministic: as in `selected_forward`.
    Returns:
        dk `[Tk, Hkv, Dk]`, dv `[Tk, Hkv, Dv]` in k's dtype; zero for keys nobody chose.
    """
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size = num_heads // num_kv_heads, config.select_block_size
    if not q.shape[0] or not k.shape[0]:
        return torch.zeros_like(k, memory_format=torch.contiguous_format), torch.zeros_like(v, memory_format=torch.contiguous_format)
    dims = padded(key_dim) + padded(value_dim)
    shape = query_tile(dims, group, size, q.dtype, backward=True)
    index = invert_selection(selection, plan, config)
    hopper = takes_hopper(q, k, v, size, d_out, dq, dq_before)
    unions = unite_choices(selection, tile_queries(HOPPER_ROWS if hopper else shape.rows, group), plan, config)
    both = not deterministic and may_gather(group, plan, config, padded(size) * dims * q.element_size(), q.dtype)
    limit = most_shared(unions, config, HOPPER_ROWS // shape.rows if hopper else 1) if both else NO_LIMIT
    given, before = (d_out, q, k, v), dq if dq_before is None else dq_before
    if hopper:
        from nsa.kernels import selected_dq_hopper

        selected_dq_hopper.dq(*given, lse, delta_b, gate, dq, dq_before, unions, plan, limit=limit, scale=scale)
    else:
        launch(
            selected_dq_kernel, (unions.tiles.shape[0], num_kv_heads),
            *given, unions.blocks, unions.bits, unions.counts, unions.total, lse, delta_b, gate, dq, before, unions.tiles, plan.query_ends,
            plan.key_ends, *(step for x in given for step in x.stride()[:2]), *delta_b.stride(), *gate.stride(), *dq.stride()[:2],
            *before.stride()[:2], unions.blocks.shape[1], limit, scale, scale * LOG2_E, GROUP=group,
            **widths(key_dim, value_dim), ROWS=shape.rows, KEYS=shape.keys, SELECT=size, QUERIES=unions.queries, BEFORE=dq_before is not None,
            PRECISION=dot_precision(), num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
    if both:
        gathered_dq(*given, selection, lse, delta_b, gate, unions, index, plan, config, scale=scale, dq=dq, dq_before=dq_before, limit=limit)
    return selected_dkdv(*given, lse, delta_b, gate, index, plan, config, scale=scale)
