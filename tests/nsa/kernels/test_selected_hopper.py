"""dq of the selected branch on Hopper beside Triton's: on a GPU, and elsewhere by a stand-in for Gluon."""

import pytest
import torch
from gluon_stand_in import StandIn, gluon_functions

from nsa.config import SparsityConfig
from nsa.kernels import banded, selected
from nsa.kernels.launch import launch
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan
from nsa.testing import cumulative, random_selection, relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_hopper(patch):
    """The Hopper kernel for dq; by the stand-in, on two processors, where there is no GPU."""
    if DEVICE == "cuda":
        return
    kernel = pytest.importorskip("nsa.kernels.selected_dq_hopper")
    sources = gluon_functions([kernel, *(pytest.importorskip(f"nsa.kernels.{name}") for name in ("banded_hopper", "banded_hopper_dq"))])
    patch.setattr(kernel, "num_processors", lambda device: 2)
    patch.setattr(kernel, "dq_kernel", StandIn("dq_kernel", sources))
    patch.setattr(selected, "dq_takes_hopper", lambda *_: True)


def compare(monkeypatch, lengths, query_lengths, group, heads, dim, *, before, n=5, dtype=torch.float16):
    """Triton's and the Hopper kernel's dq are the same, and so are the bits of a query whoever its neighbours are. Keys and values of the
    second sequence are NaN: they lie behind the first one's, in the tile that holds its last block, and reach nobody else."""
    config = SparsityConfig(compressor="mean", num_selected_blocks=n)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    num_queries, num_keys, num_heads = sum(query_lengths), sum(lengths), heads * group
    q, d_out, k, v = draw(num_queries, num_heads, dim), draw(num_queries, num_heads, dim), draw(num_keys, heads, dim), draw(num_keys, heads, dim)
    selection = random_selection(lengths, query_lengths, heads, config, generator).to(DEVICE)
    key_ends, query_ends = cumulative(lengths), cumulative(query_lengths)
    seen = torch.ones(num_queries, dtype=torch.bool, device=DEVICE)
    gate, old = draw(num_queries, num_heads).sigmoid(), draw(num_queries, num_heads, dim)
    gate[::5] = 0.0
    plan = KernelPlan(query_ends, key_ends, config=config, device=torch.device(DEVICE))
    out = torch.empty_like(d_out)
    branch, lse = selected_forward(q, k, v, selection, plan, config, scale=0.2, gate=gate, out=out, accumulate=False, keep=True)
    assert branch is not None
    delta = gate.float() * (d_out.float() * branch.float()).sum(-1)
    if len(lengths) > 1:
        k[key_ends[1] : key_ends[2]], v[key_ends[1] : key_ends[2]] = torch.nan, torch.nan
        seen[query_ends[1] : query_ends[2]] = False

    def dq_of(chosen):
        dq = old.clone() if before else torch.full_like(old, torch.nan)
        rest = {"scale": 0.2, "dq": dq, "dq_before": dq if before else None, "deterministic": True}
        selected_backward(d_out, q, k, v, chosen, lse, delta, gate, plan, config, **rest)
        return dq

    calls = []
    monkeypatch.setattr(selected, "launch", lambda kernel, *rest, **settings: calls.append(kernel) or launch(kernel, *rest, **settings))
    with monkeypatch.context() as patch:
        patch.setattr(selected, "dq_takes_hopper", lambda *_: False)
        plain = dq_of(selection)
    assert calls == [selected.selected_dq_kernel]
    with monkeypatch.context() as patch:
        use_hopper(patch)
        special = dq_of(selection)
        others = selection.clone()
        others[1::2] = -1
        alone = dq_of(others)
    assert len(calls) == 1
    assert not special[seen].isnan().any()
    assert relative_rms(special[seen], plain[seen].double()) <= (2e-3 if dtype == torch.float16 else 1e-2)
    assert torch.equal(alone[::2][seen[::2]], special[::2][seen[::2]])


@pytest.mark.parametrize(
    ("lengths", "query_lengths", "group", "heads", "dim", "before"),
    [
        ([300, 70], [90, 70], 16, 1, 64, True),
        ([300, 1, 70], [90, 1, 40], 4, 2, 64, False),
        ([700], [70], 3, 1, 64, True),
        ([500, 66], [7, 66], 48, 1, 128, True),
    ],
)
def test_dq_agrees_with_triton(monkeypatch, lengths, query_lengths, group, heads, dim, before):
    compare(monkeypatch, lengths, query_lengths, group, heads, dim, before=before)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (3, 64), (7, 128), (64, 64)])
@pytest.mark.parametrize("before", [True, False])
def test_dq_agrees_with_triton_on_the_gpu(monkeypatch, group, dim, before):
    if not banded.runs_hopper_kernels(torch.device(DEVICE, 0)):
        pytest.skip("no Hopper GPU with Triton 3.6")
    compare(monkeypatch, [4000, 63, 1, 1500], [4000, 63, 1, 400], group, 2, dim, before=before, n=16, dtype=torch.bfloat16)
