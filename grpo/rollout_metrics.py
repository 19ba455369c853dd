"""What one step's rollout looked like, as flat numbers under TRL's names.

Pure: scored groups in, a dict out. Leaves out what the learner measures (kl, entropy, clip_ratio/*, mismatch/*).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from grpo.data_types import ScoredGroup


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Reward and completion statistics of every sampled group, dead ones included.

    `reward_std` is the mean over groups of the standard deviation within the group (TRL's); `frac_reward_zero_std` the
    share of groups whose valid rewards are all equal. Numbers that have no sample (no completion ended, every reward
    None) are NaN. Raises ValueError without groups.
    """
    if not groups:
        raise ValueError("rollout_metrics needs at least one group, got none")
    values = [[score.value for score in group.scores if score.value is not None] for group in groups]
    flat = [value for rewards in values for value in rewards]
    metrics = {
        "reward": _mean(flat),
        "reward_std": _mean([_std(rewards) for rewards in values if rewards]),
        "frac_reward_zero_std": sum(len(set(rewards)) < 2 for rewards in values) / len(groups),
    }
    for name, label in short_names(groups[0].scores[0].parts).items():
        part = [value for group in groups for score in group.scores if (value := score.parts[name]) is not None]
        metrics[f"rewards/{label}/mean"] = _mean(part)
        metrics[f"rewards/{label}/std"] = _std(part)
    return metrics | _completion_metrics(groups)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """`path/to/file.py:function` → `function`, unless another reward would then have the same name."""
    shortened = {name: name.rpartition(":")[2] for name in names}
    counts = Counter(shortened.values())
    return {name: short if counts[short] == 1 else name for name, short in shortened.items()}


def _completion_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [len(completion.token_ids) for completion in completions if completion.finish_reason == "stop"]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": float(min(ended, default=math.nan)),
        "completions/max_terminated_length": float(max(ended, default=math.nan)),
    }


def num_rollout_tokens(groups: Sequence[ScoredGroup]) -> tuple[int, int]:
    """(prompt tokens with each prompt counted once per completion, completion tokens), as the learner sees them."""
    prompt = sum(len(group.group.prompt.token_ids) * len(group.group.completions) for group in groups)
    completion = sum(len(one.token_ids) for group in groups for one in group.group.completions)
    return prompt, completion


def sample_rows(groups: Sequence[ScoredGroup], num_rows: int, step: int) -> list[dict[str, Any]]:
    """One completion of each of the first `num_rows` groups, as rows of the sample table; which one turns with the step."""
    rows = []
    for position, group in enumerate(groups[:num_rows]):
        index = (step + position) % len(group.scores)
        completion, score = group.group.completions[index], group.scores[index]
        rows.append(
            {
                "prompt_id": group.group.prompt.prompt_id,
                "question": group.group.prompt.question,
                "completion": completion.text,
                "answer": group.group.prompt.answer,
                "extracted": score.answer,
                "reward": score.value,
                "advantage": group.advantages[index],
                "parts": dict(score.parts),
                "finish_reason": completion.finish_reason,
                "num_tokens": len(completion.token_ids),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Standard deviation with n − 1, as torch.std; 0 for one value."""
    if len(values) < 2:
        return 0.0 if values else math.nan
    centre = _mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
