"""The choice of blocks in a decode step, and what its kernels have in common with those that attend; see `nsa.kernels.decode`.

`choose_kernel`, or `score_kernel` and `pick_kernel` for tables too long for it. `PDL`: as in decode_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.attention import RECOMPUTE as RECOMPUTE_MARK

NOTHING = tl.constexpr(-1.0e6)
"""Stands for the logit (base 2) of what is not visible."""
RECOMPUTE = tl.constexpr(RECOMPUTE_MARK)
AT_ONCE = tl.constexpr(8)
"""Heads whose scores are on their way at once."""
STATISTICS = tl.constexpr(32)
"""Leaves whose maxima, sums and outputs are read at once."""


@triton.jit
def power_of_two(exponent):
    """2**exponent of whole fp32 numbers <= 0, exactly; 0 below -126."""
    return ((tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tree_sum(x):
    """Sum over the first dimension, neighbours first: padding with zeros or summing aligned parts beforehand changes no bit."""
    for _ in tl.static_range(10):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), 1)
    return tl.reshape(x, (x.shape[1],))


@triton.jit
def add_sum(total, top, sums, tops):
    """`total` relative to 2**top plus the sum over the first dimension of `sums`, relative to 2**tops; and the new top."""
    both = tl.maximum(top, tl.max(tops, 0))
    return total * power_of_two(top - both) + tl.sum(sums * power_of_two(tops - both[None, :]), 0), both


@triton.jit
def load_statistics(leaf_top, leaf_sum, rows, real, start, num_leaves, filled_leaves):
    """Tops and sums `[STATISTICS, rows]` of some rows' leaves from `start` on."""
    leaf = start + tl.arange(0, STATISTICS)
    read = (leaf < filled_leaves)[:, None] & real[None, :]
    spots = (rows * num_leaves)[None, :] + leaf[:, None]
    return tl.load(leaf_top + spots, mask=read, other=NOTHING), tl.load(leaf_sum + spots, mask=read, other=0.0)


@triton.jit
def store_statistics(leaf_top, leaf_sum, row_stats, rows, real, tops, sums, num_leaves, filled_leaves):
    """Of some rows, to `row_stats` `[…, 2]`: the top of their leaves, and 1 / their sum relative to it (0 where nothing is visible).

    `tops`, `sums`: those of the first leaves."""
    top, total = tl.full(rows.shape, NOTHING, tl.float32), tl.zeros(rows.shape, tl.float32)
    for start in range(0, filled_leaves, STATISTICS):
        both = tl.maximum(top, tl.max(tops, 0))
        total, top = total * power_of_two(top - both) + tree_sum(sums * power_of_two(tops - both[None, :])), both
        tops, sums = load_statistics(leaf_top, leaf_sum, rows, real, start + STATISTICS, num_leaves, filled_leaves)
    tl.store(row_stats + 2 * rows, top, mask=real)
    tl.store(row_stats + 2 * rows + 1, tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0), mask=real)


