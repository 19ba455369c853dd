"""Writing new tokens to the paged cache in two launches: their K and V, then the compressed tokens that they complete (φ).

The same as `nsa.cache.plan_write` and `write_layer`, without their thirty launches and without gathering blocks that are not
complete: which tokens complete a compressed token is found on the device (a step of single tokens, so that a CUDA graph can
hold it) or given. Sums and φ's hidden layer are fp32. Leaves out attention and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nsa.attention import LayerCache, Phi
from nsa.config import SparsityConfig
from nsa.kernels.launch import ceil_div, dot_precision, launch, padded, power_of_two

TILE = 16
"""Compressed tokens (of one KV head) of a program: the least that `tl.dot` takes, as a decode step completes few."""
STEP_BYTES = 2**15
"""Of φ's first projection that a program reads at once, and at least one token's part."""
POOLING_PROGRAMS = 64
"""Programs for K and as many for V that make compressed tokens: they fill the shared memory of an H100's SMs, and in most decode steps have nothing
to do."""
FEW_SEQUENCES = 512
"""Steps of up to so many single tokens share one compiled kernel: CUDA graphs are captured for many batch sizes."""


@triton.jit(do_not_specialize=["stride_table"])
def token_kernel(
    Keys, Values, Raw, Table, Rows, Positions, stride_k, stride_kh, stride_v, stride_vh, stride_page, stride_kind, stride_offset, stride_row,
    stride_table, HEADS: tl.constexpr, HEADS2: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """K and V of one token. A padded row (position −1) goes to page 0."""
    token = tl.program_id(0)
    if DECODE:
        row, position = token, tl.load(Positions + token).to(tl.int32) - 1
    else:
        row, position = tl.load(Rows + token).to(tl.int32), tl.load(Positions + token).to(tl.int32)
    at = tl.maximum(position, 0)
    page = tl.load(Table + tl.cast(row, tl.int64) * stride_table + at // PAGE, mask=position >= 0, other=0)
    heads, dims = tl.arange(0, HEADS2), tl.arange(0, WIDTH)
    inside = (heads < HEADS)[:, None]
    to = Raw + tl.cast(page, tl.int64) * stride_page + (at % PAGE) * stride_offset + heads[:, None] * stride_row + dims[None, :]
    first = tl.cast(token, tl.int64)
    mask = inside & (dims < DK)[None, :]
    tl.store(to, tl.load(Keys + first * stride_k + heads[:, None] * stride_kh + dims[None, :], mask=mask).to(Raw.dtype.element_ty), mask=mask)
    mask = inside & (dims < DV)[None, :]
    values = tl.load(Values + first * stride_v + heads[:, None] * stride_vh + dims[None, :], mask=mask)
    tl.store(to + stride_kind, values.to(Raw.dtype.element_ty), mask=mask)


@triton.jit
def pool_tile(
    Raw, Out, Pages, Position, Up, Down, position, head, valid, stride_page, stride_offset, stride_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN2: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    MLP: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """φ of the blocks that end at `position` `[TILE]`; Raw points to K or V of the branch's first head, Out to each result.

    STEP tokens at a time: blocks begin at multiples of d, which STEP divides, so these lie on one page, and a block on at most two."""
    column, hidden, dims = tl.arange(0, STEP * WIDTH), tl.arange(0, HIDDEN2), tl.arange(0, WIDTH)
    token, dim = column // WIDTH, column % WIDTH
    mask = valid[:, None] & (dim < DIM)[None, :]
    total = tl.zeros([TILE, WIDTH], tl.float32)
    acc = tl.zeros([TILE, HIDDEN2], tl.float32)
    start = tl.maximum(position - (BLOCK - 1), 0)
    border = position // PAGE * PAGE
    first_page = tl.cast(tl.load(Pages + start // PAGE, mask=valid, other=0), tl.int64) * stride_page
    last_page = tl.cast(tl.load(Pages + position // PAGE, mask=valid, other=0), tl.int64) * stride_page
    for i in range(0, BLOCK, STEP):
        at = start + i
        source = tl.where(at >= border, last_page, first_page) + (at % PAGE) * stride_offset + head * stride_row
        x = tl.load(Raw + source[:, None] + (token * stride_offset + dim)[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.reshape(x.to(tl.float32), (TILE, STEP, WIDTH)), 1)
        if MLP:
            place = i * DIM + (column if DIM == WIDTH else token * DIM + dim)
            # A row for each block, the same in all: so it comes the way of x, not number by number into each thread.
            shift = tl.load(Position + tl.zeros([TILE], tl.int32)[:, None] + place[None, :], mask=mask, other=0.0)
            moved = (x.to(tl.float32) + shift.to(tl.float32)).to(x.dtype)
            weights = (hidden < HIDDEN)[None, :] & (dim < DIM)[:, None]
            up = tl.load(Up + hidden[None, :] * (BLOCK * DIM) + place[:, None], mask=weights, other=0.0)
            acc = tl.dot(moved, up.to(x.dtype), acc, input_precision=PRECISION)
    pooled = total / BLOCK
    if MLP:
        active = (acc * tl.sigmoid(acc)).to(Raw.dtype.element_ty)
        down = tl.load(Down + dims[None, :] * HIDDEN + hidden[:, None], mask=(hidden < HIDDEN)[:, None] & (dims < DIM)[None, :], other=0.0)
        pooled += tl.dot(active, down.to(active.dtype), input_precision=PRECISION)
    tl.store(Out[:, None] + dims[None, :], pooled.to(Out.dtype.element_ty), mask=valid[:, None] & (dims < DIM)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "stride_table"])
def compressed_kernel(
    Raw, Cmp, Table, Rows, Positions, Complete, KPosition, KUp, KDown, VPosition, VUp, VDown, num_tokens,
    stride_page, stride_kind, stride_offset, stride_row, stride_cp, stride_slot, stride_ch, stride_table,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN2: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, MLP: tl.constexpr, DECODE: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compressed tokens of K (program 0 of the second axis) or V, TILE at a time. Complete lists the tokens that complete one,
    `num_tokens` of them; with DECODE they are found among `num_tokens` sequences, whose lengths Positions holds."""
    count = num_tokens
    if DECODE:
        sequences = tl.arange(0, TOKENS)
        lengths = tl.load(Positions + sequences, mask=sequences < num_tokens, other=0).to(tl.int32)
        done = ((lengths >= BLOCK) & ((lengths - BLOCK) % STRIDE == 0)).to(tl.int32)
        count = tl.sum(done)
    for start in range(tl.program_id(0) * TILE, count * HEADS, tl.num_programs(0) * TILE):
        index = start + tl.arange(0, TILE)
        which, head = index // HEADS, index % HEADS
        valid = which < count
        if DECODE:
            row = tl.sum((tl.cumsum(done)[None, :] <= which[:, None]).to(tl.int32), axis=1)
            row = tl.where(valid, row, 0)
            position = tl.load(Positions + row).to(tl.int32) - 1
        else:
            token = tl.load(Complete + which, mask=valid, other=0)
            row, position = tl.load(Rows + token).to(tl.int32), tl.load(Positions + token).to(tl.int32)
        position = tl.maximum(position, 0)
        pages = Table + tl.cast(row, tl.int64) * stride_table
        own = tl.cast(tl.load(pages + position // PAGE, mask=valid, other=0), tl.int64)
        out = Cmp + own * stride_cp + (position % PAGE) // STRIDE * stride_slot + head * stride_ch
        if tl.program_id(1) == 0:
            pool_tile(
                Raw, out, pages, KPosition, KUp, KDown, position, head, valid, stride_page, stride_offset, stride_row,
                DK, WIDTH, HIDDEN, HIDDEN2, BLOCK, PAGE, MLP, PRECISION, TILE, STEP,
            )  # fmt: skip
        else:
            pool_tile(
                Raw + stride_kind, out + DK, pages, VPosition, VUp, VDown, position, head, valid, stride_page, stride_offset, stride_row,
                DV, WIDTH, HIDDEN, HIDDEN2, BLOCK, PAGE, MLP, PRECISION, TILE, STEP,
            )  # fmt: skip


def write_pages(
    cache: LayerCache, keys: torch.Tensor, values: torch.Tensor, block_table: torch.Tensor, positions: torch.Tensor, *,
    rows: torch.Tensor | None, complete: torch.Tensor | None, phi: Phi | None, config: SparsityConfig,
) -> None:  # fmt: skip
    """Write new tokens and the compressed tokens that they complete.

    Args:
        keys, values: `[T, sets·Hkv, …]`, the sets in the cache's order, keys after RoPE.
        block_table: int32 `[B, P]`.
        positions: int `[T]`, each token's position and `rows` int `[T]` its sequence; without `rows`, T sequences have one new
            token each and `positions` are their lengths, 0 for a padded row (written to page 0).
        complete: with `rows`, int `[M]`, the tokens that complete a compressed token.
        phi: the compressor's tensors; None for the mean.
    """
    num_tokens, num_rows = keys.shape[:2]
    if not num_tokens:
        return
    decode, raw, page_size = rows is None, cache.raw, cache.page_size
    places = positions if rows is None else rows
    width = padded(max(cache.key_dim, cache.value_dim))
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    launch(
        token_kernel, (num_tokens,),
        keys, values, raw, block_table, places, positions, *keys.stride()[:2], *values.stride()[:2], *raw.stride()[:4], block_table.stride(0),
        HEADS=num_rows, HEADS2=power_of_two(num_rows), DK=cache.key_dim, DV=cache.value_dim, WIDTH=width, PAGE=page_size, DECODE=decode,
    )  # fmt: skip
    count = num_tokens if complete is None else len(complete)
    if not count:
        return
    weights: Sequence[torch.Tensor] = [cache.cmp] * 6
    if phi is not None:
        weights = [phi.k.position, phi.k.up, phi.k.down, phi.v.position, phi.v.up, phi.v.down]
    hidden = 1 if phi is None else phi.k.down.shape[1]
    step = config.compress_stride & -config.compress_stride  # the greatest power of two that divides it
    while step > 1 and step * width * padded(hidden) * raw.element_size() > STEP_BYTES:
        step //= 2
    branch = raw[:, :, :, cache.set_index("cmp") * cache.num_kv_heads :]
    launch(
        compressed_kernel, (min(ceil_div(count * cache.num_kv_heads, TILE), POOLING_PROGRAMS), 2),
        branch, cache.cmp, block_table, places, positions, positions if complete is None else complete, *weights, count,
        *raw.stride()[:4], *cache.cmp.stride()[:3], block_table.stride(0),
        HEADS=cache.num_kv_heads, DK=cache.key_dim, DV=cache.value_dim, WIDTH=width, HIDDEN=hidden, HIDDEN2=padded(hidden),
        BLOCK=config.compress_block_size, STRIDE=config.compress_stride, PAGE=page_size,
        TOKENS=max(FEW_SEQUENCES, power_of_two(num_tokens)) if decode else 1,
        MLP=phi is not None, DECODE=decode, PRECISION=dot_precision(), TILE=TILE, STEP=step, num_warps=4, num_stages=3,
    )  # fmt: skip
