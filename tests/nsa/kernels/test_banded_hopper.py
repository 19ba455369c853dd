"""The Hopper kernels of banded attention beside the Triton ones: on a GPU, elsewhere by a stand-in for Gluon."""

import contextlib

import pytest
import torch
from gluon_stand_in import StandIn, gluon_functions

from nsa.config import SparsityConfig
from nsa.kernels import banded
from nsa.kernels.banded import Band, BandTensors, banded_backward, banded_forward, both_dq, key_gradients
from nsa.kernels.tiles import KernelPlan
from nsa.testing import relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SparsityConfig(compressor="mean")
NARROW = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=50, compressor="mean")


@contextlib.contextmanager
def hopper(monkeypatch):
    """The Hopper kernels; by the stand-in, on two processors, where there is no GPU."""
    if DEVICE == "cuda":
        if not banded.runs_hopper_kernels(torch.device(DEVICE, 0)):
            pytest.skip("no Hopper GPU with Triton 3.6")
        yield
        return
    names = ("banded_hopper", "banded_hopper_dq", "banded_hopper_dkdv")
    modules = {name: pytest.importorskip(f"nsa.kernels.{name}") for name in names}
    sources = gluon_functions(modules.values())
    with monkeypatch.context() as patch:
        patch.setattr(banded, "runs_hopper_kernels", lambda device: True)
        for module, name in zip(modules.values(), ("forward_kernel", "dq_kernel", "dkdv_kernel"), strict=True):
            patch.setattr(module, "num_processors", lambda device: 2, raising=False)
            patch.setattr(module, name, StandIn(name, sources, {"MAX_CHUNKS": banded.MAX_CHUNKS.value}))
        yield


def compare_both_ways(monkeypatch, kind, config, query_lengths, key_lengths, heads, group, dim, dtype=torch.float16):
    """Triton and Hopper kernels give the same on the same inputs; the second sequence is NaN and not looked at."""
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    band = Band(kind, KernelPlan(ends[0], ends[1], config=config, device=torch.device(DEVICE)), config)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    rows, count = sum(query_lengths), int(band.key_ends[-1])
    q, d_out, k, v = normal(rows, heads * group, dim), normal(rows, heads * group, dim), normal(count, heads, dim), normal(count, heads, dim)
    gates = normal(rows, heads * group, 3).sigmoid()
    gates[::5] = 0.0
    places = {}
    for size, sequence_ends, tensors in ((rows, ends[0], (q, d_out, gates)), (count, band.key_ends, (k, v))):
        second = slice(int(sequence_ends[1]), int(sequence_ends[2]))
        for x in tensors:
            x[second] = torch.nan
        places |= {id(x): torch.tensor([i for i in range(size) if not second.start <= i < second.stop], device=DEVICE) for x in tensors}

    def results():
        out = torch.ones_like(q)
        branch, lse = banded_forward(q, k, v, band, scale=0.2, gate=gates[..., 1], out=out, accumulate=kind == "window", keep=True)
        assert branch is not None
        delta = gates[..., 1].float() * (d_out.float() * branch.float()).sum(-1)
        before = torch.ones(q.shape, device=DEVICE) if kind == "window" else None
        dq = torch.full_like(q, torch.nan)
        dk, dv = banded_backward(d_out, q, k, v, lse, delta, gates[..., 1], band, scale=0.2, dq=dq, dq_before=before)
        return [x[places[id(q)]] for x in (out, branch, lse, dq)] + [x[places[id(k)]] for x in (dk, dv)]

    agree(monkeypatch, results, dtype)


