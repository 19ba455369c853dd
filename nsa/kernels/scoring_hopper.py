"""The Hopper kernel of block scores, in Gluon (scoring.py says what it computes and when it is taken).

A program has one warp group and 128 columns (queries × heads of a KV head); two programs share an SM. Tiles of compressed
tokens come by bulk copies; while the exponents of one are taken, the tensor cores are at the next. A tile holds the tokens of one
residue in 64 blocks, so kc is copied as [blocks, tokens of a block, …], whose blocks need not be those of a sequence.
Written for Triton 3.6's Gluon.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.banded_hopper import await_tile, copied_in_bulk, shared_layout
from nsa.kernels.launch import launch

COLUMNS = 128
"""Queries × heads (padded to a power of two) of a program."""
BLOCKS = 64
"""Blocks of a tile; the first one serves the second one only."""


@gluon.jit
def fill_tokens(desc, keys, ready, number, first_token, column, BLOCKS: gl.constexpr, PER_BLOCK: gl.constexpr):
    """Starts the copy of the `number`-th tile: tokens of residue number % PER_BLOCK of a sequence whose first token is `first_token`."""
    slot = number % keys.type.shape[0]
    # one block later, as a tile begins with the block before its own, which the first sequence does not have
    token = first_token + number // PER_BLOCK * (BLOCKS - 1) * PER_BLOCK + number % PER_BLOCK
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    place = keys.index(slot)._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [token // PER_BLOCK - 1, token % PER_BLOCK, column], ready.index(slot), place)


@gluon.jit
def sum_heads(x, QUERIES: gl.constexpr, LOW_QUERIES: gl.constexpr, HIGH_HEADS: gl.constexpr, LOW_HEADS: gl.constexpr):
    """[blocks, columns] → [blocks, queries / LOW_QUERIES, LOW_QUERIES]: the sum over the heads of the group, all of them in one thread."""
    split = x.reshape([x.shape[0], QUERIES // LOW_QUERIES, HIGH_HEADS, LOW_QUERIES, LOW_HEADS])
    return gl.sum(gl.sum(split, 4), 2)


@gluon.jit
def add_scores(
    own, scores, lse, scale, number, visible_blocks, seen, seen_by_all, Out, width,
    BLOCKS: gl.constexpr, QUERIES: gl.constexpr, PER_BLOCK: gl.constexpr, LOW_QUERIES: gl.constexpr, HIGH_HEADS: gl.constexpr,
    LOW_HEADS: gl.constexpr, MMA: gl.constexpr, FLAT: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """A tile's share of its blocks' scores added to `own`; LAST: the tile may be the last of its blocks, whose scores are written then."""
    residue, first_block = number % PER_BLOCK, number // PER_BLOCK * (BLOCKS - 1) - 1
    p = gl.exp2(scores * scale - lse[None, :])
    if (first_block + BLOCKS) * PER_BLOCK > seen_by_all:
        tokens = (first_block + gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, MMA))) * PER_BLOCK + residue
        p = gl.where(tokens[:, None] < seen[None, :], p, 0.0)
    p = sum_heads(p, QUERIES, LOW_QUERIES, HIGH_HEADS, LOW_HEADS)
    # what the first row had from the blocks before does not count, and neither do its own scores: it belongs to another tile
    own = own * gl.minimum(residue, 1).to(gl.float32) + p * gl.minimum(PER_BLOCK - residue, 2).to(gl.float32)
    if LAST:  # noqa: SIM102 (one is known when compiled, the other is not)
        if residue == PER_BLOCK - 1:
            rows = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, FLAT))
            block = first_block + rows
            total = gl.convert_layout(own.reshape([BLOCKS, QUERIES]), FLAT)
            source = gl.maximum(rows - 1, 0)[:, None] + gl.zeros([BLOCKS, QUERIES], gl.int32, layout=FLAT)
            moved = gl.gather(gl.convert_layout(p.reshape([BLOCKS, QUERIES]), FLAT), source, 0)
            total = total + gl.where((block > 0)[:, None], moved, 0.0)
            stored = (rows > 0) & (block < visible_blocks)
            queries = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, FLAT))
            gl.store(Out + (queries * width)[None, :] + block[:, None], total, mask=stored[:, None])
    return own


@gluon.jit(do_not_specialize=["first_tile"])
def score_kernel(
    desc, tensors, tables, strides, first_tile, width, scale,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, COLUMNS: gl.constexpr, BLOCKS: gl.constexpr, PER_BLOCK: gl.constexpr, STRIDE: gl.constexpr,
    LENGTH: gl.constexpr, SELECT: gl.constexpr, CHOSEN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of one query tile and KV head: fp32 [tile in chunk, Hkv, QUERIES, width]; those of `scoring.score_kernel`."""
    Q, Lse, Scores = tensors
    Tiles, QueryEnds, KeyEnds, CompressedEnds = tables
    stride_q, stride_qh, stride_kh, stride_l, stride_lh = strides
    DTYPE: gl.constexpr = desc.dtype
    DIM: gl.constexpr = desc.block_type.shape[2]
    QUERIES: gl.constexpr = COLUMNS // GROUP_PAD
    LOW_HEADS: gl.constexpr = 2 if GROUP_PAD > 1 else 1
    HIGH_HEADS: gl.constexpr = GROUP_PAD // LOW_HEADS
    LOW_QUERIES: gl.constexpr = 4 if QUERIES >= 4 else QUERIES
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    tile, kv_head = gl.program_id(0), gl.program_id(1)
    sequence, start = gl.load(Tiles + 2 * (first_tile + tile)), gl.load(Tiles + 2 * (first_tile + tile) + 1)
    query_start, key_start, first_token = gl.load(QueryEnds + sequence), gl.load(KeyEnds + sequence), gl.load(CompressedEnds + sequence)
    num_queries = gl.load(QueryEnds + sequence + 1) - query_start
    offset = gl.load(KeyEnds + sequence + 1) - key_start - num_queries
    visible_blocks = (gl.minimum(start + QUERIES, num_queries) - 1 + offset) // SELECT + 1
    if visible_blocks > CHOSEN:  # otherwise there is nothing to choose: every visible block is taken
        keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCKS, DIM], gl.NVMMASharedLayout.get_default_for([BLOCKS, DIM], DTYPE))
        q_tile = gl.allocate_shared_memory(DTYPE, [COLUMNS, DIM], gl.NVMMASharedLayout.get_default_for([COLUMNS, DIM], DTYPE))
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
        fence_async_shared()
        count = gl.cdiv(visible_blocks, BLOCKS - 1) * PER_BLOCK
        for i in gl.static_range(STAGES):
            if i < count:
                fill_tokens(desc, keys, ready, i, first_token, kv_head * stride_kh, BLOCKS, PER_BLOCK)
        row = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, wide))
        head = kv_head * GROUP + (row // (LOW_HEADS * LOW_QUERIES)) % HIGH_HEADS * LOW_HEADS + row % LOW_HEADS
        query = start + row // (LOW_HEADS * LOW_QUERIES * HIGH_HEADS) * LOW_QUERIES + (row // LOW_HEADS) % LOW_QUERIES
        valid = (query < num_queries) & (head < (kv_head + 1) * GROUP)
        at = Q + (query_start + query).to(gl.int64) * stride_q + head * stride_qh
        dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))[None, :]
        q_tile.store(gl.load(at[:, None] + dims, mask=valid[:, None], other=0.0))
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
        head = kv_head * GROUP + (column // (LOW_HEADS * LOW_QUERIES)) % HIGH_HEADS * LOW_HEADS + column % LOW_HEADS
        query = start + column // (LOW_HEADS * LOW_QUERIES * HIGH_HEADS) * LOW_QUERIES + (column // LOW_HEADS) % LOW_QUERIES
        valid = (query < num_queries) & (head < (kv_head + 1) * GROUP)
        lse = gl.load(Lse + (query_start + query).to(gl.int64) * stride_l + head * stride_lh, mask=valid, other=float("inf")) * 1.4426950408889634
        lse = gl.where(lse == float("-inf"), 0.0, lse)
        seen = gl.maximum(query + offset + 1 - LENGTH + STRIDE, 0) // STRIDE
        seen_by_all = gl.maximum(start + offset + 1 - LENGTH + STRIDE, 0) // STRIDE
        out = Scores + (tile * gl.num_programs(1) + kv_head).to(gl.int64) * QUERIES * width
        fence_async_shared()
        gl.thread_barrier()

        transposed = q_tile.permute((1, 0))
        zeros = gl.zeros([BLOCKS, COLUMNS], gl.float32, layout=mma)
        own = sum_heads(zeros, QUERIES, LOW_QUERIES, HIGH_HEADS, LOW_HEADS)
        even = warpgroup_mma(keys.index(await_tile(ready, 0)), transposed, zeros, use_acc=False, is_async=True)
        for pair in range(0, count // 2 - 1):
            scores = warpgroup_mma_wait(0, deps=[even])
            odd = warpgroup_mma(keys.index(await_tile(ready, 2 * pair + 1)), transposed, zeros, use_acc=False, is_async=True)
            gl.thread_barrier()
            if 2 * pair + STAGES < count:
                fill_tokens(desc, keys, ready, 2 * pair + STAGES, first_token, kv_head * stride_kh, BLOCKS, PER_BLOCK)
            own = add_scores(
                own, scores, lse, scale, 2 * pair, visible_blocks, seen, seen_by_all, out, width,
                BLOCKS, QUERIES, PER_BLOCK, LOW_QUERIES, HIGH_HEADS, LOW_HEADS, mma, flat, False,
            )  # fmt: skip
            scores = warpgroup_mma_wait(0, deps=[odd])
            even = warpgroup_mma(keys.index(await_tile(ready, 2 * pair + 2)), transposed, zeros, use_acc=False, is_async=True)
            gl.thread_barrier()
            if 2 * pair + 1 + STAGES < count:
                fill_tokens(desc, keys, ready, 2 * pair + 1 + STAGES, first_token, kv_head * stride_kh, BLOCKS, PER_BLOCK)
            own = add_scores(
                own, scores, lse, scale, 2 * pair + 1, visible_blocks, seen, seen_by_all, out, width,
                BLOCKS, QUERIES, PER_BLOCK, LOW_QUERIES, HIGH_HEADS, LOW_HEADS, mma, flat, True,
            )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[even])
        odd = warpgroup_mma(keys.index(await_tile(ready, count - 1)), transposed, zeros, use_acc=False, is_async=True)
        own = add_scores(
            own, scores, lse, scale, count - 2, visible_blocks, seen, seen_by_all, out, width,
            BLOCKS, QUERIES, PER_BLOCK, LOW_QUERIES, HIGH_HEADS, LOW_HEADS, mma, flat, False,
        )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[odd])
        add_scores(
            own, scores, lse, scale, count - 1, visible_blocks, seen, seen_by_all, out, width,
            BLOCKS, QUERIES, PER_BLOCK, LOW_QUERIES, HIGH_HEADS, LOW_HEADS, mma, flat, True,
        )  # fmt: skip


