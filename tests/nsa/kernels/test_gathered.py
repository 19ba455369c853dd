"""The block-major kernels against those that share blocks, which test_selected.py holds against dense attention."""

from dataclasses import replace

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels import gathered, inverse, selected, selected_keys
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan
from nsa.testing import cumulative, relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, compressor="mean")


@pytest.fixture
def shapes(monkeypatch):
    """Changes entries of the table."""

    def change(**changes):
        table = gathered.gather_shapes
        monkeypatch.setattr(gathered, "gather_shapes", lambda *arguments: replace(table(*arguments), **changes))

    return change


def set_limit(monkeypatch, limit):
    """The total of union sizes above which the block-major kernels do the work."""
    monkeypatch.setattr(selected, "most_shared", lambda *_: limit)


def cuts_of(chunk):
    return lambda plan, _: inverse.query_cuts(plan, chunk)


def random_selection(lengths, query_lengths, num_kv_heads, config, *, forced):
    """int32 `[T, Hkv, n]` of visible blocks; `forced`: the first and the last two among them."""
    generator, n, rows = torch.Generator().manual_seed(0), config.num_selected_blocks, []
    for length, num_queries in zip(lengths, query_lengths):
        for t in range(length - num_queries, length):
            current = t // config.select_block_size
            kept = {0, max(current - 1, 0), current} if forced else set()
            for _ in range(num_kv_heads):
                others = [b for b in torch.randperm(current + 1, generator=generator).tolist() if b not in kept]
                blocks = sorted([*kept, *others[: n - len(kept)]])
                rows.append(blocks + [-1] * (n - len(blocks)))
    return torch.tensor(rows, dtype=torch.int32).view(sum(query_lengths), num_kv_heads, n).to(DEVICE)


def draw(num_queries, num_keys, num_kv_heads, group, key_dim, value_dim, dtype):
    """q, k, v, gate, d_out, delta, the outputs before and dq before."""
    generator, num_heads = torch.Generator().manual_seed(1), num_kv_heads * group
    sizes = [(num_queries, num_heads, key_dim), (num_keys, num_kv_heads, key_dim), (num_keys, num_kv_heads, value_dim), (num_queries, num_heads)]
    sizes += [(num_queries, num_heads, value_dim), (num_queries, num_heads), (num_queries, num_heads, value_dim), (num_queries, num_heads, key_dim)]
    x = [torch.randn(*size, generator=generator).to(DEVICE) for size in sizes]
    x[3] = x[3].sigmoid()
    return [y if i in (5, 7) else y.to(dtype) for i, y in enumerate(x)]


def run(inputs, selection, lengths, query_lengths, config, *, accumulate=True, deterministic=False):
    """out, branch output, LSE, dq, dk, dv."""
    q, k, v, gate, d_out, delta, out, dq = (x.clone() for x in inputs)
    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device(DEVICE))
    kept, lse = selected_forward(
        q, k, v, selection, plan, config, scale=0.3, gate=gate, out=out, accumulate=accumulate, keep=True, deterministic=deterministic
    )
    dk, dv = selected_backward(d_out, q, k, v, selection, lse, delta, gate, plan, config, scale=0.3, dq=dq, dq_before=dq, deterministic=deterministic)
    return out, kept, lse.exp(), dq, dk, dv


def compare(monkeypatch, lengths, query_lengths=None, config=SMALL, *, num_kv_heads=1, group=2, key_dim=16, value_dim=16, dtype=torch.float32,
    chunk=20, forced=True, selection=None, accumulate=True,
):  # fmt: skip
    query_lengths = query_lengths or lengths
    inputs = draw(sum(query_lengths), sum(lengths), num_kv_heads, group, key_dim, value_dim, dtype)
    if selection is None:
        selection = random_selection(lengths, query_lengths, num_kv_heads, config, forced=forced)
    arguments = (inputs, selection, lengths, query_lengths, config)
    monkeypatch.setattr(gathered, "query_cuts", cuts_of(chunk))
    monkeypatch.setattr(selected, "may_gather", lambda *_: False)
    wanted = run(*arguments, accumulate=accumulate)
    monkeypatch.setattr(selected, "may_gather", lambda *_: True)
    set_limit(monkeypatch, 10**9)
    for got, want in zip(run(*arguments, accumulate=accumulate), wanted, strict=True):
        assert torch.equal(got, want)  # the block-major kernels have left everything alone
    set_limit(monkeypatch, 0)
    results = run(*arguments, accumulate=accumulate)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == want.dtype and relative_rms(got, want) <= tolerance
    return results


@pytest.mark.parametrize(("group", "forced"), [(1, True), (3, False)])
def test_groups(monkeypatch, group, forced):
    compare(monkeypatch, [40], group=group, forced=forced)


def test_packed_sequences_and_unequal_dims(monkeypatch):
    compare(monkeypatch, [30, 1, 0, 14], num_kv_heads=1, key_dim=24, value_dim=40, accumulate=False)


def test_chunked_queries_and_odd_blocks(monkeypatch):
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=12, num_selected_blocks=3, compressor="mean")
    compare(monkeypatch, [33, 50], [5, 16], config, forced=False, chunk=10)


def test_several_heads_in_one_launch_and_no_shared_blocks(monkeypatch, shapes):
    shapes(shared_blocks=False)
    compare(monkeypatch, [48], [6], num_kv_heads=2, chunk=1000)


def test_parts_of_long_lists(monkeypatch, shapes):
    shapes(part=10)
    compare(monkeypatch, [40], [16], forced=False, chunk=40)


