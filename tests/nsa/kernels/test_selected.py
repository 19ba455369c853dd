"""selected_forward and selected_backward against dense fp64 attention with a mask, differentiated by autograd."""

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels import selected, selected_keys
from nsa.kernels.inverse import cut_lists, invert_selection, whole_range
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan, Tile
from nsa.testing import cumulative, random_selection, relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=3, compressor="mean")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def dense(q, k, v, selection, lengths, query_lengths, config, scale):
    """Branch output and LSE from dense masked attention in the inputs' dtype."""
    group, outs, logs, row, first = q.shape[1] // k.shape[1], [], [], 0, 0
    for length, num_queries in zip(lengths, query_lengths):
        rows, keys = slice(row, row + num_queries), slice(first, first + length)
        position = torch.arange(length - num_queries, length)[:, None]
        block = torch.arange(length) // config.select_block_size
        mask = (selection[rows].cpu()[..., None] == block).any(2) & (torch.arange(length) <= position)[:, None]
        mask = mask.repeat_interleave(group, dim=1)
        logits = torch.einsum("thd,shd->ths", q[rows], k[keys].repeat_interleave(group, dim=1)) * scale
        logits = logits.masked_fill(~mask, -torch.inf)
        some = mask.any(-1, keepdim=True)
        p = torch.softmax(torch.where(some, logits, 0.0), dim=-1) * some
        outs.append(torch.einsum("ths,shd->thd", p, v[keys].repeat_interleave(group, dim=1)))
        logs.append(torch.logsumexp(logits, dim=-1))
        row, first = row + num_queries, first + length
    return torch.cat(outs), torch.cat(logs)


def check(
    lengths, config=SMALL, *, query_lengths=None, num_kv_heads=2, group=2, key_dim=16, value_dim=8, dtype=torch.float32, selection=None, twice=False
):
    query_lengths, generator, scale = query_lengths or lengths, torch.Generator().manual_seed(0), 0.3
    num_queries, num_keys, num_heads = sum(query_lengths), sum(lengths), num_kv_heads * group

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = draw(num_queries, num_heads, key_dim), draw(num_keys, num_kv_heads, key_dim), draw(num_keys, num_kv_heads, value_dim)
    gates, d_out = torch.rand(num_queries, num_heads, 3, generator=generator).to(dtype), draw(num_queries, num_heads, value_dim)
    if selection is None:
        selection = random_selection(lengths, query_lengths, num_kv_heads, config, generator)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    branch, log = dense(*exact, selection, lengths, query_lengths, config, scale)
    gate = gates[..., 1].double()
    (branch * gate[..., None] * d_out.double()).sum().backward()

    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device(DEVICE))
    poison = torch.full((num_keys + 40, num_kv_heads, 2 * max(key_dim, value_dim)), torch.nan, dtype=dtype, device=DEVICE)
    k_in, v_in = poison.clone()[20 : 20 + num_keys, :, :key_dim].copy_(k), poison.clone()[20 : 20 + num_keys, :, :value_dim].copy_(v)
    q, gates, d_out, selection = (x.to(DEVICE) for x in (q, gates, d_out, selection))
    before = draw(num_queries, num_heads, value_dim).to(DEVICE)
    out = before.clone()
    options = {"scale": scale, "gate": gates[..., 1]}
    kept, lse = selected_forward(q, k_in, v_in, selection, plan, config, **options, out=out, accumulate=True, keep=True)
    tolerance = TOLERANCE[dtype]
    assert kept is not None and kept.dtype == dtype and lse.dtype == torch.float32
    assert relative_rms(kept, branch) <= tolerance
    assert relative_rms(out, before.cpu().double() + branch * gate[..., None]) <= tolerance
    finite = log.isfinite()
    assert torch.equal(lse.cpu().isfinite(), finite) and not lse.isnan().any()
    assert relative_rms(lse.cpu()[finite], log[finite]) <= 1e-5
    if twice:
        plain = torch.full_like(out, torch.nan)
        none, _ = selected_forward(q, k_in, v_in, selection, plan, config, **options, out=plain, accumulate=False, keep=False)
        assert none is None and relative_rms(plain, branch * gate[..., None]) <= tolerance

    delta = (branch.detach() * gate[..., None] * d_out.cpu().double()).sum(-1).float().to(DEVICE)
    old = torch.randn(num_queries, num_heads, key_dim, generator=generator).to(DEVICE)
    results = []
    backward = (d_out, q, k_in, v_in, selection, lse, delta, gates[..., 1], plan, config)
    for _ in range(1 + twice):
        dq = old.clone()
        dk, dv = selected_backward(*backward, scale=scale, dq=dq, dq_before=dq)
        results.append((dq, dk, dv))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    if twice:
        own = torch.full_like(q, torch.nan)
        selected_backward(*backward, scale=scale, dq=own)
        assert relative_rms(own, exact[0].grad) <= 2 * tolerance
    if dtype != torch.float32:  # as a model asks for it: added up in its own precision
        total = old.to(dtype)
        selected_backward(*backward, scale=scale, dq=total, dq_before=total)
        assert relative_rms(total, old.to(dtype).cpu().double() + exact[0].grad) <= 2 * tolerance
    assert dk.dtype == dv.dtype == dtype
    for got, want in zip((dq - old, dk, dv), exact, strict=True):
        assert relative_rms(got, want.grad) <= 2 * tolerance
    return kept, dq, dk, dv


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_groups(group):
    check([36, 1], group=group, num_kv_heads=1)


