"""Attention over chosen blocks: forward, dq, and dk/dv over the inverse index.

The kernels here are query-major: one program per query and KV head walks the query's blocks; its rows are the group's
heads, padded to 16. dk/dv is block-major: one program per block and segment of the list of queries that chose it, rows =
queries × heads; lists longer than a segment (block 0's holds every query) leave fp32 partial sums that a last kernel
adds in order. Where there are many queries, gathered.py does all of it block by block instead. No atomics: results are
the same from run to run and whatever else is in the batch. Leaves out the gate's own gradient (gating.py) and the choice
of blocks (scoring.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nsa.config import SparsityConfig
from nsa.kernels.banded import runs_hopper_kernels
from nsa.kernels.gathered import gathered_backward, gathered_forward, gathers
from nsa.kernels.inverse import InverseIndex, invert_selection
from nsa.kernels.launch import LOG2_E, dot_precision, launch, padded
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import MAX_QUERIES, unite_choices

GATHERED_DQ = True
SEGMENT_ROWS = 32768
"""Rows (queries × heads) of a list that one dk/dv program takes at most."""


@dataclass(frozen=True, slots=True)
class SelectedTile:
    """Shape of a program: keys of a step, rows (queries × heads), and how it is scheduled."""

    keys: int
    rows: int
    num_warps: int
    num_stages: int

    def queries(self, group: int) -> int:
        """Queries of a tile of rows."""
        return min(max(1, self.rows // group), MAX_QUERIES)


def query_tile(dims: int, group: int, block: int, dtype: torch.dtype, *, backward: bool) -> SelectedTile:
    """Fixed shapes of forward and dq; `dims` = padded Dk + Dv."""
    wide = dims > 256 or dtype == torch.float32
    keys = min(padded(block), 32 if wide and dims > 256 else 64)
    rows = padded(group) if dtype == torch.float32 else max(64, padded(group))
    return SelectedTile(keys=keys, rows=rows, num_warps=4, num_stages=2 if wide or backward else 3)


def takes_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Whether the forward pass runs on selected_hopper.py, which is imported only where it can run."""
    if not runs_hopper_kernels(q.device):
        return False
    from nsa.kernels import selected_hopper

    return selected_hopper.takes(q, k, v, size)


def key_tile(dims: int, group: int, block: int, dtype: torch.dtype) -> SelectedTile:
    """Fixed shapes of dk/dv; `dims` = padded Dk + Dv."""
    if dtype == torch.float32:
        return SelectedTile(keys=min(padded(block), 32), rows=max(32 if dims <= 256 else 16, padded(group)), num_warps=4, num_stages=1)
    return SelectedTile(
        keys=min(padded(block), 64), rows=max(32, padded(group)), num_warps=4 if dims <= 256 else 8, num_stages=3 if dims <= 256 else 2
    )


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


