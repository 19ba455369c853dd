"""Computing a common prompt once gives what computing it for every sample gives: outputs, selections, gradients."""

import pytest
import torch

from nsa import NSAForCausalLM
from nsa.packing import plan_shared_prefix
from nsa.testing import tiny_config

PREFIXES, FAMILIES, REST = [40, 40, 40, 77, 60, 60], [0, 0, 0, 1, 2, 2], [20, 31, 1, 9, 25, 60]


def make_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    prompts = {family: torch.randint(0, 50, (PREFIXES[FAMILIES.index(family)],), generator=source) for family in set(FAMILIES)}
    sequences = [torch.cat([prompts[f], torch.randint(0, 50, (n,), generator=source)]) for f, n in zip(FAMILIES, REST)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids = torch.cat(sequences)
    return ids, torch.arange(len(ids)) - ends[:-1].repeat_interleave(lengths), ends


@pytest.mark.parametrize("options", [{}, {"kv": "shared", "gate": "blend", "compressor": "mean"}])
def test_a_shared_prompt_changes_neither_outputs_nor_selections_nor_gradients(options: dict) -> None:
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config(vocab_size=50, **options))
    for name, parameter in model.named_parameters():
        if "down" in name or "branch_mix" in name:
            torch.nn.init.uniform_(parameter, 0.05, 0.2)
    batch = make_batch()
    plan = plan_shared_prefix(batch[2], PREFIXES, FAMILIES)
    assert plan is not None
    assert len(plan.rows_U) == 40 + 60 + 77 + sum(REST)
    rows = torch.tensor([39, 45, len(batch[0]) - 1])
    weights = torch.randn(len(batch[0]), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    results = []
    for shared in (None, plan):
        model.zero_grad()
        out = model.model.forward_packed(*batch, return_selection=True, shared_prefix=shared)
        (out.hidden_TE * weights).sum().backward()
        some = model.model.forward_packed(*batch, shared_prefix=shared, rows_R=rows).hidden_TE
        assert torch.equal(some, out.hidden_TE[rows])
        results.append((out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (once, others) = results
    assert torch.equal(plain.selection, once.selection)
    torch.testing.assert_close(once.hidden_TE, plain.hidden_TE, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 2e-4 * gradient.norm() + 1e-6, name


def test_replayed_selections_go_to_the_shared_rows() -> None:
    torch.manual_seed(0)
    model = NSAForCausalLM(tiny_config(vocab_size=50))
    batch = make_batch()
    plan = plan_shared_prefix(batch[2], PREFIXES, FAMILIES)
    with torch.no_grad():
        chosen = model.model.forward_packed(*batch, return_selection=True)
        again = model.model.forward_packed(*batch, selection=chosen.selection, shared_prefix=plan)
    torch.testing.assert_close(again.hidden_TE, chosen.hidden_TE, atol=1e-5, rtol=1e-5)


def test_nothing_is_planned_where_nothing_is_shared() -> None:
    assert plan_shared_prefix(torch.tensor([0, 10, 20]), [4, 4], [0, 1]) is None
    with pytest.raises(ValueError, match="equal length"):
        plan_shared_prefix(torch.tensor([0, 10, 20]), [4, 5], [0, 0])
