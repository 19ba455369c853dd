"""Band kernels against dense fp64 attention written from the visibility rule."""

import itertools

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels import banded
from nsa.kernels.banded import Band, banded_backward, banded_forward
from nsa.kernels.tiles import KernelPlan
from nsa.testing import relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6, compressor="mean")
WIDE = SparsityConfig(compress_block_size=4, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=40, compressor="mean")


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def make_plan(key_lengths, query_lengths, config):
    return KernelPlan(ends(query_lengths), ends(key_lengths), config=config, device=torch.device(DEVICE))


def seen(kind, config, num_queries, num_keys, count):
    """bool `[num_queries, count]`: does query t, at position t + num_keys − num_queries, see key i of the band."""
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(count)
    if kind == "compression":
        return key * config.compress_stride + config.compress_block_size - 1 <= position
    return (key <= position) & (key > position - config.window_size)


def dense(q, k, v, gate, band, query_lengths, key_lengths, scale):
    """Gated output, output and LSE in fp64, one sequence and head at a time."""
    group = q.shape[1] // k.shape[1]
    band_ends = band.key_ends.tolist()
    outs, sums = [], []
    for index, (rows, total) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        first = sum(query_lengths[:index])
        keys = slice(band_ends[index], band_ends[index + 1])
        mask = seen(band.kind, band.config, rows, total, keys.stop - keys.start)
        out, lse = [], []
        for head in range(q.shape[1]):
            scores = (q[first : first + rows, head] @ k[keys, head // group].T * scale).masked_fill(~mask, -torch.inf)
            sees = mask.any(dim=1, keepdim=True)
            weights = torch.where(sees, scores, 0.0).softmax(dim=1) * sees
            out.append(weights @ v[keys, head // group])
            lse.append(scores.logsumexp(dim=1) if mask.shape[1] else scores.new_full((rows,), -torch.inf))
        outs.append(torch.stack(out, dim=1))
        sums.append(torch.stack(lse, dim=1))
    out, lse = torch.cat(outs), torch.cat(sums)
    return gate[..., None] * out, out, lse


def draw(band, key_lengths, query_lengths, heads, group, key_dim, value_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = int(band.key_ends[-1])
    queries = sum(query_lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(queries, heads * group, key_dim), normal(count, heads, key_dim), normal(count, heads, value_dim)
    gates = torch.rand(queries, heads * group, 3, generator=generator, dtype=torch.float64).to(dtype)
    gates[::5] = 0.0
    return q, k, v, gates, normal(queries, heads * group, value_dim)


def check(kind, config, key_lengths, query_lengths, heads, group, key_dim, value_dim, dtype=torch.float32, bound=1e-5, accumulate=True):
    """Forward and every gradient against autograd of `dense`."""
    band = Band(kind, make_plan(key_lengths, query_lengths, config), config)
    q, k, v, gates, d_out = draw(band, key_lengths, query_lengths, heads, group, key_dim, value_dim, dtype)
    scale = key_dim**-0.5
    exact = [x.double().requires_grad_() for x in (q, k, v, gates[..., 1])]
    want, want_branch, want_lse = dense(*exact, band, query_lengths, key_lengths, scale)
    grads = torch.autograd.grad(want, exact[:3], d_out.double())

    q, k, v, gates, d_out = (x.to(DEVICE) for x in (q, k, v, gates, d_out))
    gate = gates[..., 1]
    start = torch.ones(*q.shape[:2], value_dim, dtype=dtype, device=DEVICE)
    out = start.clone() if accumulate else torch.full_like(start, torch.nan)
    branch, lse = banded_forward(q, k, v, band, scale=scale, gate=gate, out=out, accumulate=accumulate, keep=True)
    assert relative_rms(out, want + (1.0 if accumulate else 0.0)) <= bound
    assert relative_rms(branch, want_branch) <= bound
    assert torch.equal(lse.isinf().cpu(), want_lse.isinf())
    assert relative_rms(lse.nan_to_num(neginf=0.0), want_lse.nan_to_num(neginf=0.0)) <= bound

    delta = torch.rand(*q.shape[:2], 3, dtype=torch.float32, device=DEVICE)
    delta[..., 1] = gate.float() * (d_out.float() * want_branch.detach().float().to(DEVICE)).sum(-1)
    dq = torch.ones(q.shape, dtype=torch.float32, device=DEVICE)
    dk, dv = banded_backward(d_out, q, k, v, lse, delta[..., 1], gate, band, scale=scale, dq=dq, dq_before=dq)
    assert dk.dtype == dv.dtype == dtype
    for got, expected in zip((dq, dk, dv), (grads[0] + 1.0, *grads[1:]), strict=True):
        assert relative_rms(got, expected) <= bound


@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(("group", "heads"), [(1, 2), (3, 1), (7, 1), (16, 1)])
def test_matches_dense_attention_for_every_group_size(kind, group, heads):
    lengths = [1, 63, 7] if group == 1 else [1, 40, 7] if group < 4 else [1, 13, 5]
    check(kind, SMALL, lengths, lengths, heads, group, 16, 16)


@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(8, 16), (32, 8), (24, 48)])
def test_matches_dense_attention_for_odd_head_dims(kind, key_dim, value_dim):
    check(kind, SMALL, [33, 9], [33, 9], 1, 2, key_dim, value_dim)


@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize("config", [SMALL, WIDE])
def test_queries_may_be_the_last_tokens_of_longer_keys(kind, config):
    check(kind, config, [90, 20, 9, 3], [20, 10, 1, 2], 1, 3, 16, 32, accumulate=False)


@pytest.mark.parametrize("window", [1, 64])
def test_window_widths(window):
    config = SparsityConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=window, compressor="mean"
    )  # fmt: skip
    check("window", config, [97, 5], [97, 5], 1, 1, 16, 16)


@pytest.mark.parametrize("kind", ["compression", "window"])
def test_half_precision(kind):
    check(kind, WIDE, [100, 7], [100, 7], 1, 2, 32, 32, dtype=torch.float16, bound=3e-3)


@pytest.mark.parametrize("group", [1, 3])
def test_long_sequences_are_split_into_chunks_of_queries(monkeypatch, group):
    monkeypatch.setattr(banded, "MIN_CHUNK", 32)
    check("compression", SMALL, [100, 20], [70, 20], 1, group, 16, 16)


def check_isolation(kind, config, lengths, group, dim, dtype):
    """The middle one of three sequences, with NaN in the others' gates, gradients and inputs: bit-equal to itself alone."""
    middle = slice(lengths[0], lengths[0] + lengths[1])
    band = Band(kind, make_plan(lengths, lengths, config), config)
    alone = Band(kind, make_plan(lengths[1:2], lengths[1:2], config), config)
    q, k, v, gates, d_out = (x.to(DEVICE) for x in draw(band, lengths, lengths, 1, group, dim, dim, dtype))
    keys = slice(int(band.key_ends[1]), int(band.key_ends[2]))
    for x in (q, gates, d_out):
        x[: middle.start], x[middle.stop :] = torch.nan, torch.nan
    for x in (k, v):
        x[: keys.start], x[keys.stop :] = torch.nan, torch.nan
    results = []
    for one, rows, cols in ((band, middle, keys), (alone, slice(None), slice(None))):
        part = slice(None) if one is band else middle
        key_part = slice(None) if one is band else keys
        arguments = (q[part], k[key_part], v[key_part])
        out = torch.full_like(d_out[part], torch.nan)
        branch, lse = banded_forward(*arguments, one, scale=0.25, gate=gates[part][..., 0], out=out, accumulate=False, keep=True)
        assert branch is not None
        delta = gates[part][..., 0].float() * (d_out[part].float() * branch.float()).sum(-1)
        dq = torch.full_like(arguments[0], torch.nan)
        dk, dv = banded_backward(d_out[part], *arguments, lse, delta, gates[part][..., 0], one, scale=0.25, dq=dq)
        results.append([out[rows], lse[rows], dq[rows], dk[cols], dv[cols]])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
        assert not got.isnan().any()


@pytest.mark.parametrize("kind", ["compression", "window"])
def test_nan_outside_the_sequence_does_not_reach_it(kind):
    check_isolation(kind, SMALL, [9, 35, 9], 3, 16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize("lengths", [[200, 1500, 77], [700, 1, 700], [64, 45, 1300]])
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (3, 64), (1, 64)])
def test_nan_outside_the_sequence_does_not_reach_it_on_the_gpu(kind, lengths, group, dim):
    check_isolation(kind, SparsityConfig(compressor="mean"), lengths, group, dim, torch.bfloat16)


def test_strided_inputs_and_an_unkept_branch():
    band = Band("window", make_plan([40], [40], SMALL), SMALL)
    q, k, v, gates, _ = (x.to(DEVICE) for x in draw(band, [40], [40], 2, 2, 16, 16, torch.float32))
    outs = []
    for query, key, value in ((q, k, v), (q.transpose(0, 1).contiguous().transpose(0, 1), k.transpose(1, 2).contiguous().transpose(1, 2), v)):
        out = torch.empty_like(q)
        branch, _ = banded_forward(query, key, value, band, scale=0.25, gate=gates[..., 2], out=out, accumulate=False, keep=False)
        assert branch is None
        outs.append(out)
    assert torch.equal(*outs)


def test_dq_goes_to_a_tensor_of_its_own_dtype():
    """The branch's part alone, in fp32 and in q's dtype, and with what other branches gave before."""
    band = Band("window", make_plan([40], [40], SMALL), SMALL)
    q, k, v, gates, d_out = (x.to(DEVICE) for x in draw(band, [40], [40], 2, 2, 16, 16, torch.float16))
    before = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    _, lse = banded_forward(q, k, v, band, scale=0.25, gate=gates[..., 0], out=torch.empty_like(q), accumulate=False, keep=False)

    def gradient(dtype, dq_before):
        dq = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
        banded_backward(d_out, q, k, v, lse, lse, gates[..., 0], band, scale=0.25, dq=dq, dq_before=dq_before)
        return dq

    alone = gradient(torch.float32, None)
    assert torch.equal(gradient(torch.float16, None), alone.half())
    assert torch.equal(gradient(torch.float32, before), alone + before)
    assert torch.equal(gradient(torch.float16, before), (alone + before).half())


def test_no_rows():
    band = Band("compression", make_plan([3], [3], SMALL), SMALL)
    q, k, v, gates, d_out = (x.to(DEVICE) for x in draw(band, [3], [3], 1, 2, 16, 16, torch.float32))
    out = torch.full_like(q, torch.nan)
    _, lse = banded_forward(q, k, v, band, scale=0.25, gate=gates[..., 0], out=out, accumulate=False, keep=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    dq = torch.full_like(q, torch.nan)
    dk, dv = banded_backward(d_out, q, k, v, lse, torch.zeros_like(lse), gates[..., 0], band, scale=0.25, dq=dq)
    assert dk.shape == dv.shape == (0, 1, 16) and (dq == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(
    ("heads", "group", "key_dim", "value_dim"), [(2, 16, 128, 128), (2, 4, 128, 128), (3, 3, 64, 64), (1, 8, 192, 128), (1, 2, 256, 256)]
)
def test_bf16_on_the_gpu(kind, heads, group, key_dim, value_dim):
    check(kind, SparsityConfig(compressor="mean"), [2000, 333], [2000, 300], heads, group, key_dim, value_dim, dtype=torch.bfloat16, bound=1e-2)


@pytest.mark.gpu
def test_runs_are_bit_equal_on_the_gpu():
    config = SparsityConfig(compressor="mean")
    for kind in ("compression", "window"):
        band = Band(kind, make_plan([4096], [4096], config), config)
        q, k, v, gates, d_out = (x.to(DEVICE) for x in draw(band, [4096], [4096], 2, 16, 128, 128, torch.bfloat16))
        results = []
        for _ in range(2):
            out = torch.empty_like(q)
            branch, lse = banded_forward(q, k, v, band, scale=0.1, gate=gates[..., 0], out=out, accumulate=False, keep=True)
            dq = torch.empty(q.shape, device=DEVICE)
            results.append((out, branch, lse, dq, *banded_backward(d_out, q, k, v, lse, lse, gates[..., 0], band, scale=0.1, dq=dq)))
        assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


def test_units_of_key_gradients_are_all_there_once_and_the_longest_first():
    """A sequence whose sixteenth is 1,024 queries takes chunks of 1,088; short ones one chunk; the window's tiles are whole."""
    config = SparsityConfig(compressor="mean")
    query_lengths, key_lengths = [16384, 600, 30], [16384, 1500, 30]
    plan = make_plan(key_lengths, query_lengths, config)
    units = banded.key_units(Band("compression", plan, config), 128, banded.MIN_CHUNK).tolist()
    seen, sizes = set(), []
    for sequence, start, chunk in units:
        size = 1088 if sequence == 0 else banded.MIN_CHUNK
        first = max(start * 16 + 31 - (key_lengths[sequence] - query_lengths[sequence]), chunk * size)
        sizes.append(min((chunk + 1) * size, query_lengths[sequence]) - first)
        seen.add((sequence, start, chunk))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0 and len(seen) == len(units)
    total = sum(max(0, length - max(start * 16 + 31 - (keys - length), 0)) for length, keys in zip(query_lengths, key_lengths, strict=True)
                for start in range(0, (keys - 32) // 16 + 1 if keys >= 32 else 0, 128))  # fmt: skip
    assert sum(sizes) == total
    tiles = banded.key_units(Band("window", plan, config), 128, 0).tolist()
    assert sorted(tiles) == [[sequence, start, 0] for sequence, keys in enumerate(key_lengths) for start in range(0, keys, 128)]


def test_units_of_a_window_are_the_chunks_in_which_a_query_sees_a_key_of_the_tile():
    config = SparsityConfig(compressor="mean", window_size=100)
    query_lengths, key_lengths = [1500, 1, 40], [1500, 70, 900]
    plan, size = make_plan(key_lengths, query_lengths, config), banded.chunk_size(1500)
    expected = {}
    for sequence, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        rows, columns = ((key <= position) & (key > position - 100)).nonzero().T
        for start, chunk, query in torch.stack([columns // 128 * 128, rows // size, rows], 1).unique(dim=0).tolist():
            expected.setdefault((sequence, start, chunk), []).append(query)
    units = [tuple(unit) for unit in banded.key_units(Band("window", plan, config), 128, banded.MIN_CHUNK).tolist()]
    assert sorted(units) == sorted(expected)
    works = [len(expected[unit]) for unit in units]
    assert works == sorted(works, reverse=True)