def agree(monkeypatch, results, dtype):
    """`results()` is the same on the Triton and on the Hopper kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(banded, "runs_hopper_kernels", lambda device: False)
        plain = results()
    with hopper(monkeypatch):
        special = results()
    for want, got in zip(plain, special, strict=True):
        assert torch.equal(want.isinf(), got.isinf()) and not got.isnan().any()
        assert relative_rms(got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0).double()) <= (2e-3 if dtype == torch.float16 else 1e-2)


def compare_both_bands(monkeypatch, config, query_lengths, key_lengths, heads, group, dim, dtype=torch.float16):
    """One Hopper kernel for dq of both bands gives what the Triton kernels of each give one after the other."""
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    plan = KernelPlan(ends[0], ends[1], config=config, device=torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    rows = sum(query_lengths)
    q, d_out, gates = normal(rows, heads * group, dim), normal(rows, heads * group, dim), normal(rows, heads * group, 3).sigmoid()
    gates[::5] = 0.0
    parts = [
        BandTensors(Band(kind, plan, config), normal(count, heads, dim), normal(count, heads, dim), gates[..., place])
        for kind, count, place in (("compression", plan.num_compressed, 0), ("window", plan.num_keys, 2))
    ]
    calls, dq_of = [], banded.hopper_dq
    monkeypatch.setattr(banded, "hopper_dq", lambda d_out, q, rows, **rest: calls.append(len(rows)) or dq_of(d_out, q, rows, **rest))

    def results():
        lses, deltas = [], []
        for part in parts:
            out = torch.empty_like(q)
            branch, lse = banded_forward(q, part.k, part.v, part.band, scale=0.2, gate=part.gate, out=out, accumulate=False, keep=True)
            assert branch is not None
            lses.append(lse)
            deltas.append(part.gate.float() * (d_out.float() * branch.float()).sum(-1))
        dq = torch.full_like(q, torch.nan)
        stats = both_dq(d_out, q, *parts, tuple(lses), tuple(deltas), scale=0.2, dq=dq)
        gradients = [key_gradients(d_out, q, part.k, part.v, part.band, own, scale=0.2) for part, own in zip(parts, stats, strict=True)]
        return [dq, *gradients[0], *gradients[1]]

    agree(monkeypatch, results, dtype)
    assert calls == [2]


@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim"), [([70, 7, 1, 66], 2, 1, 64), ([50, 1, 20], 1, 3, 64), ([13, 7, 5], 1, 16, 64), ([140, 5, 9], 1, 2, 128)]
)
def test_dq_of_both_bands_in_one_kernel(monkeypatch, lengths, heads, group, dim):
    compare_both_bands(monkeypatch, NARROW, lengths, lengths, heads, group, dim)


def test_dq_of_both_bands_for_the_last_queries_of_longer_keys(monkeypatch):
    compare_both_bands(monkeypatch, NARROW, [90, 3, 2], [140, 9, 66], 1, 1, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (3, 128), (16, 128), (4, 64)])
def test_dq_of_both_bands_in_one_kernel_on_the_gpu(monkeypatch, group, dim):
    compare_both_bands(monkeypatch, CONFIG, [2000, 77, 1, 300], [2100, 80, 1, 1333], 2, group, dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim"), [([70, 7, 1, 66], 2, 1, 64), ([50, 1, 20], 1, 3, 64), ([13, 7, 5], 1, 16, 64), ([70, 5, 9], 1, 2, 128)]
)
def test_agree_with_the_triton_kernels(monkeypatch, kind, lengths, heads, group, dim):
    compare_both_ways(monkeypatch, kind, NARROW, lengths, lengths, heads, group, dim)


@pytest.mark.parametrize(("kind", "length"), [("compression", 700), ("window", 420)])
def test_many_tiles_go_round_the_rings(monkeypatch, kind, length):
    config = SparsityConfig(
        compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=330, compressor="mean"
    )  # fmt: skip
    compare_both_ways(monkeypatch, kind, config, [length, 1], [length, 1], 1, 1, 64)


@pytest.mark.parametrize("kind", ["compression", "window"])
def test_last_queries_of_longer_keys_in_chunks(monkeypatch, kind):
    monkeypatch.setattr(banded, "MIN_CHUNK", 32)
    compare_both_ways(monkeypatch, kind, NARROW, [90, 3, 2], [140, 9, 66], 1, 1, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (3, 128), (16, 128), (4, 64)])
def test_agree_with_the_triton_kernels_on_the_gpu(monkeypatch, kind, group, dim):
    compare_both_ways(monkeypatch, kind, CONFIG, [2000, 77, 1, 300], [2100, 80, 1, 1333], 2, group, dim, dtype=torch.bfloat16)
