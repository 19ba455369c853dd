"""Which part of a completion counts as its answer."""

import pytest

from rewards.extract import answer_span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("<think> a </think> <answer> 4 </answer>", "4"),
        ("<think> a </think> <answer> 4 </answer> <answer> 5 </answer>", "5"),
        ("<think> <answer> 4 </answer> </think> <answer> 5 </answer>", "5"),
        ("thought </think> <answer> 5 </answer>", "5"),
        ("<answer> so \\boxed{\\frac{1}{2}} </answer>", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
        ("\\boxed{1} or \\boxed{2}", "1 or 2"),
        ("\\boxed 7", "7"),
        ("text #### 12\nmore", "12"),
        ("The answer is 5. The answer is 6.", "6"),
        ("Final Answer: The final answer is $(0, 1)$. I hope it is correct.", "(0, 1)"),
        ("7<|im_end|>\nuser: 8", "7"),
        ("3/4", "3/4"),
    ],
)
def test_answer_span(text: str, span: str) -> None:
    assert answer_span(text) == span


@pytest.mark.parametrize(
    "text", ["", "  ", "<think> 4", "<think> \\boxed{4} </think>", "<answer> </answer>", "<think> a </think> <answer> 4", "4" * 3_000_000]
)
def test_no_answer(text: str) -> None:
    assert answer_span(text) is None
