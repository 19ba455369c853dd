"""Voting classes: equal values together, units kept where written, bare numbers with the largest class of their value."""

import time

from rewards.voting import cluster


def test_votes_cluster_by_value() -> None:
    assert cluster(["1/2", "0.5", "2", "2"]) == [0, 0, 1, 1]
    assert cluster(["x=3", "3", "4", "4"]) == [0, 0, 1, 1]
    assert cluster(["(1,2)", "(1, 2)", "(2,1)", "(2,1)", r"\left(1,2\right)"]) == [0, 0, 1, 1, 0]
    assert cluster([r"50\%", "0.5", r"\frac{1}{2}", "50", "50"]) == [0, 0, 0, 1, 1]
    assert cluster([r"\sqrt{12}", r"2\sqrt3", r"\sqrt{13}", "x+1", "1+x"]) == [0, 0, 1, 2, 2]


def test_none_and_blank_never_vote() -> None:
    assert cluster([None, "", "  ", "3", None]) == [-1, -1, -1, 0, -1]


def test_choices_are_told_apart_by_case_only_as_letters() -> None:
    assert cluster(["A", "a", "(A)", "Even", "even", "2B", "2b"]) == [0, 1, 0, 2, 2, 3, 4]


def test_64_votes_of_many_problems_cluster_fast() -> None:
    votes = [str(number % 7) if number % 3 else rf"\frac{{{number % 7}}}{{1}}" for number in range(64)]
    start = time.perf_counter()
    for problem in range(50):
        cluster([f"{vote}+{problem}" for vote in votes])
    assert time.perf_counter() - start < 5


def test_units_are_kept_and_a_bare_number_joins_the_largest_class_of_its_value() -> None:
    assert cluster(["5 cm", "5 kg", "5 kg", "5", "5 apples", "6"]) == [0, 1, 1, 1, 1, 2]
    assert cluster(["5", "5 kg", "5 cm", "5 cm", "x = 5"]) == [0, 1, 0, 0, 0]
    assert cluster(["5", "5 kg", "5 cm"]) == [0, 0, 1]  # a tie goes to the earlier class
    assert cluster(["5", "$5", "5 dollars", "6 dollars"]) == [0, 0, 0, 1]
    assert cluster(["x = 5 cm", "5 cm", "50 mm", "5 kg"]) == [0, 0, 1, 2]