def takes(q: torch.Tensor, kc: torch.Tensor, per_block: int, per_token: int) -> bool:
    """Whether these kernels score the tensors, given a GPU that runs them: few heads would be too many queries' sums."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and kc.shape[2] in (64, 128)
        and 2 < q.shape[1] // kc.shape[1] <= 64
        and (per_block % 2, per_token) == (0, 2)
        and copied_in_bulk(kc)
    )


def whole_blocks(kc: torch.Tensor, per_block: int) -> torch.Tensor:
    """kc, or a copy whose number of rows is a multiple of `per_block`."""
    missing = -kc.shape[0] % per_block
    return torch.nn.functional.pad(kc, (0, 0, 0, 0, 0, missing)) if missing else kc


def write_scores(
    q: torch.Tensor, kc: torch.Tensor, lse: torch.Tensor, scores: torch.Tensor, tables: tuple[torch.Tensor, ...],
    chunk: tuple[int, int, int], constants: dict[str, int], *, scale: float,
) -> None:  # fmt: skip
    """Scores of a chunk (first tile, number of tiles, width) of the tiles of COLUMNS // GROUP_PAD queries.

    Args:
        kc: as `whole_blocks` gives it. tables: query tiles, ends of queries, keys and compressed tokens. scale: on q·k, times log2(e).
    """
    first, count, width = chunk
    heads, per_block, row = kc.shape[1], constants["PER_BLOCK"], kc.stride(0)
    box = [BLOCKS, 1, kc.shape[2]]
    shape, strides = [kc.shape[0] // per_block, per_block, (heads - 1) * kc.stride(1) + kc.shape[2]], [per_block * row, row, 1]
    desc = TensorDescriptor(kc, shape, strides, box, shared_layout(box, kc.dtype))
    launch(
        score_kernel, (count, heads), desc, (q, lse, scores), tables, (*q.stride()[:2], kc.stride(1), *lse.stride()), first, width, scale,
        **constants, COLUMNS=COLUMNS, BLOCKS=BLOCKS, STAGES=4, num_warps=4,
    )  # fmt: skip
