"""Accuracy, language, length, repetition and their sum."""

import pytest

from rewards.compose import combine
from rewards.correctness import accuracy
from rewards.language import language_share
from rewards.length import overlong, repetition, short_enough


def test_accuracy_is_one_or_zero_and_reports_the_answer() -> None:
    score = accuracy(completion="<think>a</think> <answer> 1/2 </answer>", answer="0.5")
    assert (score.value, score.answer) == (1.0, "1/2")
    assert accuracy(completion="<think>a</think> <answer> 2 </answer>", answer="0.5").value == 0.0
    assert accuracy(completion="<think> 0.5", answer="0.5").value == 0.0


def test_accuracy_leaves_out_a_sample_whose_gold_cannot_be_read() -> None:
    assert accuracy(completion="<answer>5</answer>", answer="5?6").value is None
    assert accuracy(completion="no answer <think>", answer="").value is None


def test_accuracy_counts_nothing_in_a_prefilled_thought() -> None:
    assert accuracy(completion="it is 5", answer="5", prefilled=True).value == 0.0
    assert accuracy(completion="it is 4 </think> <answer>5</answer>", answer="5", prefilled=True).value == 1.0


def test_language_share_ignores_maths_and_code() -> None:
    english = "<think> We add the two numbers and then divide the sum by four, $\\frac{汉字}{2}$ `код` so it is done </think>"
    assert language_share(english, language="en") == 1.0
    assert language_share(english, language="zh") == 0.0
    chinese = "<think>我们把两个数相加然后除以四得到答案 x y</think> <answer> the answer is four and that is all we need here </answer>"
    assert language_share(chinese, language="zh") > 0.9
    mixed = "<think>" + "word " * 10 + "слово " * 10 + "</think>"
    assert language_share(mixed) == 0.5


def test_short_text_is_neutral_and_an_unknown_language_is_an_error() -> None:
    assert language_share("<think>Thus 12.</think>", language="zh") == 1.0
    with pytest.raises(ValueError, match="klingon"):
        language_share("a", language="klingon")


def test_overlong_falls_from_zero_to_minus_one() -> None:
    values = [overlong("", max_tokens=100, buffer_tokens=20, num_tokens=n) for n in (0, 80, 90, 100, 120)]
    assert values == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer_tokens"):
        overlong("", max_tokens=10, buffer_tokens=20)


def test_short_enough_falls_from_one_to_zero() -> None:
    assert [short_enough("", target_tokens=10, max_tokens=20, num_tokens=n) for n in (5, 10, 15, 30)] == [1, 1, 0.5, 0]


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    assert repetition("a b c d e f") == 0
    assert repetition("a " * 103) == pytest.approx(-0.99)
    assert repetition("a b") == 0


def test_combine_weighs_and_none_leaves_the_sample_out() -> None:
    assert combine({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.2}) == pytest.approx(1.1)
    assert combine({"a": 1.0, "b": None}, {"a": 1.0, "b": 0.2}) is None
    assert combine({"a": 1.0, "b": None}, {"a": 1.0, "b": 0.0}) == 1.0
    with pytest.raises(ValueError, match="no weight for c"):
        combine({"c": 1.0}, {"a": 1.0})
