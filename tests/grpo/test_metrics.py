"""pass@k, maj@k, avg@k and intervals against exact fractions, hand-counted cases and brute force."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.metrics import clustered_interval, maj_at_k, pass_at_k, wilson

PASS_AT_K = [
    (1, 0, 1, "0"), (1, 1, 1, "1"), (5, 0, 5, "0"), (5, 5, 1, "1"), (5, 1, 1, "1/5"), (5, 1, 5, "1"), (5, 2, 3, "9/10"),
    (10, 3, 1, "3/10"), (10, 3, 5, "11/12"), (10, 1, 10, "1"), (10, 0, 1, "0"), (16, 4, 8, "25/26"), (64, 1, 1, "1/64"),
    (64, 1, 32, "1/2"), (64, 32, 2, "95/126"), (64, 63, 1, "63/64"), (64, 10, 8, "188094421/245898076"), (100, 1, 10, "1/10"),
    (100, 5, 10, "79137/190120"), (100, 50, 3, "29/33"), (200, 1, 100, "1/2"), (200, 3, 100, "349/398"),
    (200, 13, 10, "78115540005393/157000030132960"), (200, 150, 1, "3/4"), (200, 0, 100, "0"), (256, 2, 64, "149/340"),
    (1000, 10, 100, "23121704784480128291/35404510814780942585"), (1000, 1, 999, "999/1000"),
    (1024, 7, 256, "45739284971015/52729656097052"), (4, 2, 4, "1"),
]  # fmt: skip

# votes (a dot never votes), gold, then per k = 1..n: first, uniform, pessimistic
MAJ_AT_K = [
    ("4444", "4", ["1 1 1", "1 1 1", "1 1 1", "1 1 1"]),
    ("4454", "4", ["3/4 3/4 3/4", "5/6 3/4 1/2", "1 1 1", "1 1 1"]),
    ("45", "4", ["1/2 1/2 1/2", "1 1/2 0"]),
    ("54", "4", ["1/2 1/2 1/2", "0 1/2 0"]),
    ("554", "4", ["1/3 1/3 1/3", "0 1/3 0", "0 0 0"]),
    ("..4.", "4", ["1/4 1/4 1/4", "1/2 1/2 1/2", "3/4 3/4 3/4", "1 1 1"]),
    ("...", "4", ["0 0 0", "0 0 0", "0 0 0"]),
    ("45645", "4", ["2/5 2/5 2/5", "1/2 2/5 1/10", "1/2 13/30 3/10", "3/5 1/2 2/5", "1 1/2 0"]),
    ("1234", "4", ["1/4 1/4 1/4", "0 1/4 0", "0 1/4 0", "0 1/4 0"]),
    ("73737297", "7", ["1/2 1/2 1/2", "15/28 1/2 3/14", "37/56 13/21 1/2", "53/70 26/35 47/70", "23/28 23/28 5/7",
                       "25/28 25/28 11/14", "1 1 1", "1 1 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("num_samples", "num_correct", "k", "exact"), PASS_AT_K)
def test_pass_at_k_equals_exact_fractions(num_samples: int, num_correct: int, k: int, exact: str) -> None:
    assert pass_at_k(num_samples, num_correct, k) == float(Fraction(exact))


@pytest.mark.parametrize(("text", "gold", "rows"), MAJ_AT_K)
def test_maj_at_k_equals_exact_expectations_under_every_tie_rule(text: str, gold: str, rows: list[str]) -> None:
    votes = [None if character == "." else character for character in text]
    for k, row in enumerate(rows, start=1):
        first, uniform, pessimistic = (float(Fraction(part)) for part in row.split())
        assert maj_at_k(votes, gold, k, "first") == first
        assert maj_at_k(votes, gold, k, "uniform") == uniform
        assert maj_at_k(votes, gold, k, "pessimistic") == pessimistic


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=9), st.data())
def test_maj_at_k_equals_enumeration_of_all_subsets(votes: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    wins = dict.fromkeys(("first", "uniform", "pessimistic"), Fraction(0))
    for subset in itertools.combinations(votes, k):
        counts = Counter(vote for vote in subset if vote is not None)
        top = [vote for vote in counts if counts[vote] == max(counts.values())]  # in the order of first votes
        if "a" in top:
            wins["first"] += top[0] == "a"
            wins["uniform"] += Fraction(1, len(top))
            wins["pessimistic"] += len(top) == 1
    for rule, total in wins.items():
        assert maj_at_k(votes, "a", k, rule) == float(total / math.comb(len(votes), k))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_equals_enumeration_of_all_subsets(num_samples: int, data: st.DataObject) -> None:
    num_correct, k = data.draw(st.integers(0, num_samples)), data.draw(st.integers(1, num_samples))
    subsets = list(itertools.combinations(range(num_samples), k))
    hits = sum(any(index < num_correct for index in subset) for subset in subsets)
    assert pass_at_k(num_samples, num_correct, k) == float(Fraction(hits, len(subsets)))


def test_maj_at_1_is_the_share_of_correct_samples_for_64_samples_in_many_classes() -> None:
    votes = [index % 23 for index in range(64)]
    for rule in ("first", "uniform", "pessimistic"):
        assert maj_at_k(votes, 3, 1, rule) == 3 / 64


def test_k_beyond_the_samples_and_bad_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.4 .* got 5"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="num_correct"):
        pass_at_k(4, 5, 1)
    with pytest.raises(ValueError, match="got 3"):
        maj_at_k(["a", "b"], "a", 3)
    with pytest.raises(ValueError, match="ties"):
        maj_at_k(["a", "b"], "a", 1, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one problem"):
        clustered_interval([])
    with pytest.raises(ValueError, match="num_correct=4, count=3"):
        wilson(4, 3)


def test_interval_is_clustered_by_problem() -> None:
    metric = clustered_interval([0.0, 0.25, 0.5, 0.75, 1.0])  # 5 problems of 4 samples
    assert (metric.value, metric.low, metric.high) == (0.5, 0.1535240439125805, 0.8464759560874195)
    assert (clustered_interval([0.3]).low, clustered_interval([0.3]).high) == (0.0, 1.0)
    assert clustered_interval([1.0, 1.0, 0.5]).high == 1.0


@pytest.mark.parametrize(
    ("num_correct", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775327998628892),
        (3, 5, 0.2307242812760128, 0.882379225767352),
        (15, 30, 0.33154125640533766, 0.6684587435946623),
        (700, 1319, 0.5037224879302896, 0.5575093395573453),
        (250, 500, 0.4563412653024843, 0.5436587346975157),
        (1319, 1319, 0.9970960550146962, 0.9999999999999999),
    ],
)
def test_wilson_intervals(num_correct: int, count: int, low: float, high: float) -> None:
    metric = wilson(num_correct, count)
    assert (metric.value, metric.low, metric.high) == (num_correct / count, low, high)
