"""Packing, step-wide loss weights, what is left out, selections stitched for replay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.batching import build_mini_batches, build_step, pack, stitch_selection, token_weights, with_advantages
from grpo.data_types import Completion, Group, Prompt, Score, ScoredGroup

LOSSES = ("grpo", "token_mean", "dr_grpo", "gspo")


def scored_group(name, prompt_length, lengths, advantages, *, values=None, finish=None, record=False, prompt_record=False):
    def selection(rows, base):
        return (torch.arange(rows * 2 * 1 * 3, dtype=torch.int16) + base).view(rows, 2, 1, 3)

    completions = tuple(
        Completion(
            token_ids=tuple(range(100 * (i + 1), 100 * (i + 1) + n)),
            logprobs=tuple(-0.01 * (t + 1) for t in range(n)),
            text="",
            finish_reason=(finish or ["stop"] * len(lengths))[i],
            policy_version=0,
            selection=selection(n, 1000 * (i + 1)) if record else None,
        )
        for i, n in enumerate(lengths)
    )
    prompt = Prompt(prompt_id=name, token_ids=tuple(range(prompt_length)), question="", answer="", text="")
    return ScoredGroup(
        group=Group(prompt=prompt, completions=completions, prompt_selection=selection(prompt_length, 0) if prompt_record else None),
        scores=tuple(Score(value=v, parts={}) for v in (values or [0.0] * len(lengths))),
        advantages=tuple(advantages),
    )


def build(groups, **options):
    return build_step(groups, **({"loss": "grpo", "micro_batch_tokens": 1000, "max_tokens": 10} | options))


def test_one_micro_batch_holds_the_sequences_token_by_token():
    step = build([scored_group("a", 2, [1, 3], [-0.5, 0.5])])
    (batch,) = step.micro_batches
    assert batch.token_ids_T.tolist() == [0, 1, 100, 0, 1, 200, 201, 202]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens_N1.tolist() == [0, 3, 8]
    assert batch.samples_N2.tolist() == [[0, 0], [0, 1]]
    assert batch.advantages_T.tolist() == [0, 0, -0.5, 0, 0, 0.5, 0.5, 0.5]
    assert batch.sampler_logprobs_T.tolist() == pytest.approx([0, 0, -0.01, 0, 0, -0.01, -0.02, -0.03])
    assert batch.loss_weights_T.tolist() == pytest.approx([0, 0, 1 / 2, 0, 0, 1 / 6, 1 / 6, 1 / 6])
    assert (batch.old_logprobs_T, batch.reference_logprobs_T, batch.selection) == (None, None, None)
    assert (step.num_sequences, step.num_loss_tokens) == (2, 4)


def test_weights_of_each_aggregation():
    assert token_weights([2, 4], loss="grpo", max_tokens=10) == [1 / 4, 1 / 8]
    assert token_weights([2, 4], loss="gspo", max_tokens=10) == [1 / 4, 1 / 8]
    assert token_weights([2, 4], loss="token_mean", max_tokens=10) == [1 / 6, 1 / 6]
    assert token_weights([2, 4], loss="dr_grpo", max_tokens=10) == [1 / 20, 1 / 20]
    with pytest.raises(ValueError, match="token_mean"):
        token_weights([2], loss="sum", max_tokens=10)


def test_dead_groups_unscored_truncated_and_empty_samples_leave_loss_and_counts():
    groups = [
        scored_group("dead", 2, [3, 3], [0.0, 0.0]),
        scored_group("alive", 2, [3, 4, 5, 0], [1.0, 0.0, -1.0, 0.5], values=[1.0, None, 0.0, 0.5], finish=["stop", "stop", "length", "stop"]),
    ]
    assert build(groups).num_sequences == 2
    assert build(groups).num_loss_tokens == 8
    assert build(groups, overlong_filter=True).num_loss_tokens == 3
    kept_dead = build(groups, drop_zero_variance=False)
    assert (kept_dead.num_sequences, kept_dead.num_loss_tokens) == (4, 14)
    only = build(groups, overlong_filter=True).micro_batches[0]
    assert only.loss_weights_T.sum().item() == pytest.approx(1)


def test_a_sample_with_advantage_zero_in_a_live_group_stays_in_the_counts():
    assert build([scored_group("a", 2, [3, 3, 3], [0.5, 0.0, -0.5])]).num_sequences == 3


def test_nothing_left_gives_a_step_without_micro_batches():
    groups = [scored_group("dead", 2, [3, 3], [0.0, 0.0])]
    step = build(groups)
    assert (step.micro_batches, step.num_sequences, step.num_loss_tokens) == ((), 0, 0)
    assert build([]).micro_batches == ()
    assert build_mini_batches(groups, mini_batches=3, loss="grpo", micro_batch_tokens=10, max_tokens=10) == ()


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 60))
def test_packing_keeps_every_sequence_once_within_the_budget(lengths, budget):
    bins = pack(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= budget or len(members) == 1 for members in bins)
    assert pack(lengths, budget) == bins
    if max(lengths, default=0) <= budget:
        assert len(bins) <= 2 * sum(lengths) / budget + 1


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=4),
    budget=st.integers(1, 60),
    loss=st.sampled_from(LOSSES),
)
def test_each_tokens_weight_and_advantage_do_not_depend_on_the_budget(lengths, budget, loss):
    groups = [scored_group(str(i), i + 1, n, [0.5, -0.5] + [0.25] * (len(n) - 2)) for i, n in enumerate(lengths)]

    def by_token(step):
        found = {}
        for batch in step.micro_batches:
            starts = batch.cu_seqlens_N1.tolist()
            for (g, i), start, end in zip(batch.samples_N2.tolist(), starts, starts[1:]):
                assert batch.positions_T[start:end].tolist() == list(range(end - start))
                rows = zip(batch.token_ids_T[start:end].tolist(), batch.loss_weights_T[start:end].tolist(), batch.advantages_T[start:end].tolist())
                found[g, i] = list(rows)
        return found

    whole, split = (build(groups, loss=loss, micro_batch_tokens=n) for n in (10_000, budget))
    assert by_token(whole) == by_token(split)
    assert sum(len(n) for n in lengths) == whole.num_sequences == split.num_sequences
    if loss != "dr_grpo":
        total = sum(batch.loss_weights_T.double().sum().item() for batch in split.micro_batches)
        assert total == pytest.approx(1, abs=1e-5)


def test_mini_batches_deal_whole_live_groups_and_count_their_own():
    groups = [
        scored_group("a", 2, [1, 1], [0.5, -0.5]),
        scored_group("dead", 2, [9, 9], [0.0, 0.0]),
        scored_group("b", 2, [2, 2], [0.5, -0.5]),
        scored_group("c", 2, [3, 3], [0.5, -0.5]),
    ]
    steps = build_mini_batches(groups, mini_batches=2, loss="token_mean", micro_batch_tokens=100, max_tokens=10)
    assert [step.num_loss_tokens for step in steps] == [8, 4]
    assert [sorted(step.micro_batches[0].samples_N2[:, 0].unique().tolist()) for step in steps] == [[0, 3], [2]]
    assert [step.micro_batches[0].loss_weights_T.sum().item() for step in steps] == pytest.approx([1, 1])
    assert len(build_mini_batches(groups, mini_batches=9, loss="grpo", micro_batch_tokens=100, max_tokens=10)) == 3


def test_selection_is_stitched_from_prompt_and_completion():
    scored = scored_group("a", 2, [3, 1], [0.5, -0.5], record=True, prompt_record=True)
    batch = build([scored]).micro_batches[0]
    assert batch.selection.dtype == torch.int16
    assert batch.selection.shape == (8, 2, 1, 3)
    expected = [scored.group.prompt_selection, scored.group.completions[0].selection] * 1
    assert torch.equal(batch.selection[:5], torch.cat(expected))
    assert torch.equal(batch.selection[5:], torch.cat([scored.group.prompt_selection, scored.group.completions[1].selection]))


def test_rows_that_were_not_recorded_are_marked_for_recomputation():
    bare = scored_group("bare", 2, [1, 1], [0.5, -0.5])
    recorded = scored_group("rec", 2, [3, 3], [0.5, -0.5], record=True)
    batch = build([bare, recorded]).micro_batches[0]
    unrecorded = (batch.selection == -2).all(-1).all(-1).all(-1)
    assert unrecorded.tolist() == [True, True, False, False, False] * 2 + [True] * 6
    assert stitch_selection(bare.group, bare.group.completions[0]) is None


def test_with_advantages_replaces_them_by_sample():
    batch = build([scored_group("a", 2, [1, 3], [-0.5, 0.5])]).micro_batches[0]
    assert with_advantages(batch, [[7.0, 8.0]]).advantages_T.tolist() == [0, 0, 7, 0, 0, 8, 8, 8]


def test_records_that_do_not_fit_are_refused():
    good = scored_group("a", 2, [1, 3], [-0.5, 0.5])
    with pytest.raises(ValueError, match="2 completions, but 2 scores and 1 advantages"):
        build([ScoredGroup(group=good.group, scores=good.scores, advantages=(1.0,))])
    with pytest.raises(ValueError, match="no tokens"):
        build([scored_group("empty", 0, [1], [1.0])])
    short = Completion(token_ids=(1, 2), logprobs=(-1.0,), text="", finish_reason="stop", policy_version=0)
    with pytest.raises(ValueError, match="2 tokens, but 1 log-probs"):
        build([ScoredGroup(group=Group(prompt=good.group.prompt, completions=(short,)), scores=good.scores[:1], advantages=(1.0,))])
    odd = Completion(token_ids=(1, 2), logprobs=(-1.0, -1.0), text="", finish_reason="stop", policy_version=0, selection=torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="1 rows for 2 tokens"):
        stitch_selection(Group(prompt=good.group.prompt, completions=(odd,)), odd)
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        build([good], micro_batch_tokens=0)
