"""The selected branch's forward pass and dq on Hopper beside Triton's: on a GPU, and elsewhere by a stand-in for Gluon."""

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
    """The Hopper kernels; by the stand-in, on two processors, where there is no GPU."""
    if DEVICE == "cuda":
        return
    forward, dq, *shared = (
        pytest.importorskip(f"nsa.kernels.{name}") for name in ("selected_hopper", "selected_dq_hopper", "banded_hopper", "banded_hopper_dq")
    )
    sources = gluon_functions([dq, forward, *shared])
    for module, name in ((forward, "forward_kernel"), (dq, "dq_kernel")):
        patch.setattr(module, "num_processors", lambda device: 2)
        patch.setattr(module, name, StandIn(name, sources))
    patch.setattr(selected, "takes_hopper", lambda *_: True)


def compare(monkeypatch, lengths, query_lengths, group, heads, dim, *, before, n=5, dtype=torch.float16):
    """Triton's and the Hopper kernels' results are the same, and so are the bits of a query whoever its neighbours are. Keys and values of
    the second sequence are NaN: they lie behind the first one's, in the tile that holds its last block, and reach nobody else.

    before: results are added to what is there."""
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

    def forward_of(chosen):
        out = old.clone() if before else torch.full_like(old, torch.nan)
        rest = {"scale": 0.2, "gate": gate, "out": out, "accumulate": before, "deterministic": True}
        branch, lse = selected_forward(q, k, v, chosen, plan, config, **rest, keep=True)
        kept, rest["out"] = out.clone(), old.clone() if before else torch.full_like(old, torch.nan)
        selected_forward(q, k, v, chosen, plan, config, **rest, keep=False)
        assert torch.equal(kept[seen], rest["out"][seen])
        return kept, branch, lse

    def dq_of(chosen, branch, lse):
        dq = old.clone() if before else torch.full_like(old, torch.nan)
        delta = gate.float() * (d_out.float() * branch.float()).sum(-1)
        rest = {"scale": 0.2, "dq": dq, "dq_before": dq if before else None, "deterministic": True}
        selected_backward(d_out, q, k, v, chosen, lse, delta, gate, plan, config, **rest)
        return dq

    calls = []
    monkeypatch.setattr(selected, "launch", lambda kernel, *rest, **settings: calls.append(kernel) or launch(kernel, *rest, **settings))
    with monkeypatch.context() as patch:
        patch.setattr(selected, "takes_hopper", lambda *_: False)
        plain = forward_of(selection)
        if len(lengths) > 1:
            k[key_ends[1] : key_ends[2]], v[key_ends[1] : key_ends[2]] = torch.nan, torch.nan
            seen[query_ends[1] : query_ends[2]] = False
        plain_dq = dq_of(selection, *plain[1:])
    assert calls == [selected.selected_forward_kernel, selected.selected_forward_kernel, selected.selected_dq_kernel]
    with monkeypatch.context() as patch:
        use_hopper(patch)
        special, special_dq = forward_of(selection), dq_of(selection, *plain[1:])
        others = selection.clone()
        others[1::2] = -1
        alone, alone_dq = forward_of(others), dq_of(others, *plain[1:])
    assert len(calls) == 3
    bound = 2e-3 if dtype == torch.float16 else 1e-2
    for name, mine, theirs, single in zip(
        ("out", "branch", "lse", "dq"), (*special, special_dq), (*plain, plain_dq), (*alone, alone_dq), strict=True
    ):
        assert not mine[seen].isnan().any(), name
        assert relative_rms(mine[seen], theirs[seen].double()) <= bound, name
        assert torch.equal(single[::2][seen[::2]], mine[::2][seen[::2]]), name


@pytest.mark.parametrize(
    ("lengths", "query_lengths", "group", "heads", "dim", "before"),
    [
        ([300, 70], [90, 70], 16, 1, 64, True),
        ([300, 1, 70], [90, 1, 40], 4, 2, 64, False),
        ([700], [70], 3, 1, 64, True),
        ([500, 66], [7, 66], 48, 1, 128, True),
    ],
)
def test_results_agree_with_triton(monkeypatch, lengths, query_lengths, group, heads, dim, before):
    compare(monkeypatch, lengths, query_lengths, group, heads, dim, before=before)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (3, 64), (7, 128), (64, 64)])
@pytest.mark.parametrize("before", [True, False])
def test_results_agree_with_triton_on_the_gpu(monkeypatch, group, dim, before):
    if not banded.runs_hopper_kernels(torch.device(DEVICE, 0)):
        pytest.skip("no Hopper GPU with Triton 3.6")
    compare(monkeypatch, [4000, 63, 1, 1500], [4000, 63, 1, 400], group, 2, dim, before=before, n=16, dtype=torch.bfloat16)