def test_packed_sequences_and_unequal_dims():
    check([5, 1, 20], key_dim=24, value_dim=40, twice=True)


def test_chunked_queries():
    check([63, 111], query_lengths=[5, 9], value_dim=16)


@pytest.mark.parametrize(("l", "d", "block", "n"), [(4, 4, 8, 5), (8, 4, 12, 3), (16, 8, 80, 3)])
def test_other_block_sizes(l, d, block, n):
    config = SparsityConfig(compress_block_size=l, compress_stride=d, select_block_size=block, num_selected_blocks=n, compressor="mean")
    check([111], config, query_lengths=[12], num_kv_heads=1)


def test_half_precision():
    check([63], query_lengths=[16], num_kv_heads=1, dtype=torch.float16)


def test_long_lists_are_added_from_segments(monkeypatch):
    monkeypatch.setattr(selected_keys, "PART_ROWS", 20)
    check([40, 9], num_kv_heads=1)


def test_small_tiles_of_queries(monkeypatch):
    monkeypatch.setattr(selected, "query_tile", lambda *_, **__: Tile(keys=16, rows=16, num_warps=4, num_stages=1))
    check([50, 1, 14], group=3, num_kv_heads=1, twice=True)


@pytest.mark.parametrize("ordered", [4, 64])
def test_parts_run_in_the_order_of_their_first_queries(monkeypatch, ordered):
    """Blocks that nobody chose come last, and every part has its place."""
    monkeypatch.setattr(selected_keys, "ORDERED", ordered)
    plan = KernelPlan(cumulative([40, 1, 90]), None, config=SMALL, device=torch.device(DEVICE))
    selection = random_selection([40, 1, 90], [40, 1, 90], 2, SMALL, torch.Generator().manual_seed(0)).to(DEVICE)
    selection[selection == 1] = -1
    index = invert_selection(selection, plan, SMALL)
    ((_, work),) = cut_lists(index, whole_range(plan), plan, SMALL.select_block_size, 7, selection[:, 0].numel(), init=0, local=-1, backward=True)
    order = selected_keys.by_first_query(index, work)
    for head, count in enumerate(work.counts[0, :, 0].tolist()):
        parts = list(zip(work.firsts[0, head, :count].tolist(), work.sizes[0, head, :count].tolist(), strict=True))
        assert any(size == 0 for _, size in parts) and count > 32
        wanted = sorted(range(count), key=lambda part: (int(index.queries[parts[part][0]]) if parts[part][1] else 2**31 - 1, part))
        assert order[head, :count].tolist() == wanted


