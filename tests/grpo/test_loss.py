"""Each loss against a 2×3 example worked by hand, its gradient at π = π_old, and sums that do not depend on the split."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batching import token_weights
from grpo.loss import kl_estimate, means, merge, policy_loss

# Two completions of up to three tokens; the second has only two (its third place is no token).
LENGTHS = (3, 2)
RATIOS = (1.0, 1.5, 0.5, 1.0, 0.7)
ADVANTAGES = (1.0, 1.0, 1.0, -1.0, -1.0)
SEQUENCE = (0, 0, 0, 1, 1)
# min(r·Â, clip(r, 0.8, 1.28)·Â): 1, 1.28, 0.5 | −1, −0.8   → sums 2.78 and −1.8
HAND = {
    "grpo": -(2.78 / 3 - 1.8 / 2) / 2,
    "token_mean": -(2.78 - 1.8) / 5,
    "dr_grpo": -(2.78 - 1.8) / (2 * 4),
    "gspo": -((1.5 * 0.5) ** (1 / 3) - 0.7 ** (1 / 2)) / 2,
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def example(kind, *, ratios=RATIOS, max_tokens=4, **options):
    weights = token_weights(LENGTHS, loss=kind, max_tokens=max_tokens)
    old = tensor([-1.0, -2.0, -0.5, -1.5, -3.0])
    logprobs = (old + tensor(ratios).log()).requires_grad_()
    arguments = {
        "old_logprobs_T": old,
        "sampler_logprobs_T": old,
        "advantages_T": tensor(ADVANTAGES),
        "loss_weights_T": tensor([weights[i] for i in SEQUENCE]),
        "sequence_T": torch.tensor(SEQUENCE),
        "num_sequences": 2,
        "kind": kind,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
    }
    return logprobs, arguments | options


@pytest.mark.parametrize("kind", HAND)
def test_loss_of_the_worked_example(kind):
    logprobs, arguments = example(kind)
    loss, _ = policy_loss(logprobs, **arguments)
    assert loss.item() == pytest.approx(HAND[kind], abs=1e-12)


@pytest.mark.parametrize("kind", HAND)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradient_at_the_old_policy(kind, estimator):
    beta = 0.3
    reference = tensor([-1.2, -1.9, -0.9, -1.0, -3.0])
    sampler = tensor([-1.0, -4.0, -0.4, -1.5, -3.1])  # importance weights 1, e² → 2, e^−0.1, 1, e^0.1
    logprobs, arguments = example(kind, ratios=(1.0,) * 5, sampler_logprobs_T=sampler, tis_cap=2.0)
    loss, _ = policy_loss(logprobs, **arguments, reference_logprobs_T=reference, kl_coefficient=beta, kl_estimator=estimator)
    loss.backward()
    importance = tensor([1.0, 2.0, math.exp(-0.1), 1.0, math.exp(0.1)])
    pull = (reference - logprobs.detach()) if estimator == "k2" else (reference - logprobs.detach()).exp() - 1
    expected = -arguments["loss_weights_T"] * (importance * tensor(ADVANTAGES) + beta * pull)
    torch.testing.assert_close(logprobs.grad, expected)


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has_its_ratio():
    logprobs, arguments = example("token_mean")
    policy_loss(logprobs, **arguments)[0].backward()
    # token 1 is clipped above, token 4 below; token 2 (r = .5, Â > 0) is not clipped
    torch.testing.assert_close(logprobs.grad, tensor([-1 / 5, 0.0, -0.5 / 5, 1 / 5, 0.0]))


def test_gspo_clips_whole_sequences_and_its_gradient_is_the_sequence_ratio():
    logprobs, arguments = example("gspo")
    policy_loss(logprobs, **arguments)[0].backward()
    first, second = 0.75 ** (1 / 3), 0.7**0.5
    torch.testing.assert_close(logprobs.grad, tensor([-first / 6] * 3 + [second / 4] * 2))
    logprobs, arguments = example("gspo", epsilon_low=3e-4, epsilon_high=4e-4)
    loss, sums = policy_loss(logprobs, **arguments)
    loss.backward()
    # both ratios lie below 1 − 3e-4: Â > 0 keeps the ratio, Â < 0 is clipped
    assert loss.item() == pytest.approx(-(first - (1 - 3e-4)) / 2)
    torch.testing.assert_close(logprobs.grad, tensor([-first / 6] * 3 + [0.0] * 2))
    assert means(sums)["clip_ratio/low_mean"] == pytest.approx(2 / 5)


def test_truncated_importance_weight_multiplies_the_surrogate_alone_and_carries_no_gradient():
    logprobs, arguments = example("token_mean", ratios=(1.0,) * 5)
    arguments["sampler_logprobs_T"] = arguments["old_logprobs_T"] - tensor([0.0, math.log(3), math.log(1.5), 0.0, -math.log(2)])
    reference = arguments["old_logprobs_T"] + 0.1
    loss, sums = policy_loss(logprobs, **arguments, tis_cap=2.0, reference_logprobs_T=reference, kl_coefficient=1.0)
    kl = math.exp(0.1) - 0.1 - 1
    assert loss.item() == pytest.approx(-(1 + 2 + 1.5 - 1 - 0.5) / 5 + kl)
    metrics = means(sums)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(0.5)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(2.0)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(6 / 5)
    assert metrics["kl"] == pytest.approx(kl)
    without, _ = policy_loss(logprobs, **arguments, tis_cap=None)
    assert without.item() == pytest.approx(-1 / 5)


def test_metrics_of_the_worked_example():
    logprobs, arguments = example("token_mean")
    arguments["sampler_logprobs_T"] = arguments["old_logprobs_T"] + tensor([0.0, 0.2, 0.0, -0.1, 0.0])
    loss, sums = policy_loss(logprobs, **arguments)
    metrics = means(sums)
    assert sums.sums["loss"].item() == loss.item()
    assert sums.sums["tokens"].item() == 5
    assert metrics["clip_ratio/high_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(1 / 5)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(2 / 5)
    assert metrics["ratio/mean"] == pytest.approx(4.7 / 5)
    assert metrics["ratio/max"] == pytest.approx(1.5)
    assert metrics["mismatch/mean"] == pytest.approx(0.3 / 5)
    assert metrics["mismatch/max"] == pytest.approx(0.2)
    assert metrics["mismatch/k3"] == pytest.approx((math.exp(-0.2) + 0.2 - 1 + math.exp(0.1) - 0.1 - 1) / 5)
    assert not any(value.requires_grad for value in sums.sums.values())


def test_kl_estimators():
    logprobs, reference = tensor([-1.0, -2.0]), tensor([-1.5, -1.0])
    assert kl_estimate(logprobs, reference, "k1").tolist() == pytest.approx([0.5, -1.0])
    assert kl_estimate(logprobs, reference, "k2").tolist() == pytest.approx([0.125, 0.5])
    assert kl_estimate(logprobs, reference, "k3").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs, kind).tolist() == [0.0, 0.0]


def test_unbiased_estimators_average_to_the_kl():
    p, q = tensor([0.2, 0.5, 0.3]), tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum().item()
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(p.log(), q.log(), kind)).sum().item() == pytest.approx(exact)


def test_a_hopeless_token_does_not_make_the_loss_infinite():
    logprobs, arguments = example("token_mean", ratios=(1.0,) * 5)
    arguments["old_logprobs_T"] = tensor([-1.0, -2.0, -0.5, -500.0, -3.0])
    loss, _ = policy_loss(logprobs, **arguments, tis_cap=2.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()


def test_what_cannot_be_a_loss_is_refused():
    logprobs, arguments = example("grpo")
    with pytest.raises(ValueError, match="k1 has no gradient"):
        policy_loss(logprobs, **arguments, reference_logprobs_T=logprobs.detach(), kl_coefficient=0.1, kl_estimator="k1")
    with pytest.raises(ValueError, match="reference"):
        policy_loss(logprobs, **arguments, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="dr_grpo"):
        policy_loss(logprobs, **(arguments | {"kind": "ppo"}))
    with pytest.raises(ValueError, match="kl_estimator"):
        kl_estimate(logprobs, logprobs, "k4")


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    kind=st.sampled_from(["grpo", "token_mean", "dr_grpo", "gspo"]),
    cut=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batch_split(lengths, kind, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    weights = tensor(token_weights(lengths, loss=kind, max_tokens=8))[sequence]
    old, new, sampler, reference = (torch.randn(4, len(sequence), generator=generator, dtype=torch.float64) * 0.3).unbind()
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)[sequence]

    def part(rows):
        logprobs = new[rows].clone().requires_grad_()
        loss, sums = policy_loss(
            logprobs,
            old_logprobs_T=old[rows],
            sampler_logprobs_T=sampler[rows],
            advantages_T=advantages[rows],
            loss_weights_T=weights[rows],
            sequence_T=sequence[rows] - sequence[rows].min(),
            num_sequences=len(lengths),
            kind=kind,
            epsilon_low=0.2,
            epsilon_high=0.28,
            tis_cap=2.0,
            reference_logprobs_T=reference[rows],
            kl_coefficient=0.1,
        )
        loss.backward()
        return logprobs.grad, sums

    pieces = [rows for rows in (sequence < cut, sequence >= cut) if rows.any()]
    whole_grad, whole = part(torch.ones_like(sequence, dtype=torch.bool))
    grads, sums = zip(*(part(rows) for rows in pieces))
    torch.testing.assert_close(torch.cat(grads), whole_grad)
    total, expected = merge(sums), means(whole)
    assert total.sums["loss"].item() == pytest.approx(whole.sums["loss"].item())
    assert means(total) == pytest.approx(expected)
