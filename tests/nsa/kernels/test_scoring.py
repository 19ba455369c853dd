"""choose_blocks against a plain fp64 computation of Eq. 8-12 written here."""

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels import scoring
from nsa.kernels.scoring import choose_blocks
from nsa.kernels.tiles import KernelPlan
from nsa.testing import cumulative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, compressor="mean")


def compressed_lengths(lengths, config):
    l, d = config.compress_block_size, config.compress_stride
    return [(length - l) // d + 1 if length >= l else 0 for length in lengths]


def oracle(q, kc, lengths, query_lengths, config, scale):
    """fp64 LSE `[T, Hq]`, and per row the sets that rounding allows: (must hold, may hold, size)."""
    l, d, size, n = config.compress_block_size, config.compress_stride, config.select_block_size, config.num_selected_blocks
    num_kv_heads, group = kc.shape[1], q.shape[1] // kc.shape[1]
    lse, rows, row, first = [], [], 0, 0
    for length, num_queries, num_compressed in zip(lengths, query_lengths, compressed_lengths(lengths, config)):
        k = kc[first : first + num_compressed].double()
        first += num_compressed
        for t in range(length - num_queries, length):
            seen = sum(i * d + l - 1 <= t for i in range(num_compressed))
            row_lse = []
            for h in range(num_kv_heads):
                logits = q[row, h * group : (h + 1) * group].double() @ k[:seen, h].T * scale
                row_lse.append(torch.logsumexp(logits, dim=-1))
                p = torch.softmax(logits, dim=-1).sum(0).tolist() if seen else []
                visible = range(t // size + 1)
                forced = {j for j in visible if j < config.num_init_blocks or j > t // size - config.num_local_blocks}
                scores = {j: sum(max(0, min(i * d + l, (j + 1) * size) - max(i * d, j * size)) // d * p[i] for i in range(seen)) for j in visible}
                free = sorted((j for j in visible if j not in forced), key=lambda j: (-scores[j], j))
                take = max(0, n - len(forced))
                if len(free) <= take:
                    rows.append((set(visible), set(visible), len(visible)))
                    continue
                edge, slack = (scores[free[take - 1]], scores[free[take]]), 1e-5 * max(scores.values())
                sure = {j for j in free if scores[j] > edge[1] + slack}
                possible = {j for j in free if scores[j] >= edge[0] - slack}
                rows.append((forced | sure, forced | possible, n))
            lse.append(torch.cat(row_lse))
            row += 1
    return torch.stack(lse), rows


def check(lengths, config, *, query_lengths=None, num_kv_heads=2, group=2, dim=16, dtype=torch.float32, seed=0):
    query_lengths = query_lengths or lengths
    generator = torch.Generator().manual_seed(seed)
    count = sum(compressed_lengths(lengths, config))
    q = torch.randn(sum(query_lengths), num_kv_heads * group, dim, generator=generator).to(dtype)
    kc = torch.randn(count, num_kv_heads, dim, generator=generator).to(dtype)
    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device(DEVICE))
    lse, rows = oracle(q, kc, lengths, query_lengths, config, 0.3)
    poisoned = torch.full((count + 50, num_kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    poisoned[:count] = kc.to(DEVICE)
    selection = choose_blocks(q.to(DEVICE), poisoned[:count], lse.float().to(DEVICE), plan, config, scale=0.3)
    assert selection.dtype == torch.int32 and selection.shape == (q.shape[0], num_kv_heads, config.num_selected_blocks)
    for got, (sure, possible, size) in zip(selection.flatten(0, 1).tolist(), rows, strict=True):
        assert got[size:] == [-1] * (len(got) - size)
        assert got[:size] == sorted(set(got[:size]))
        assert sure <= set(got[:size]) <= possible
    return selection


@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
def test_groups(group):
    check([111, 1], SMALL, group=group, num_kv_heads=1)


def test_packed_sequences_and_chunked_queries():
    check([63, 1, 7, 130], SMALL)
    check([90, 111], SMALL, query_lengths=[5, 33], dim=24)


@pytest.mark.parametrize(
    "settings",
    [
        {"compress_block_size": 4, "compress_stride": 4, "select_block_size": 4},
        {"compress_block_size": 4, "compress_stride": 4, "select_block_size": 8, "num_init_blocks": 0, "num_local_blocks": 1},
        {"compress_block_size": 12, "compress_stride": 4, "select_block_size": 12, "num_selected_blocks": 5},
        {"compress_block_size": 16, "compress_stride": 4, "select_block_size": 16, "num_selected_blocks": 3},
    ],
)
def test_other_block_sizes(settings):
    config = SparsityConfig(**({"num_selected_blocks": 4, "compressor": "mean"} | settings))
    check([150], config, num_kv_heads=1)


def test_more_blocks_than_a_tile_holds():
    config = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=5, compressor="mean")
    check([300], config, query_lengths=[9], num_kv_heads=1)
    check([600], config, query_lengths=[9], num_kv_heads=1, dtype=torch.float16)


def test_more_chosen_blocks_than_a_quarter_of_the_lanes():
    config = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=40, compressor="mean")
    check([600], config, query_lengths=[5], num_kv_heads=1, group=1)


def test_long_rows_in_one_warp_and_in_several(monkeypatch):
    """1,050 blocks: two warps of 8 repeats each, one warp of 16."""
    config = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=5, compressor="mean")
    generator = torch.Generator().manual_seed(5)
    plan = KernelPlan(cumulative([3]), cumulative([4200]), config=config, device=torch.device(DEVICE))
    q, kc = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((3, 2, 16), (plan.num_compressed, 1, 16)))
    chosen = []
    for scores in (1024, 2048):
        monkeypatch.setattr(scoring, "CHOOSE_SCORES", scores)
        chosen.append(choose_blocks(q, kc, torch.full((3, 2), 5.0, device=DEVICE), plan, config, scale=0.3))
    assert torch.equal(*chosen)
    assert (chosen[0][..., [0, -2, -1]] == torch.tensor([0, 1048, 1049], device=DEVICE)).all()


def test_chunks_of_tiles_give_the_same(monkeypatch):
    whole = check([111, 63], SMALL, num_kv_heads=1)
    monkeypatch.setattr(scoring, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(scoring, "MIN_PROGRAMS", 1)
    assert torch.equal(check([111, 63], SMALL, num_kv_heads=1), whole)


def test_tiles_that_see_less_have_narrower_scores(monkeypatch):
    config = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=5, compressor="mean")
    whole = check([150, 40], config, query_lengths=[150, 33], num_kv_heads=1, group=1)
    monkeypatch.setattr(scoring, "MIN_WIDTH", 4)
    assert torch.equal(check([150, 40], config, query_lengths=[150, 33], num_kv_heads=1, group=1), whole)


@pytest.mark.parametrize(("lengths", "query_lengths"), [([5000], [5000]), ([4096, 64, 1], [4096, 64, 1]), ([9000, 700, 130], [64, 700, 1])])
@pytest.mark.parametrize("queries", [1, 8, 64])
def test_chunks_cover_every_tile_and_are_wide_enough(monkeypatch, lengths, query_lengths, queries):
    monkeypatch.setattr(scoring, "SCRATCH_BYTES", 2**16)
    config = SparsityConfig(compressor="mean")
    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device("cpu"))
    tiles = plan.query_tiles(queries).tolist()
    chunks = scoring.score_chunks(plan, config, queries=queries, num_kv_heads=2, num_tiles=len(tiles))
    assert [tile for first, count, _ in chunks for tile in range(first, first + count)] == list(range(len(tiles)))
    for first, count, width in chunks:
        for sequence, start in tiles[first : first + count]:
            last = min(start + queries, query_lengths[sequence]) - 1 + lengths[sequence] - query_lengths[sequence]
            assert width >= last // config.select_block_size + 1


@pytest.mark.parametrize(("length", "chosen"), [(128, [0, 1, 6, 7]), (3200, [0, 1, 198, 199])])
def test_ties_go_to_the_lower_block(length, chosen):
    plan = KernelPlan(cumulative([4]), cumulative([length]), config=SMALL, device=torch.device(DEVICE))
    q, kc = torch.zeros(4, 2, 16, device=DEVICE), torch.ones(plan.num_compressed, 1, 16, device=DEVICE)
    lse = torch.full((4, 2), 1000.0, device=DEVICE)  # every probability underflows to zero
    assert choose_blocks(q, kc, lse, plan, SMALL, scale=1.0).tolist() == [[chosen]] * 4


def test_a_sequence_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    q, kc, lse = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((111, 4, 16), (26, 2, 16), (111, 4)))

    def choose(q, kc, lse, lengths):
        plan = KernelPlan(cumulative(lengths), cumulative(lengths), config=SMALL, device=torch.device(DEVICE))
        return choose_blocks(q, kc, lse, plan, SMALL, scale=0.3)

    alone = choose(q, kc, lse, [111])
    packed = choose(torch.cat([q[:9], q]), torch.cat([kc[:1], kc]), torch.cat([lse[:9], lse]), [9, 111])
    assert torch.equal(packed[9:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (3, 64), (1, 192)])
def test_paper_settings_in_bf16(group, dim):
    check([2100, 700], SparsityConfig(compressor="mean"), query_lengths=[150, 100], num_kv_heads=2, group=group, dim=dim, dtype=torch.bfloat16)