@pytest.mark.parametrize(("sizes", "part"), [([8, 8, 8], 7), ([7, 14, 0], 7), ([21], 7), ([6, 6, 6], 7), ([1], 7), ([9, 1, 30, 7], 4)])
def test_there_is_room_for_every_segment(sizes, part):
    parts = [-(-size // part) for size in sizes]
    assert sum(count for count in parts if count > 1) <= selected_keys.most_segments(sum(sizes), part, len(sizes))


def test_room_for_segments_is_no_more_than_twice_what_full_parts_take():
    assert [selected_keys.most_segments(*x) for x in ((0, 7, 3), (6, 7, 3), (70, 7, 3), (70, 7, 30))] == [1, 1, 13, 20]


@pytest.mark.parametrize("group", [1, 3])
def test_block_major(monkeypatch, group):
    monkeypatch.setattr(selected, "may_gather", lambda *_: True)
    monkeypatch.setattr(selected, "most_shared", lambda *_: 0)
    check([50, 1, 14], group=group, num_kv_heads=1, value_dim=24, twice=group == 1)


def test_rows_that_see_nothing():
    selection = torch.full((20, 1, 3), -1, dtype=torch.int32)
    selection[::2, 0, 0] = 0
    selection[5, 0] = torch.tensor([1, -1, -1])  # a block after the query
    kept, *_ = check([20], num_kv_heads=1, selection=selection)
    assert not kept[1].any() and not kept[5].any()


def test_a_sequence_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    q, k, v, d_out = (torch.randn(36, heads, 16, generator=generator).to(DEVICE) for heads in (4, 2, 2, 4))
    selection = random_selection([36], [36], 2, SMALL, generator).to(DEVICE)
    gate, delta = torch.rand(36, 4, generator=generator).to(DEVICE), torch.randn(36, 4, generator=generator).to(DEVICE)

    def run(x, lengths):
        q, k, v, d_out, selection, gate, delta = x
        plan = KernelPlan(cumulative(lengths), cumulative(lengths), config=SMALL, device=torch.device(DEVICE))
        out, dq = torch.zeros_like(d_out), torch.zeros_like(q)
        _, lse = selected_forward(q, k, v, selection, plan, SMALL, scale=0.3, gate=gate, out=out, accumulate=False, keep=False)
        return out, lse, dq, *selected_backward(d_out, q, k, v, selection, lse, delta, gate, plan, SMALL, scale=0.3, dq=dq, dq_before=dq)

    alone = [q, k, v, d_out, selection, gate, delta]
    for a, b in zip(run([torch.cat([x[:5], x]) for x in alone], [5, 36]), run(alone, [36]), strict=True):
        assert torch.equal(a[5:], b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim"), [(16, 128, 128), (4, 128, 128), (16, 64, 64), (3, 64, 64), (7, 96, 96), (2, 192, 128), (1, 256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_paper_settings(group, key_dim, value_dim, dtype):
    check([1500, 63], SparsityConfig(compressor="mean"), query_lengths=[400, 63], group=group, key_dim=key_dim, value_dim=value_dim, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [16, 4])
def test_blocks_that_nobody_chose(group):
    generator = torch.Generator().manual_seed(0)
    picks = torch.stack([torch.randperm(20, generator=generator)[:15].sort().values for _ in range(300)])
    selection = torch.cat([picks, (3800 + torch.arange(300))[:, None] // 64], 1)[:, None].int()
    check(
        [4100], SparsityConfig(compressor="mean"), query_lengths=[300], group=group, num_kv_heads=1, key_dim=128, value_dim=128,
        dtype=torch.bfloat16, selection=selection,
    )  # fmt: skip
