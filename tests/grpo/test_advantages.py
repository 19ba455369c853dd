"""Group-relative advantages against worked numbers, dead groups by equality, and the soft length penalty."""

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.advantages import STD_EPSILON, group_advantages, is_dead, overlong_penalty, score_group, shaped_rewards
from grpo.data_types import Completion, Group, Prompt, Score

KINDS = ("std", "mean", "leave_one_out")
reward = st.one_of(st.none(), st.floats(-10, 10).map(lambda x: round(x, 3)))


def group_of(lengths):
    prompt = Prompt(prompt_id="p", token_ids=(1, 2), question="q", answer="a", text="q")
    return Group(
        prompt=prompt,
        completions=tuple(Completion(token_ids=(3,) * n, logprobs=(-1.0,) * n, text="", finish_reason="stop", policy_version=0) for n in lengths),
    )


def test_worked_example_of_each_kind():
    rewards = (1.0, 0.0, 0.0, 1.0, 0.0)
    assert group_advantages(rewards, "mean") == pytest.approx((0.6, -0.4, -0.4, 0.6, -0.4))
    assert group_advantages(rewards, "leave_one_out") == pytest.approx((0.75, -0.5, -0.5, 0.75, -0.5))
    std = math.sqrt(0.3)  # sample variance (2·0.36 + 3·0.16) / 4
    assert group_advantages(rewards, "std") == pytest.approx(tuple(x / (std + STD_EPSILON) for x in (0.6, -0.4, -0.4, 0.6, -0.4)))


@given(rewards=st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=9))
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(rewards):
    if is_dead(rewards):
        return
    expected = [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_reward_gets_zero_and_leaves_the_others_alone(kind):
    with_none = group_advantages((1.0, None, 0.0, 0.5), kind)
    assert with_none[1] == 0.0
    assert (with_none[0], with_none[2], with_none[3]) == group_advantages((1.0, 0.0, 0.5), kind)


@given(rewards=st.lists(reward, max_size=8), kind=st.sampled_from(KINDS))
def test_a_group_is_dead_exactly_when_all_advantages_are_zero(rewards, kind):
    advantages = group_advantages(rewards, kind)
    assert len(advantages) == len(rewards)
    assert is_dead(rewards) == (not any(advantages))


@given(rewards=st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=8), kind=st.sampled_from(KINDS))
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards, kind):
    advantages = group_advantages(rewards, kind)
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-6)
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    assert all(advantages[a] <= advantages[b] for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("rewards", [(), (None,), (1.0,), (None, 1.0), (0.1, 0.1, 0.1), (1.1, 1.1, None, 1.1)])
def test_equal_rewards_are_dead_without_rounding_noise(rewards):
    assert is_dead(rewards)
    for kind in KINDS:
        assert group_advantages(rewards, kind) == (0.0,) * len(rewards)


def test_rewards_that_differ_in_the_last_bit_are_alive():
    assert not is_dead((0.1, math.nextafter(0.1, 1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        group_advantages((0.0, bad), "mean")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="leave_one_out"):
        group_advantages((0.0, 1.0), "median")


def test_overlong_penalty_falls_linearly_over_the_last_tokens():
    penalties = [overlong_penalty(n, max_tokens=100, penalty_tokens=20) for n in (0, 80, 85, 90, 100, 120)]
    assert penalties == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert overlong_penalty(100, max_tokens=100, penalty_tokens=0) == 0


def test_shaped_rewards_add_the_penalty_and_keep_none():
    scores = [Score(value=1.0, parts={}), Score(value=None, parts={}), Score(value=0.0, parts={})]
    assert shaped_rewards(group_of([5, 10, 10]), scores, max_tokens=10, overlong_penalty_tokens=5) == (1.0, None, -1.0)
    with pytest.raises(ValueError, match="as many scores"):
        shaped_rewards(group_of([5]), scores, max_tokens=10, overlong_penalty_tokens=5)


def test_score_group_makes_the_record_with_penalised_advantages():
    scores = [Score(value=1.0, parts={}), Score(value=1.0, parts={})]
    scored = score_group(group_of([5, 10]), scores, kind="mean", max_tokens=10, overlong_penalty_tokens=5)
    assert scored.advantages == (0.5, -0.5)
    assert scored.scores == tuple(scores)
    assert score_group(group_of([5, 10]), scores, kind="mean", max_tokens=10).advantages == (0.0, 0.0)
