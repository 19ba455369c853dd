"""The statistics of an evaluation: pass@k, maj@k, avg@k and their 95 % intervals.

Pure functions of counts and labels; integers and fractions inside, so that the results are exact to the last bit of a
float. Leaves out sampling, scoring and the grouping of answers into classes of equal value (grpo.evaluate).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from grpo.data_types import Metric

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

Ties = Literal["first", "uniform", "pessimistic"]


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in 1..{num_samples} (the number of samples), got {k}")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement from `num_samples`, is correct.

    1 − C(n−c, k)/C(n, k): the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, Eq. 1).

    Raises:
        ValueError: k outside 1..n, or num_correct outside 0..n.
    """
    _check_k(k, num_samples)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie in 0..{num_samples}, got {num_correct}")
    return float(1 - Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k)))


def maj_at_k(votes: Sequence[Hashable | None], correct: Hashable | None, k: int, ties: Ties = "uniform") -> float:
    """Expected correctness of the majority vote over a k-subset drawn uniformly from the votes.

    Args:
        votes: one class label per sample, in sampling order; None (no answer) takes a place in the subset but never
            votes, so a subset of Nones is wrong.
        correct: the label of the class that equals the gold answer; None where no sample gave it.
        ties: who wins between largest classes: `first` the one whose first vote of the subset came earliest, `uniform`
            each with equal chance (free of the samples' order: the number to report), `pessimistic` a wrong one.

    The subsets are counted, never enumerated: with j votes for the correct class, every other class contributes a
    polynomial whose m-th coefficient is the number of ways to draw m <= j of its votes, and the product's coefficient
    counts the draws: some milliseconds for n = 64 and all k together.

    Raises:
        ValueError: k outside 1..n, or an unknown tie rule.
    """
    _check_k(k, len(votes))
    if ties not in ("first", "uniform", "pessimistic"):
        raise ValueError(f"ties must be 'first', 'uniform' or 'pessimistic', got {ties!r}")
    positions: dict[Hashable, list[int]] = {}
    for index, vote in enumerate(votes):
        if vote is not None:
            positions.setdefault(vote, []).append(index)
    own = positions.pop(correct, None) if correct is not None else None
    if own is None:
        return 0.0
    num_silent = sum(vote is None for vote in votes)
    if ties == "first":
        return float(_first_wins(own, list(positions.values()), num_silent, k))
    sizes = tuple(sorted(len(rival) for rival in positions.values()))
    return float(_majority(len(own), sizes, num_silent, k, ties == "uniform"))


@lru_cache(maxsize=65536)
def _majority(own: int, rivals: tuple[int, ...], num_silent: int, k: int, share_ties: bool) -> Fraction:
    """maj@k from class sizes alone; a tie among t + 1 classes counts 1/(t + 1), or 0 unless `share_ties`."""
    wins = Fraction(0)
    for j in range(1, min(own, k) + 1):
        rows = _draws(rivals, num_silent, j)
        for t, row in enumerate(rows if share_ties else rows[:1]):
            if k - j < len(row):
                wins += Fraction(math.comb(own, j) * row[k - j], t + 1)
    return wins / math.comb(own + sum(rivals) + num_silent, k)


@lru_cache(maxsize=4096)
def _draws(rivals: tuple[int, ...], num_silent: int, j: int) -> tuple[tuple[int, ...], ...]:
    """rows[t][m]: ways to draw m votes that are not ours, of which exactly t rivals give j and none gives more.

    Polynomials in the number of votes, packed into one whole number each: a product of two is one multiplication.
    Classes too small to reach j draw freely, so all of them together are (1 + x)^votes.
    """
    free = num_silent + sum(size for size in rivals if size < j)
    strong = [size for size in rivals if size >= j]
    total = free + sum(strong)
    bits = total + 1  # of one coefficient: they all sum up to at most 2^total
    rows = [((1 << bits) + 1) ** free]
    for size in strong:
        below = sum(math.comb(size, m) << (bits * m) for m in range(j))
        level = math.comb(size, j) << (bits * j)
        rows = [(rows[t] * below if t < len(rows) else 0) + (rows[t - 1] * level if t else 0) for t in range(len(rows) + 1)]
    mask = (1 << bits) - 1
    return tuple(tuple(row >> (bits * m) & mask for m in range(total + 1)) for row in rows)


def _first_wins(own: list[int], rivals: list[list[int]], num_silent: int, k: int) -> Fraction:
    """maj@k where a tie goes to the class seen first: a rival that ties must have all its votes after our first one."""
    wins = 0
    for rank, first in enumerate(own):
        after_own = len(own) - rank - 1
        for j in range(1, min(after_own + 1, k) + 1):
            rest = k - j
            ways = [1] + [0] * rest
            for rival in rivals:
                later = sum(position > first for position in rival)
                draws = [math.comb(len(rival), m) for m in range(min(len(rival), j - 1, rest) + 1)]
                if j <= min(later, rest):
                    draws.append(math.comb(later, j))
                ways = [sum(draws[m] * ways[total - m] for m in range(min(len(draws), total + 1))) for total in range(rest + 1)]
            draws_of_rest = sum(count * math.comb(num_silent, rest - total) for total, count in enumerate(ways))
            wins += math.comb(after_own, j - 1) * draws_of_rest
    num_votes = len(own) + sum(map(len, rivals)) + num_silent
    return Fraction(wins, math.comb(num_votes, k))


def clustered_interval(problem_values: Sequence[float]) -> Metric:
    """Mean over problems with its normal 95 % interval; samples of one problem are one cluster.

    SE = sample standard deviation of the per-problem values / sqrt(number of problems). The values are shares, so the
    interval is cut to [0, 1]; one problem says nothing about its spread and gives [0, 1]. Where all problems agree the
    interval has no width: use `wilson` for single yes/no answers.

    Raises:
        ValueError: no problems.
    """
    count = len(problem_values)
    if count == 0:
        raise ValueError("an interval needs at least one problem, got none")
    mean = math.fsum(problem_values) / count
    if count == 1:
        return Metric(value=mean, low=0.0, high=1.0)
    variance = math.fsum((value - mean) ** 2 for value in problem_values) / (count - 1)
    half = Z95 * math.sqrt(variance / count)
    return Metric(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))


def wilson(num_correct: int, count: int) -> Metric:
    """Share with its Wilson 95 % score interval: for one answer per problem (greedy decoding).

    Raises:
        ValueError: count < 1 or num_correct outside 0..count.
    """
    if count < 1 or not 0 <= num_correct <= count:
        raise ValueError(f"need count >= 1 and 0 <= num_correct <= count, got num_correct={num_correct}, count={count}")
    share = num_correct / count
    denominator = 1 + Z95**2 / count
    centre = (share + Z95**2 / (2 * count)) / denominator
    half = Z95 / denominator * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return Metric(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))
