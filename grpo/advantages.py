"""Rewards of a group → group-relative advantages; DAPO's soft length penalty; the making of a ScoredGroup.

Leaves out the KL term of `kl_place: reward`, which needs log-probabilities: the learner subtracts it from
`shaped_rewards` and calls `group_advantages` again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from grpo.data_types import Group, Score, ScoredGroup

AdvantageKind = Literal["std", "mean", "leave_one_out"]

STD_EPSILON = 1e-4
"""Added to the standard deviation, TRL's value."""


def is_dead(rewards: Sequence[float | None]) -> bool:
    """Whether a group teaches nothing: fewer than two scored samples, or all rewards exactly equal."""
    valid = [reward for reward in rewards if reward is not None]
    return len(valid) < 2 or all(reward == valid[0] for reward in valid)


def group_advantages(rewards: Sequence[float | None], kind: AdvantageKind) -> tuple[float, ...]:
    """One advantage per sample; a reward of None is left out of the statistics and gets 0.

    * `std`: (r − mean) / (std + 1e-4) with the sample standard deviation (divisor G − 1), as TRL has it (DeepSeekMath §4.1)
    * `mean`: r − mean (Dr. GRPO)
    * `leave_one_out`: r − mean of the others (RLOO) = (r − mean) · G / (G − 1)

    A group is dead (`is_dead`) exactly when all its advantages are 0.0; batching relies on that.

    Raises:
        ValueError: an unknown kind, or a reward that is not finite.
    """
    if kind not in ("std", "mean", "leave_one_out"):
        raise ValueError(f"advantage must be 'std', 'mean' or 'leave_one_out', got {kind!r}")
    valid = [reward for reward in rewards if reward is not None]
    if not all(math.isfinite(reward) for reward in valid):
        raise ValueError(f"rewards must be finite numbers or None, got {list(rewards)}")
    if is_dead(rewards):
        return (0.0,) * len(rewards)
    count = len(valid)
    mean = math.fsum(valid) / count
    scale = 1.0
    if kind == "std":
        scale = 1.0 / (math.sqrt(math.fsum((reward - mean) ** 2 for reward in valid) / (count - 1)) + STD_EPSILON)
    elif kind == "leave_one_out":
        scale = count / (count - 1)
    return tuple(0.0 if reward is None else (reward - mean) * scale for reward in rewards)


def overlong_penalty(num_tokens: int, *, max_tokens: int, penalty_tokens: int) -> float:
    """DAPO's R_len: 0 up to max_tokens − penalty_tokens, falling linearly to −1 at max_tokens; 0 where penalty_tokens is 0."""
    if penalty_tokens == 0:
        return 0.0
    free = max_tokens - penalty_tokens
    return min(0.0, max(-1.0, (free - num_tokens) / penalty_tokens))


def shaped_rewards(group: Group, scores: Sequence[Score], *, max_tokens: int, overlong_penalty_tokens: int) -> tuple[float | None, ...]:
    """The scores' values with the soft length penalty added; None stays None.

    Raises:
        ValueError: not one score per completion.
    """
    if len(scores) != len(group.completions):
        raise ValueError(f"a group of {len(group.completions)} completions needs as many scores, got {len(scores)}")
    return tuple(
        None
        if score.value is None
        else score.value + overlong_penalty(len(completion.token_ids), max_tokens=max_tokens, penalty_tokens=overlong_penalty_tokens)
        for completion, score in zip(group.completions, scores)
    )


def score_group(group: Group, scores: Sequence[Score], *, kind: AdvantageKind, max_tokens: int, overlong_penalty_tokens: int = 0) -> ScoredGroup:
    """The group with its scores and the advantages of its shaped rewards."""
    rewards = shaped_rewards(group, scores, max_tokens=max_tokens, overlong_penalty_tokens=overlong_penalty_tokens)
    return ScoredGroup(group=group, scores=tuple(scores), advantages=group_advantages(rewards, kind))