@triton.jit
def load_shares(
    leaf_top, leaf_edge, scores, first_row, first_leaf, num_leaves, filled_leaves, HEAD: tl.constexpr, END: tl.constexpr,
    FIRST: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """What the parts of heads [HEAD, END) of some leaves' scores are made of, all on its way at once: `add_shares` makes scores of it."""
    leaf, group = first_leaf + tl.arange(0, LEAVES)[:, None], tl.arange(0, GROUPS)[None, :]
    inside, follows = leaf < filled_leaves, leaf + 1 < filled_leaves
    shares = ()
    for member in tl.static_range(HEAD, END):
        place = (first_row + member) * num_leaves + leaf
        share = tl.load(scores + place * GROUPS + group, mask=inside & (group >= 0), other=0.0)
        share_top = tl.load(leaf_top + place, mask=inside, other=NOTHING)
        edge, edge_top = share_top, share_top
        if FIRST > 0:
            edge = tl.load(leaf_edge + place + 1, mask=follows, other=0.0)
            edge_top = tl.load(leaf_top + place + 1, mask=follows, other=NOTHING)
        shares = shares + ((share, share_top, edge, edge_top),)  # noqa: RUF005 (Triton adds tuples, and unpacks none)
    return shares


@triton.jit
def add_shares(score, shares, row_stats, first_row, HEAD: tl.constexpr, END: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr):
    """`score` `[LEAVES, GROUPS]` plus the parts of heads [HEAD, END), added in their order."""
    group = tl.arange(0, GROUPS)[None, :]
    for member in tl.static_range(HEAD, END):
        share, share_top, edge, edge_top = shares[member - HEAD]
        top, inverse = tl.load(row_stats + 2 * (first_row + member)), tl.load(row_stats + 2 * (first_row + member) + 1)
        share *= power_of_two(share_top - top)
        if FIRST > 0:
            share += tl.where(group == GROUPS - 1, edge * power_of_two(edge_top - top), 0.0)
        score += share * inverse
    return score


@triton.jit
def add_turn(
    score, leaf_top, leaf_edge, scores, row_stats, first_row, first_leaf, num_leaves, filled_leaves, TURN: tl.constexpr, GROUP: tl.constexpr,
    FIRST: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """`score` plus the parts of the TURN-th AT_ONCE heads."""
    HEAD: tl.constexpr = TURN * AT_ONCE
    END: tl.constexpr = HEAD + AT_ONCE if HEAD + AT_ONCE < GROUP else GROUP
    shares = load_shares(leaf_top, leaf_edge, scores, first_row, first_leaf, num_leaves, filled_leaves, HEAD, END, FIRST, GROUPS, LEAVES)
    return add_shares(score, shares, row_stats, first_row, HEAD, END, FIRST, GROUPS)


@triton.jit(do_not_specialize=["num_leaves", "num_chunks", "programs"])
def score_kernel(
    leaf_top, leaf_sum, leaf_edge, scores, row_stats, chunk_keys, candidates, given, seq_lens, given_batch, given_row, given_head,
    num_leaves, num_chunks, programs, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr,
    PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, NUM: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    CHUNK: tl.constexpr, GIVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best NUM of each of the chunks c, c + `programs`, … of CHUNK blocks for one query and KV head: keys int64
    `[B, m, Hkv, chunks, NUM]`, best first.

    A key is the score's bits, then the block number, lower ones greater; negative = no block."""
    if PDL:
        gdc_launch_dependents()
    head, first_chunk = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    query, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    current = tl.maximum(length - num_new + query, 0) // SIZE
    wanted = (current >= NUM) & (first_chunk * CHUNK <= current)
    if GIVEN:
        wanted = wanted & (tl.load(given + batch * given_batch + query * given_row + head * given_head).to(tl.int32) == RECOMPUTE)
    if PDL:
        gdc_wait()
    if not wanted:
        return
    place = ((batch * num_new + query) * HEADS + head) * num_chunks
    column = tl.arange(0, CHUNK)
    filled_leaves = tl.cdiv(length // STRIDE, GROUPS * PER_BLOCK)
    first_row = ((batch * HEADS + head) * num_new + query) * GROUP
    member = tl.arange(0, GROUP2)
    tops, sums = load_statistics(leaf_top, leaf_sum, first_row + member, member < GROUP, 0, num_leaves, filled_leaves)
    # Programs of other chunks write the same numbers.
    store_statistics(leaf_top, leaf_sum, row_stats, first_row + member, member < GROUP, tops, sums, num_leaves, filled_leaves)
    tl.debug_barrier()
    LEAVES: tl.constexpr = (CHUNK + GROUPS - 1) // GROUPS
    for chunk in range(first_chunk, current // CHUNK + 1, programs):
        blocks = chunk * CHUNK + column
        score = tl.zeros([LEAVES, GROUPS], tl.float32)
        for turn in tl.static_range((GROUP + AT_ONCE - 1) // AT_ONCE):
            score = add_turn(
                score, leaf_top, leaf_edge, scores, row_stats, first_row, chunk * LEAVES, num_leaves, filled_leaves, turn, GROUP, FIRST, GROUPS,
                LEAVES,
            )  # fmt: skip
        score = tl.reshape(score, (CHUNK,))

        forced = (blocks < NUM_INIT) | (blocks > current - NUM_LOCAL)
        bits = tl.where(forced, 0x7F800000, score.to(tl.int32, bitcast=True)).to(tl.int64)
        keys = tl.where(blocks <= current, (bits << 32) | (0x7FFFFFFF - blocks).to(tl.int64), -1 - blocks.to(tl.int64))
        # Through memory, so that the ranking does not inherit the scores' layout, which repeats every element in many threads.
        tl.store(chunk_keys + (place + chunk) * CHUNK + column, keys)
        tl.debug_barrier()
        mine = tl.load(chunk_keys + (place + chunk) * CHUNK + column)
        SLICE: tl.constexpr = 32 if CHUNK > 32 else CHUNK
        better = tl.zeros([SLICE, CHUNK], tl.int32)
        for start in tl.range(0, CHUNK, SLICE, loop_unroll_factor=4):
            others = tl.load(chunk_keys + (place + chunk) * CHUNK + start + tl.arange(0, SLICE))
            better += (others[:, None] > mine[None, :]).to(tl.int32)
        ranks = tl.sum(better, 0)
        tl.store(candidates + (place + chunk) * NUM + ranks, mine, mask=ranks < NUM)


@triton.jit
def best_blocks(candidates, num_keys, NUM: tl.constexpr, NUM2: tl.constexpr, CANDIDATES: tl.constexpr):
    """The NUM best of `num_keys` keys: block numbers `[NUM2]` ascending, then −1."""
    SLICE: tl.constexpr = 32 if CANDIDATES > 32 else CANDIDATES
    entry, order = tl.arange(0, CANDIDATES), tl.arange(0, NUM2)
    keys = tl.load(candidates + entry, mask=entry < num_keys, other=-1)
    better = tl.zeros([SLICE, CANDIDATES], tl.int32)
    for start in tl.range(0, num_keys, SLICE, loop_unroll_factor=4):
        place = start + tl.arange(0, SLICE)
        others = tl.load(candidates + place, mask=place < num_keys, other=-1)
        better += (others[:, None] > keys[None, :]).to(tl.int32)
    ranks = tl.sum(better, 0)
    chosen = (keys >= 0) & (ranks < NUM)
    blocks = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    plus_one = tl.sum(tl.where(chosen[None, :] & (ranks[None, :] == order[:, None]), blocks[None, :] + 1, 0), 1)
    taken = tl.where(plus_one > 0, plus_one, 0x7FFFFFFF - order)
    places = tl.sum((taken[None, :] < taken[:, None]).to(tl.int32), 1)
    ascending = tl.sum(tl.where(places[None, :] == order[:, None], plus_one[None, :], 0), 1) - 1
    return ascending


@triton.jit
def all_or_given(given, position, given_entry, order, SIZE: tl.constexpr, NUM: tl.constexpr, GIVEN: tl.constexpr):
    """All blocks `[NUM2]` of one query, ascending, then −1; or the row at `given` where that is to be replayed."""
    return or_given(tl.where(order <= position // SIZE, order, -1), given, given_entry, order, NUM, GIVEN)


@triton.jit
def or_given(chosen, given, given_entry, order, NUM: tl.constexpr, GIVEN: tl.constexpr):
    """`chosen`, or the row at `given` where that is to be replayed."""
    if GIVEN:
        replayed = tl.load(given + order * given_entry, mask=order < NUM, other=-1).to(tl.int32)
        chosen = tl.where(tl.load(given).to(tl.int32) == RECOMPUTE, chosen, replayed)
    return chosen


@triton.jit(do_not_specialize=["num_leaves"])
def choose_kernel(
    leaf_top, leaf_sum, leaf_edge, scores, row_stats, given, selection, seq_lens, given_batch, given_row, given_head, given_entry,
    num_leaves, num_new,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP2: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr,
    PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr, SIZE: tl.constexpr, NUM: tl.constexpr, NUM2: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, GIVEN: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The selection: a program for each query and KV head.

    The scores of all blocks lie in registers; the NUM-th best is found by trying two numbers at a time, and of blocks that equal it the
    first ones are taken. LATE: what comes next is launched once the compressed tokens are done, not beside them."""
    if PDL and not LATE:
        gdc_launch_dependents()
    head, query, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    current = tl.maximum(length - num_new + query, 0) // SIZE
    order = tl.arange(0, NUM2)
    entry = (batch * num_new + query) * HEADS + head
    target = selection + entry * NUM
    replay = length < 0
    if GIVEN:
        row = given + batch * given_batch + query * given_row + head * given_head
        replay = (length > 0) & (tl.load(row).to(tl.int32) != RECOMPUTE)
    if PDL:
        gdc_wait()
        if LATE:
            gdc_launch_dependents()
    if replay | (length == 0) | (current < NUM):
        chosen = tl.where((order <= current) & (length > 0), order, -1)
        if GIVEN:
            replayed = tl.load(row + order * given_entry, mask=order < NUM, other=-1).to(tl.int32)
            chosen = tl.where(replay, replayed, chosen)
        tl.store(target + order, chosen.to(selection.dtype.element_ty), mask=order < NUM)
        return
    filled_leaves = tl.cdiv(length // STRIDE, GROUPS * PER_BLOCK)
    first_row = ((batch * HEADS + head) * num_new + query) * GROUP
    member = tl.arange(0, GROUP2)
    FEW: tl.constexpr = AT_ONCE if AT_ONCE < GROUP else GROUP
    # Statistics first, as what follows needs them first.
    tops, sums = load_statistics(leaf_top, leaf_sum, first_row + member, member < GROUP, 0, num_leaves, filled_leaves)
    shares = load_shares(leaf_top, leaf_edge, scores, first_row, 0, num_leaves, filled_leaves, 0, FEW, FIRST, GROUPS, LEAVES)
    store_statistics(leaf_top, leaf_sum, row_stats, first_row + member, member < GROUP, tops, sums, num_leaves, filled_leaves)
    tl.debug_barrier()
    score = add_shares(tl.zeros([LEAVES, GROUPS], tl.float32), shares, row_stats, first_row, 0, FEW, FIRST, GROUPS)
    for turn in tl.static_range(1, (GROUP + AT_ONCE - 1) // AT_ONCE):
        score = add_turn(score, leaf_top, leaf_edge, scores, row_stats, first_row, 0, num_leaves, filled_leaves, turn, GROUP, FIRST, GROUPS, LEAVES)
    block = tl.arange(0, LEAVES * GROUPS)
    bits = tl.reshape(score, (LEAVES * GROUPS,)).to(tl.int32, bitcast=True)
    bits = tl.where((block < NUM_INIT) | (block > current - NUM_LOCAL), 0x7F800000, bits)
    bits = tl.where(block <= current, tl.maximum(bits, 0), -1)  # scores are >= 0 or NaN: whatever they are, NUM blocks are chosen
    # A number that just NUM blocks reach, or the greatest that NUM do. `least` is reached by NUM and `beyond` by fewer; between them two
    # numbers are tried at a time: first not far below the best score, then further and further down, then at the thirds.
    best = tl.max(tl.where(bits < 0x7F800000, bits, -1), 0)
    beyond = best + 1 if NUM_INIT + NUM_LOCAL < NUM else best * 0 + 0x7F800001
    least, found, way = best * 0, best * 0, best * 0 + (1 << 22)
    while (found != NUM) & (beyond - least > 1):
        third = (beyond - least) // 3
        upper, lower = least + third * 2, least + third
        if least == 0:
            upper = tl.maximum(beyond - way, 1)
            lower = tl.maximum(upper - way * 4, 1)
            way = tl.minimum(way, 1 << 24) * 16
        upper, lower = tl.maximum(upper, least + 1), tl.maximum(lower, least + 1)
        counts = tl.sum((bits >= lower).to(tl.int32) + ((bits >= upper).to(tl.int32) << 16), 0)
        if (counts >> 16) >= NUM:
            least = upper
            found = counts >> 16
        else:
            beyond = upper
            if (counts & 0xFFFF) >= NUM:
                least = lower
                found = counts & 0xFFFF
            else:
                beyond = lower
    taken = bits >= least
    if found != NUM:
        equal = bits == least
        left = NUM - tl.sum((bits > least).to(tl.int32), 0)
        taken = (bits > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(target + place, block.to(selection.dtype.element_ty), mask=taken & (place < NUM))  # more where scores are NaN


@triton.jit(do_not_specialize=["num_chunks"])
def pick_kernel(
    seq_lens, candidates, given, selection, given_batch, given_row, given_head, given_entry, num_chunks, num_new,
    HEADS: tl.constexpr, SIZE: tl.constexpr, NUM: tl.constexpr, NUM2: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr,
    GIVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The selection of one query and KV head from the chunks' candidates."""
    if PDL:
        gdc_launch_dependents()
    head, query, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + batch).to(tl.int32)
    if PDL:
        gdc_wait()
    order = tl.arange(0, NUM2)
    entry = (batch * num_new + query) * HEADS + head
    chosen = tl.full([NUM2], -1, tl.int32)
    if length > 0:
        position = tl.maximum(length - num_new + query, 0)
        # Where no more than NUM blocks exist nothing was ranked: no keys, and all of the blocks.
        some = position // SIZE >= NUM
        num_keys = tl.where(some, tl.minimum(position // SIZE // CHUNK + 1, num_chunks) * NUM, 0)
        chosen = best_blocks(candidates + entry * num_chunks * NUM, num_keys, NUM, NUM2, CANDIDATES)
        chosen = tl.maximum(chosen, tl.where(order <= tl.where(some, -1, position // SIZE), order, -1))
        row = given + batch * given_batch + query * given_row + head * given_head
        chosen = or_given(chosen, row, given_entry, order, NUM, GIVEN)
    tl.store(selection + entry * NUM + order, chosen.to(selection.dtype.element_ty), mask=order < NUM)
