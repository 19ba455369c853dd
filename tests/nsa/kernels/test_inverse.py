"""invert_selection against lists built by a plain loop."""

from itertools import pairwise

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels.counted_inverse import invert_where
from nsa.kernels.inverse import cut_lists, invert_selection, query_cuts
from nsa.kernels.tiles import KernelPlan
from nsa.testing import cumulative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_selection(lengths, query_lengths, num_kv_heads, config, seed=0):
    """int32 `[T, Hkv, n]` of visible blocks, the query's own among them."""
    generator = torch.Generator().manual_seed(seed)
    n, rows = config.num_selected_blocks, []
    for length, num_queries in zip(lengths, query_lengths):
        for t in range(length - num_queries, length):
            current = t // config.select_block_size
            for _ in range(num_kv_heads):
                others = torch.randperm(current, generator=generator)[: n - 1].tolist()
                blocks = sorted([*others, current])
                rows.append(blocks + [-1] * (n - len(blocks)))
    return torch.tensor(rows, dtype=torch.int32).view(sum(query_lengths), num_kv_heads, n)


@pytest.mark.parametrize(
    ("lengths", "query_lengths"), [([1], [1]), ([63, 1, 7, 111], [63, 1, 7, 111]), ([100, 63, 200], [100, 5, 33]), ([8, 0, 9], [8, 0, 9])]
)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_lists(lengths, query_lengths, num_kv_heads):
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=5, compressor="mean")
    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device(DEVICE))
    selection = random_selection(lengths, query_lengths, num_kv_heads, config)
    index = invert_selection(selection.to(DEVICE), plan, config)
    counts = [-(-length // 8) for length in lengths]
    assert index.num_blocks == sum(counts)
    assert index.block_sequence.tolist() == [s for s, count in enumerate(counts) for _ in range(count)]
    assert index.block_ends.tolist() == [sum(counts[:s]) for s in range(len(counts) + 1)]
    lists = [[] for _ in range(num_kv_heads * sum(counts))]
    row = 0
    for s, num_queries in enumerate(query_lengths):
        for _ in range(num_queries):
            for h in range(num_kv_heads):
                for block in selection[row, h].tolist():
                    if block >= 0:
                        lists[h * sum(counts) + sum(counts[:s]) + block].append(row)
            row += 1
    ends, queries = index.ends.tolist(), index.queries.tolist()
    for i, slot in enumerate(index.slots[: ends[-1]].tolist()):
        owner = next(b for b in range(len(lists)) if ends[b] <= i < ends[b + 1])
        block, h = owner % sum(counts), owner // sum(counts)
        s = index.block_sequence[block].item()
        assert selection[queries[i], h, slot] == block - sum(counts[:s])
    assert [queries[a:b] for a, b in pairwise(ends)] == lists


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("sizes", [(64, 256), (4, 256), (4, 3)])
def test_counted_where_the_total_is_above_the_limit(monkeypatch, num_kv_heads, sizes):
    """One chunk of queries, many, and as many as there may be; a block after the sequence's last is none, as for the unions."""
    monkeypatch.setattr("nsa.kernels.counted_inverse.MIN_CHUNK", sizes[0])
    monkeypatch.setattr("nsa.kernels.counted_inverse.MAX_CHUNKS", sizes[1])
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=5, compressor="mean")
    lengths, queries = [100, 0, 63, 200], [100, 0, 5, 33]
    plan = KernelPlan(cumulative(queries), cumulative(lengths), config=config, device=torch.device(DEVICE))
    selection = random_selection(lengths, queries, num_kv_heads, config).to(DEVICE)
    total = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    sorted_, counted = invert_selection(selection, plan, config), invert_where(selection, plan, config, total, 7)
    assert torch.equal(counted.ends, sorted_.ends)
    entries = int(sorted_.ends[-1])
    assert torch.equal(counted.queries[:entries], sorted_.queries[:entries]) and torch.equal(counted.slots[:entries], sorted_.slots[:entries])
    without = invert_where(torch.where(selection == selection.max(), selection.max() + 1, selection), plan, config, total, 7)
    assert int(without.ends[-1]) == entries - int((selection == selection.max()).sum())


def test_more_lists_than_int16_counts():
    config = SparsityConfig(compress_block_size=1, compress_stride=1, select_block_size=1, num_selected_blocks=3, compressor="mean")
    plan = KernelPlan(cumulative([2]), cumulative([40000]), config=config, device=torch.device(DEVICE))
    selection = torch.tensor([[[0, 39998, -1]], [[0, 39997, 39999]]], dtype=torch.int32, device=DEVICE)
    index = invert_selection(selection, plan, config)
    lists = {b: index.queries[index.ends[b] : index.ends[b + 1]].tolist() for b in (0, 39996, 39997, 39998, 39999)}
    assert lists == {0: [0, 1], 39996: [], 39997: [1], 39998: [0], 39999: [1]}


def test_cuts_lie_at_multiples_from_each_sequence_s_own_start():
    config = SparsityConfig(compressor="mean")
    plan = KernelPlan(cumulative([5, 25, 0, 3, 10]), None, config=config, device=torch.device(DEVICE))
    cuts, device_cuts = query_cuts(plan, 10)
    assert cuts == [0, 5, 15, 25, 33, 43] == device_cuts.tolist()


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("local", [-1, 2])
def test_work_covers_every_entry_once(monkeypatch, backward, local):
    monkeypatch.setattr("nsa.kernels.inverse.MAX_BOUNDS", 40)
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=5, compressor="mean")
    lengths, queries, heads, part = [63, 1, 100], [40, 1, 90], 2, 7
    plan = KernelPlan(cumulative(queries), cumulative(lengths), config=config, device=torch.device(DEVICE))
    index = invert_selection(random_selection(lengths, queries, heads, config).to(DEVICE), plan, config)
    cuts, device_cuts = query_cuts(plan, 32)
    seen, ends = [], index.ends.tolist()
    for base, work in cut_lists(index, device_cuts, plan, 8, part, 32 * 5, init=1, local=local, backward=backward):
        for number, head in ((number, head) for number in range(work.blocks.shape[0]) for head in range(heads)):
            tables = (work.blocks, work.firsts, work.sizes, work.segments)
            programs = list(zip(*(x[number, head, : work.counts[number, head]].tolist() for x in tables), strict=True))
            if backward:
                counts = work.segment_counts[number, head].tolist()
                places = sorted(place for *_, place in programs if place >= 0)
                assert places == list(range(sum(counts))) and 1 not in counts
            assert not backward or {block for block, *_ in programs} >= set(range(index.num_blocks))
            for block, first, size, _ in programs:
                assert (backward or size) and size <= part
                for entry in range(first, first + max(size, 0)):
                    assert ends[head * index.num_blocks + block] <= entry < ends[head * index.num_blocks + block + 1]
                    assert cuts[base + number] <= index.queries[entry] < cuts[base + number + 1]
                    seen.append(entry)
    wanted = []
    for owner in range(heads * index.num_blocks):
        sequence = int(index.block_sequence[owner % index.num_blocks])
        block = owner % index.num_blocks - int(index.block_ends[sequence])
        for entry in range(ends[owner], ends[owner + 1]):
            position = int(index.queries[entry]) - sum(queries[: sequence + 1]) + lengths[sequence]
            if local < 0 or (block >= 1 and position // 8 >= block + local):
                wanted.append(entry)
    assert sorted(seen) == wanted
