"""The accuracy reward: is the final answer the gold answer?"""

from __future__ import annotations

from typing import Any

from rewards import extract, math_equal
from rewards.base import Score


def accuracy(completion: str, answer: str, prefilled: bool = False, correct: float = 1.0, wrong: float = 0.0, **_: Any) -> Score:
    """`correct` where the completion's answer is equivalent to `answer`, else `wrong`.

    A gold answer that cannot be read gives None: the sample leaves its group's statistics instead of paying for noise.
    """
    if prefilled:  # what is said before </think> is still thought
        completion = "<think>" + completion
    span = extract.answer_span(completion)
    if span is None:
        return Score(value=wrong if math_equal.parse(answer) is not None else None)
    if math_equal.equivalent(answer, completion):
        return Score(value=correct, answer=span)
    return Score(value=wrong if math_equal.parse(answer) is not None else None, answer=span)
