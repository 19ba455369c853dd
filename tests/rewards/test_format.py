"""The strict format rule and its partial-credit sister."""

import pytest

from rewards.format import format_reward, is_well_formed, tag_count

GOOD = [
    "<think>2+2 is 4</think><answer>4</answer>",
    "\r\n<think>\na\n</think>\n\n<answer>\n4\n</answer>\n",
    "<think> $\\boxed{3}$ a < b </think>\t<answer> \\boxed{4} </answer>",
]
BAD = [
    "",
    "4",
    "<think>a</think>",
    "<answer>4</answer>",
    "<think></think><answer>4</answer>",
    "<think> \n</think><answer>4</answer>",
    "<think>a</think><answer> </answer>",
    "<think>a</think><answer>4",
    "<think>a<answer>4</answer></think>",
    "<answer>4</answer><think>a</think>",
    "<think>a</think><answer>4</answer><answer>4</answer>",
    "<think>a</think><think>b</think><answer>4</answer>",
    "well <think>a</think><answer>4</answer>",
    "<think>a</think> so <answer>4</answer>",
    "<think>a</think><answer>4</answer> done",
    "<THINK>a</THINK><ANSWER>4</ANSWER>",
    "<think >a</think><answer>4</answer>",
]


@pytest.mark.parametrize("completion", GOOD)
def test_well_formed(completion: str) -> None:
    assert is_well_formed(completion)
    assert not is_well_formed(completion, prefilled=True)
    assert is_well_formed(completion.strip().removeprefix("<think>"), prefilled=True)
    assert format_reward(completion=completion) == 1.0


@pytest.mark.parametrize("completion", BAD)
def test_not_well_formed(completion: str) -> None:
    assert not is_well_formed(completion)
    assert format_reward(completion=completion) == 0.0


def test_tag_count_gives_partial_credit_for_tags_that_occur_once() -> None:
    assert tag_count(GOOD[0]) == 1.0
    assert tag_count("<think>a</think>") == 0.5
    assert tag_count("<think>a</think></think>") == 0.25
    assert tag_count("a</think><answer>4</answer>", prefilled=True) == 1.0


def test_a_huge_completion_is_judged_quickly() -> None:
    assert not is_well_formed("<think>" + " " * 1_000_000)
    assert is_well_formed("<think>" + "a " * 500_000 + "</think>" + " " * 100_000 + "<answer>4</answer>")
