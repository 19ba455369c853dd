"""Reading sequences out of the paged cache in one launch: K and V of all their tokens and their compressed tokens, one sequence after the other.

For prefill of what follows cached tokens: its kernels take packed rows. A program copies a part of one page. Leaves out attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa.attention import KeyValue, LayerCache
from nsa.config import SparsityConfig
from nsa.kernels.launch import ceil_div, launch
from nsa.kernels.tiles import KernelPlan

ELEMENTS = 4096
"""Of K, V or compressed tokens that a program copies at once: 16 bytes eight times a thread."""


@triton.jit(do_not_specialize=["stride_table"])
def read_kernel(
    Raw, Cmp, Keys, Values, Compressed, Table, Tiles, KeyEnds, CompressedEnds, stride_page, stride_kind, stride_cp, stride_table,
    ROW: tl.constexpr, WIDTH: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, CMP_ROW: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    FIRST: tl.constexpr, RAW_PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """A part of one page of a sequence: the first RAW_PARTS programs of the second axis copy K and V, the rest compressed tokens."""
    tile, part = tl.program_id(0), tl.program_id(1)
    sequence, first = tl.load(Tiles + 2 * tile), tl.load(Tiles + 2 * tile + 1)
    page = tl.load(Table + tl.cast(sequence, tl.int64) * stride_table + first // PAGE).to(tl.int64)
    if part < RAW_PARTS:
        start, end = tl.load(KeyEnds + sequence), tl.load(KeyEnds + sequence + 1)
        at = part * ELEMENTS + tl.arange(0, ELEMENTS)
        inside = at < tl.minimum(PAGE, end - start - first) * ROW
        to = tl.cast(start + first, tl.int64) * ROW + at
        source = Raw + page * stride_page + at
        dim = at % WIDTH
        if DK == WIDTH:
            tl.store(Keys + to, tl.load(source, mask=inside), mask=inside)
        else:
            mask = inside & (dim < DK)
            tl.store(Keys + to // WIDTH * DK + dim, tl.load(source, mask=mask), mask=mask)
        if DV == WIDTH:
            tl.store(Values + to, tl.load(source + stride_kind, mask=inside), mask=inside)
        else:
            mask = inside & (dim < DV)
            tl.store(Values + to // WIDTH * DV + dim, tl.load(source + stride_kind, mask=mask), mask=mask)
    else:
        start, end = tl.load(CompressedEnds + sequence), tl.load(CompressedEnds + sequence + 1)
        at = (part - RAW_PARTS) * ELEMENTS + tl.arange(0, ELEMENTS)
        token = first // PAGE * PER_PAGE - FIRST  # of the page's first slot
        index = token + at // CMP_ROW
        inside = (at < PER_PAGE * CMP_ROW) & (index >= 0) & (index < end - start)
        to = tl.cast(start + token, tl.int64) * CMP_ROW + at
        tl.store(Compressed + to, tl.load(Cmp + page * stride_cp + at, mask=inside), mask=inside)


def read_pages(cache: LayerCache, block_table: torch.Tensor, plan: KernelPlan, *, raw: bool, config: SparsityConfig) -> tuple[KeyValue, KeyValue]:
    """K and V, and the compressed tokens, of sequences in the cache.

    Args:
        block_table: int32 `[N, P]`. plan: says how many tokens of each sequence.
        raw: whether K and V are wanted; without it they come back empty.
    Returns:
        keys and values `[Tk, sets·Hkv, …]`, compressed keys and values `[C, Hkv, …]` (views of one tensor).
    """
    _, _, page_size, num_rows, width = cache.raw.shape
    heads, key_dim, value_dim = cache.num_kv_heads, cache.key_dim, cache.value_dim
    assert cache.raw[0, 0].is_contiguous() and cache.cmp[0].is_contiguous()
    count = plan.num_keys if raw else 0
    keys, values = cache.raw.new_empty(count, num_rows, key_dim), cache.raw.new_empty(count, num_rows, value_dim)
    compressed = cache.cmp.new_empty(plan.num_compressed, heads, key_dim + value_dim)
    per_page, cmp_row = page_size // config.compress_stride, heads * (key_dim + value_dim)
    raw_parts = ceil_div(page_size * num_rows * width, ELEMENTS) if raw else 0
    tiles = plan.key_tiles(page_size)
    launch(
        read_kernel, (len(tiles), raw_parts + ceil_div(per_page * cmp_row, ELEMENTS)),
        cache.raw, cache.cmp, keys, values, compressed, block_table, tiles, plan.key_ends, plan.compressed_ends,
        *cache.raw.stride()[:2], cache.cmp.stride(0), block_table.stride(0),
        ROW=num_rows * width, WIDTH=width, DK=key_dim, DV=value_dim, CMP_ROW=cmp_row, PAGE=page_size, PER_PAGE=per_page,
        FIRST=config.compress_block_size // config.compress_stride - 1, RAW_PARTS=raw_parts, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip
    return (keys, values), (compressed[..., :key_dim], compressed[..., key_dim:])