def test_ranges_of_one_head_each(monkeypatch, shapes):
    shapes(scratch=1)
    monkeypatch.setattr(inverse, "MAX_BOUNDS", 1)
    compare(monkeypatch, [40], [10], num_kv_heads=2, chunk=6)


def test_more_forced_blocks(monkeypatch):
    config = SparsityConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=6, num_init_blocks=2, num_local_blocks=3, compressor="mean"
    )
    compare(monkeypatch, [50], [20], config, forced=False)


def test_half_precision(monkeypatch):
    compare(monkeypatch, [60], [12], dtype=torch.float16)


def test_rows_that_see_nothing(monkeypatch):
    selection = torch.full((40, 1, 4), -1, dtype=torch.int32, device=DEVICE)
    selection[::2, 0, 0] = 0
    selection[5, 0, 0] = 2  # a block after the query
    compare(monkeypatch, [40], selection=selection)


def alone_and_packed(monkeypatch, lengths, config, *, group, dim, dtype, chunk):
    """Checks that the second of three sequences gets the same bits as by itself, with `deterministic`."""
    monkeypatch.setattr(gathered, "query_cuts", cuts_of(chunk))
    before, own, after = lengths
    inputs = draw(own, own, 1, group, dim, dim, dtype)
    selection = random_selection([own], [own], 1, config, forced=False)
    alone = run(inputs, selection, [own], [own], config, deterministic=True)
    pack = [torch.cat([x[:before], x, x[:after]]) for x in (*inputs, selection)]
    together = run(pack[:-1], pack[-1], lengths, lengths, config, deterministic=True)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[before : before + own], b)


@pytest.mark.parametrize(("group", "dtype"), [(2, torch.float16), (16, torch.float16), (2, torch.float32)])
def test_deterministic_results_do_not_depend_on_the_batch(monkeypatch, group, dtype):
    monkeypatch.setattr(gathered, "MIN_BLOCKS", 0)
    set_limit(monkeypatch, 0)
    monkeypatch.setattr(selected_keys, "PART_ROWS", 10 * group)
    alone_and_packed(monkeypatch, [5, 40, 20], SMALL, group=group, dim=16, dtype=dtype, chunk=24)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dtype"), [(4, torch.bfloat16), (16, torch.bfloat16), (4, torch.float32)])
def test_deterministic_results_at_paper_settings(monkeypatch, group, dtype):
    monkeypatch.setattr(gathered, "MIN_BLOCKS", 0)
    set_limit(monkeypatch, 0)
    alone_and_packed(monkeypatch, [100, 900, 300], SparsityConfig(compressor="mean"), group=group, dim=128, dtype=dtype, chunk=256)


def test_the_rule():
    config = SparsityConfig(compressor="mean")

    def rule(group, length, block_bytes=2**15, dtype=torch.bfloat16):
        plan = KernelPlan(torch.tensor([0, length]), None, config=config, device=torch.device("cpu"))
        return gathered.may_gather(group, plan, config, block_bytes, dtype)

    assert rule(8, 8193) and not rule(8, 8192) and not rule(9, 8193)
    assert not rule(8, 8193, block_bytes=2**18) and not rule(8, 8193, dtype=torch.float32)


@pytest.mark.parametrize("spread", [False, True])
def test_the_choices_decide(monkeypatch, spread):
    """Neighbours that choose alike stay with the shared blocks; those that choose differently go block by block."""
    monkeypatch.setattr(gathered, "MIN_BLOCKS", 0)
    config = replace(SMALL, select_block_size=8, num_selected_blocks=1, num_init_blocks=0, num_local_blocks=1)
    inputs = draw(20, 100, 1, 2, 16, 16, torch.float16)
    selection = torch.arange(20).clamp(max=11 if spread else 2).view(20, 1, 1).to(DEVICE, torch.int32)
    calls = []
    kernel = gathered.launch

    def spy(which, grid, *arguments, **settings):
        kernel(which, grid, *arguments, **settings)
        if which is gathered.merge_kernel:
            calls.append(int(arguments[3]) > settings_limit(arguments))

    def settings_limit(arguments):
        return arguments[-2]

    monkeypatch.setattr(gathered, "launch", spy)
    run(inputs, selection, [100], [20], config)
    assert calls == [spread]


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "key_dim", "value_dim"), [(16, 128, 128), (4, 128, 128), (3, 64, 64), (7, 96, 96), (2, 192, 128), (1, 256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paper_settings(monkeypatch, group, key_dim, value_dim, dtype):
    options = {"num_kv_heads": 2, "group": group, "key_dim": key_dim, "value_dim": value_dim, "dtype": dtype}
    compare(monkeypatch, [3000, 63], [1500, 63], SparsityConfig(compressor="mean"), chunk=512, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper(monkeypatch, group, dtype):
    if not selected.runs_hopper_kernels(torch.device(DEVICE, 0)):
        pytest.skip("no Hopper GPU with Triton 3.6")
    config = SparsityConfig(compressor="mean")
    lengths, query_lengths = [1500, 63], [900, 63]
    arguments = (
        draw(963, 1563, 2, group, 128, 128, dtype),
        random_selection(lengths, query_lengths, 2, config, forced=False),
        lengths,
        query_lengths,
    )
    monkeypatch.setattr(selected_keys, "PART_ROWS", 4096)
    results = run(*arguments, config)
    for module in (selected, selected_keys):
        monkeypatch.setattr(module, "takes_hopper", lambda *_: False)
    for number, (got, want) in enumerate(zip(results, run(*arguments, config), strict=True)):
        assert relative_rms(got, want) <= 1e-2
        assert torch.equal(got, want) == (group <= 2 and number < 4)  # groups of 1 and 2 have the same forward and the same dq