@triton.jit(do_not_specialize=["capacity"])
def selected_forward_kernel(
    q, k, v, blocks, bits, counts, gate, out, branch_out, lse, tiles, query_ends, key_ends,
    q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, out_row, out_head, capacity, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, QUERIES: tl.constexpr, ACCUMULATE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (+)= gate · o, branch_out = o, lse, for the group's heads of a tile of queries."""
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


@triton.jit(do_not_specialize=["capacity"])
def selected_dq_kernel(
    d_out, q, k, v, blocks, bits, counts, lse, delta, gate, dq, dq_before, tiles, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head, dq_row, dq_head,
    before_row, before_head, capacity, scale, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, QUERIES: tl.constexpr, BEFORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = dq_before (with BEFORE) + scale · dS K, for the group's heads of a tile of queries."""
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, ROWS)
    query, row, position, valid, key_start, num_keys = locate_tile(tiles, query_ends, key_ends, lane, GROUP, QUERIES)
    item = tl.program_id(0).to(tl.int64) * num_kv_heads + kv_head
    count = tl.load(counts + item)
    blocks += item * capacity
    bits += item * capacity
    head = kv_head * GROUP + lane % GROUP
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_mask, value_mask = valid[:, None] & (key_dim < KEY_DIM)[None, :], valid[:, None] & (value_dim < VALUE_DIM)[None, :]
    q_tile = tl.load(q + (row * q_row + head * q_head)[:, None] + key_dim[None, :], mask=key_mask, other=0.0)
    do_tile = tl.load(d_out + (row * d_out_row + head * d_out_head)[:, None] + value_dim[None, :], mask=value_mask, other=0.0)
    gates = tl.load(gate + row * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)
    deltas = tl.load(delta + row * delta_row + head * delta_head, mask=valid, other=0.0)
    lse_log2 = tl.load(lse + row * (num_kv_heads * GROUP) + head, mask=valid, other=float("inf")) * 1.4426950408889634
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


@triton.jit(do_not_specialize=["num_blocks"])
def selected_dkdv_kernel(
    d_out, q, k, v, lse, delta, gate, dk, dv, partial_dk, partial_dv,
    queries, ends, owners, segment_ends, partial_ends, block_sequence, block_ends, query_ends, key_ends,
    d_out_row, d_out_head, q_row, q_head, k_row, k_head, v_row, v_head, delta_row, delta_head, gate_row, gate_head, num_heads, num_blocks,
    scale, scale_log2,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SELECT: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of KEYS keys of one block from one segment of its list; fp32 partial sums where the list has more segments."""
    segment = tl.program_id(0)
    owner = tl.load(owners + segment)
    num_kv_heads = num_heads // GROUP
    if owner >= num_kv_heads * num_blocks:
        return
    kv_head, block = owner // num_blocks, owner % num_blocks
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    offset = key_end - key_start - tl.load(query_ends + sequence + 1)  # position = packed query row + offset
    inner = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    exists = (inner < SELECT) & (key < key_end - key_start)
    key_row = (key_start + key).to(tl.int64)
    key_dim, value_dim = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_mask, value_mask = exists[:, None] & (key_dim < KEY_DIM)[None, :], exists[:, None] & (value_dim < VALUE_DIM)[None, :]
    k_tile = tl.load(k + key_row[:, None] * k_row + kv_head * k_head + key_dim[None, :], mask=key_mask, other=0.0)
    v_tile = tl.load(v + key_row[:, None] * v_row + kv_head * v_head + value_dim[None, :], mask=value_mask, other=0.0)
    first_segment = tl.load(segment_ends + owner - 1, mask=owner > 0, other=0)
    several = tl.load(segment_ends + owner) - first_segment > 1
    first = tl.load(ends + owner) + (segment - first_segment).to(tl.int64) * SEGMENT
    last = tl.minimum(first + SEGMENT, tl.load(ends + owner + 1))
    TILE: tl.constexpr = ROWS // GROUP
    lane = tl.arange(0, ROWS)
    acc_k = tl.zeros([KEYS, KEY_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, VALUE_PAD], tl.float32)
    head = kv_head * GROUP + lane % GROUP
    for start in range(first, last, TILE):
        valid = (lane < TILE * GROUP) & (start + lane // GROUP < last)
        row = tl.load(queries + start + lane // GROUP, mask=valid, other=0)
        seen = exists[:, None] & (key[:, None] <= (row + offset)[None, :]) & valid[None, :]
        row = row.to(tl.int64)
        q_tile = tl.load(q + (row * q_row + head * q_head)[:, None] + key_dim[None, :], mask=valid[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)
        do_mask = valid[:, None] & (value_dim < VALUE_DIM)[None, :]
        do_tile = tl.load(d_out + (row * d_out_row + head * d_out_head)[:, None] + value_dim[None, :], mask=do_mask, other=0.0)
        gates = tl.load(gate + row * gate_row + head * gate_head, mask=valid, other=0.0).to(tl.float32)
        deltas = tl.load(delta + row * delta_row + head * delta_head, mask=valid, other=0.0)
        lse_log2 = tl.load(lse + row * num_heads + head, mask=valid, other=float("inf")) * 1.4426950408889634
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
        p = tl.where(seen, tl.exp2(s - lse_log2[None, :]), 0.0)
        acc_v += tl.dot((p * gates[None, :]).to(do_tile.dtype), do_tile, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        ds = p * (dp * gates[None, :] - deltas[None, :])
        acc_k += tl.dot(ds.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    acc_k *= scale
    if several:
        part = tl.load(partial_ends + owner - 1, mask=owner > 0, other=0) + segment - first_segment
        part_row = part.to(tl.int64) * SELECT + inner
        tl.store(partial_dk + part_row[:, None] * KEY_DIM + key_dim[None, :], acc_k, mask=key_mask)
        tl.store(partial_dv + part_row[:, None] * VALUE_DIM + value_dim[None, :], acc_v, mask=value_mask)
    else:
        out_row = key_row * num_kv_heads + kv_head
        tl.store(dk + out_row[:, None] * KEY_DIM + key_dim[None, :], acc_k, mask=key_mask)
        tl.store(dv + out_row[:, None] * VALUE_DIM + value_dim[None, :], acc_v, mask=value_mask)


@triton.jit(do_not_specialize=["num_blocks"])
def add_partials_kernel(
    partial, target, segment_ends, partial_ends, block_sequence, block_ends, key_ends, num_blocks, num_kv_heads,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEYS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Sum of a block's partial dk (or dv), first segment to last."""
    owner = tl.program_id(0)
    first_segment = tl.load(segment_ends + owner - 1, mask=owner > 0, other=0)
    count = tl.load(segment_ends + owner) - first_segment
    if count <= 1:
        return
    kv_head, block = owner // num_blocks, owner % num_blocks
    sequence = tl.load(block_sequence + block)
    key_start, key_end = tl.load(key_ends + sequence), tl.load(key_ends + sequence + 1)
    inner = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = (block - tl.load(block_ends + sequence)) * SELECT + inner
    dim = tl.arange(0, DIM_PAD)
    mask = ((inner < SELECT) & (key < key_end - key_start))[:, None] & (dim < DIM)[None, :]
    part = tl.load(partial_ends + owner - 1, mask=owner > 0, other=0).to(tl.int64)
    acc = tl.zeros([KEYS, DIM_PAD], tl.float32)
    for number in range(0, count):
        acc += tl.load(partial + ((part + number) * SELECT + inner)[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    row = (key_start + key).to(tl.int64) * num_kv_heads + kv_head
    tl.store(target + row[:, None] * DIM + dim[None, :], acc, mask=mask)


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
    inverse: InverseIndex | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The selection branch: out (+)= gate · softmax(scale · q·k) v over the tokens of each query's blocks.

    Args:
        q: `[T, Hq, Dk]`. k: `[Tk, Hkv, Dk]`. v: `[Tk, Hkv, Dv]`, one dtype, last dimensions contiguous.
        selection: int32 `[T, Hkv, n]`, contiguous; block numbers from the sequence's start first, then -1.
        gate: `[T, Hq]`. out: `[T, Hq, Dv]`, written, or added to with `accumulate`.
        keep: return the branch's own output too (training).
        inverse: `invert_selection(selection, …)` where the caller has it.
        deterministic: choose the kernel by shapes alone, so that a sequence's results do not depend on the batch's size.
    Returns:
        branch output `[T, Hq, Dv]` in q's dtype or None; LSE fp32 `[T, Hq]`, natural log, -inf where nothing is seen.
    """
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    lse = torch.empty(q.shape[0], num_heads, dtype=torch.float32, device=q.device)
    branch_out = torch.empty(q.shape[0], num_heads, value_dim, dtype=q.dtype, device=q.device) if keep else None
    if not lse.numel():
        return branch_out, lse
    dims = padded(key_dim) + padded(value_dim)
    queries = None if deterministic else q.shape[0]
    if gathers(group, queries, padded(size) * dims * q.element_size(), q.dtype, backward=False):
        index = invert_selection(selection, plan, config) if inverse is None else inverse
        gathered_forward(
            q, k, v, selection, index, plan, config, scale=scale, gate=gate, out=out, branch_out=branch_out, lse=lse, accumulate=accumulate
        )  # fmt: skip
        return branch_out, lse
    if takes_hopper(q, k, v, size):
        from nsa.kernels import selected_hopper

        unions = unite_choices(selection, min(selected_hopper.ROWS // group, MAX_QUERIES), plan, config)
        selected_hopper.forward(
            q, k, v, gate, out, branch_out, lse, unions, (plan.query_ends, plan.key_ends), scale=scale * LOG2_E, accumulate=accumulate
        )  # fmt: skip
        return branch_out, lse
    shape = query_tile(dims, group, size, q.dtype, backward=False)
    unions = unite_choices(selection, shape.queries(group), plan, config)
    launch(
        selected_forward_kernel, (unions.tiles.shape[0], num_kv_heads),
        q, k, v, unions.blocks, unions.bits, unions.counts, gate, out, out if branch_out is None else branch_out, lse, unions.tiles,
        plan.query_ends, plan.key_ends, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate.stride(), *out.stride()[:2],
        unions.blocks.shape[1], scale * LOG2_E,
        GROUP=group, KEY_DIM=key_dim, KEY_PAD=padded(key_dim), VALUE_DIM=value_dim, VALUE_PAD=padded(value_dim), ROWS=shape.rows, KEYS=shape.keys,
        SELECT=size, QUERIES=unions.queries, ACCUMULATE=accumulate, KEEP=keep, PRECISION=dot_precision(),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return branch_out, lse


def selected_dq(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: torch.Tensor, lse: torch.Tensor, delta_b: torch.Tensor,
    gate: torch.Tensor, plan: KernelPlan, config: SparsityConfig, *, scale: float, dq: torch.Tensor, dq_before: torch.Tensor | None,
) -> None:  # fmt: skip
    """dq of `selected_backward`, query tile by query tile."""
    key_dim, num_kv_heads, value_dim = q.shape[2], k.shape[1], v.shape[2]
    group, size = q.shape[1] // num_kv_heads, config.select_block_size
    shape = query_tile(padded(key_dim) + padded(value_dim), group, size, q.dtype, backward=True)
    unions, before = unite_choices(selection, shape.queries(group), plan, config), dq if dq_before is None else dq_before
    launch(
        selected_dq_kernel, (unions.tiles.shape[0], num_kv_heads),
        d_out, q, k, v, unions.blocks, unions.bits, unions.counts, lse, delta_b, gate, dq, before, unions.tiles, plan.query_ends, plan.key_ends,
        *d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *delta_b.stride(), *gate.stride(), *dq.stride()[:2],
        *before.stride()[:2], unions.blocks.shape[1], scale, scale * LOG2_E, GROUP=group, KEY_DIM=key_dim, KEY_PAD=padded(key_dim),
        VALUE_DIM=value_dim, VALUE_PAD=padded(value_dim), ROWS=shape.rows, KEYS=shape.keys, SELECT=size, QUERIES=unions.queries,
        BEFORE=dq_before is not None, PRECISION=dot_precision(), num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


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
    inverse: InverseIndex | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `selected_forward`.

    Args:
        d_out: gradient of the summed output, `[T, Hq, Dv]` in q's dtype (the branch's own is gate · d_out).
        lse: as `selected_forward` returned it. delta_b: fp32 `[T, Hq]`, gate · <d_out, branch output>.
        gate: `[T, Hq]`; one that is not positive may count as 0, which gives gradients of 0.
        dq: `[T, Hq, Dk]`, written: dq_before (fp32 `[T, Hq, Dk]`, may be the same tensor; None: 0) + this branch's gradient.
        inverse, deterministic: as in `selected_forward`.
    Returns:
        dk `[Tk, Hkv, Dk]`, dv `[Tk, Hkv, Dv]` in k's dtype; zero for keys nobody chose.
    """
    num_heads, key_dim, num_kv_heads, value_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    group, size, n = num_heads // num_kv_heads, config.select_block_size, config.num_selected_blocks
    if not q.shape[0] or not k.shape[0]:
        return torch.zeros_like(k, memory_format=torch.contiguous_format), torch.zeros_like(v, memory_format=torch.contiguous_format)
    dims = padded(key_dim) + padded(value_dim)
    index = invert_selection(selection, plan, config) if inverse is None else inverse
    queries = None if deterministic else q.shape[0]
    blockwise = gathers(group, queries, padded(size) * dims * q.element_size(), q.dtype, backward=True)
    with_dq = blockwise and GATHERED_DQ
    if not with_dq:
        selected_dq(d_out, q, k, v, selection, lse, delta_b, gate, plan, config, scale=scale, dq=dq, dq_before=dq_before)
    if blockwise:
        return gathered_backward(d_out, q, k, v, selection, lse, delta_b, gate, index, plan, config, scale=scale, dq=dq, dq_before=dq_before, with_dq=with_dq)
    shared = {
        "GROUP": group, "KEY_DIM": key_dim, "KEY_PAD": padded(key_dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim), "SELECT": size,
        "PRECISION": dot_precision(),
    }  # fmt: skip
    inputs = (*d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *delta_b.stride(), *gate.stride())
    shape = key_tile(dims, group, size, q.dtype)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=k.dtype, device=k.device)
    # Every list is cut into segments, an empty one into one, so that each block has a program that writes it.
    segment = max(1, SEGMENT_ROWS // group)
    num_lists, entries = num_kv_heads * index.num_blocks, selection.numel()
    segments = ((index.ends.diff() + (segment - 1)) // segment).clamp(min=1)
    segment_ends = segments.cumsum(0)
    partial_ends = torch.where(segments > 1, segments, 0).cumsum(0)
    programs = num_lists + entries // segment
    owners = torch.searchsorted(segment_ends, torch.arange(programs, device=q.device), right=True)
    num_partials = max(1, 2 * entries // segment)
    partial_dk = torch.empty(num_partials, size, key_dim, dtype=torch.float32, device=q.device)
    partial_dv = torch.empty(num_partials, size, value_dim, dtype=torch.float32, device=q.device)
    steps = -(-size // shape.keys)
    launch(
        selected_dkdv_kernel, (programs, steps),
        d_out, q, k, v, lse, delta_b, gate, dk, dv, partial_dk, partial_dv, index.queries, index.ends, owners, segment_ends, partial_ends,
        index.block_sequence, index.block_ends, plan.query_ends, plan.key_ends, *inputs, num_heads, index.num_blocks, scale, scale * LOG2_E,
        **shared, ROWS=shape.rows, KEYS=shape.keys, SEGMENT=segment, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if entries > segment:
        for partial, target, dim in ((partial_dk, dk, key_dim), (partial_dv, dv, value_dim)):
            launch(
                add_partials_kernel, (num_lists, steps),
                partial, target, segment_ends, partial_ends, index.block_sequence, index.block_ends, plan.key_ends, index.num_blocks, num_kv_heads,
                DIM=dim, DIM_PAD=padded(dim), KEYS=shape.keys, SELECT=size, num_warps=4,
            )  # fmt: skip
    return dk, dv
