"""Countdown: right expressions pass in any notation, everything else fails, nothing is executed, nothing takes long."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.countdown import countdown, evaluate, solves

NUMBERS, TARGET = [5, 18, 32, 2], 56


@pytest.mark.parametrize(
    "text",
    [
        "5*18 - 2 - 32",
        "5 * 18 - (2 + 32)",
        "18*5-32-2 = 56",
        "5 × 18 − 32 − 2",
        r"5 \times 18 - 2 - 32",
        r"$5 \cdot 18 - 32 - 2$",
        r"\left(5 \cdot 18\right) - [32 + 2]",
        "-(2 + 32 - 5*18)",
    ],
)
def test_right_expressions_pass(text: str) -> None:
    assert solves(text, NUMBERS, TARGET)


@pytest.mark.parametrize(
    "text",
    [
        "56",
        "5*18 - 2 - 31",
        "5*18 - 34",
        "5*18 - 2 - 32 = 57",
        "5*18 - 2 - 32 = 50 + 6 = 56",
        "= 56",
        "5*18 - 2 - 32 + 5 - 5",
        "51832",
        "5 18 - 2",
        "5**18",
        "5^18",
        "5!",
        "5*18 - 2 - 32.0",
        "(5*18 - 2 - 32",
        "5*18 - 2 - 32)",
        "[5*18 - 2 - 32)",
        "5*18 - - - 2 - 32",
        "5*18 - 2 - 32; 1",
        "5*18 - 2 - 32 # comment",
        "56 if True else 0",
        "int('56')",
        "٥*18 - 2 - 32",
        "",
    ],
)
def test_wrong_expressions_fail(text: str) -> None:
    assert not solves(text, NUMBERS, TARGET)


def test_numbers_are_used_exactly_or_at_most_as_often_as_given() -> None:
    assert not solves("32 + 18", [5, 18, 32], 50)
    assert solves("32 + 18", [5, 18, 32], 50, all_numbers=False)
    assert not solves("5 * 5 + 5 + 5 + 5 + 5 + 5", [5, 5], 50, all_numbers=False)
    assert solves("5 * 5", [5, 5], 25)


def test_fractions_are_exact() -> None:
    assert solves("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24)
    assert solves(r"\frac{8}{3 - \frac{8}{3}}", [3, 3, 8, 8], 24)
    assert not solves("1 / 3 * 3", [1, 3, 3], 0)
    assert evaluate("1 / (2 - 2)") is None


def test_hostile_text_is_answered_at_once_and_never_executed(tmp_path: Path) -> None:
    bombs = ["(" * 400, "-" * 400, "9" * 400, "1/" * 200, "((((((" * 60 + "1", "9*" * 200 + "9", "\x00", "F" * 400, "1" * 1_000_000]
    bombs += [f"__import__('os').system('touch {tmp_path / 'executed'}')", "9**9**9**9", "(lambda: 56)()", "[56 for _ in (1,)][0]"]
    start = time.perf_counter()
    assert not any(solves(bomb, NUMBERS, TARGET, all_numbers=every) for bomb in bombs for every in (True, False))
    assert time.perf_counter() - start < 1
    assert not (tmp_path / "executed").exists()


@given(st.lists(st.tuples(st.integers(1, 99), st.sampled_from("+-*/")), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_values_agree_with_python_on_random_expressions(terms: list[tuple[int, str]], random) -> None:
    text, ours = f"Fraction({terms[0][0]})", str(terms[0][0])
    for number, operator in terms[1:]:
        text, ours = f"{text} {operator} Fraction({number})", f"{ours} {operator} {number}"
        if random.random() < 0.4:
            text, ours = f"({text})", f"({ours})"
    found = evaluate(ours)
    assert found is not None
    assert found == (eval(text, {"Fraction": Fraction}), [number for number, _ in terms])


def test_the_reward_reads_the_rows_columns() -> None:
    good = "<think> hm </think> <answer> 5*18 - 2 - 32 </answer>"
    assert countdown(completion=good, numbers=NUMBERS, target=TARGET).value == 1.0
    assert countdown(completion=good, nums=["5", "18", "32", "2"], target="56").value == 1.0
    assert countdown(completion="<think> 5*18 - 2 - 32 </think> <answer> no </answer>", numbers=NUMBERS, target=TARGET).value == 0.0
    assert countdown(completion="5*18 - 2 - 32", numbers=NUMBERS, target=TARGET, prefilled=True).value == 0.0
    assert countdown(completion=good).value is None
    assert countdown(completion=good, numbers=NUMBERS, target=TARGET).answer == "5*18 - 2 - 32"
