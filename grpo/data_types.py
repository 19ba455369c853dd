"""The records that travel through one GRPO step, in the order in which they are made.

    Prompt → Completion, Group (rollout) → Score, ScoredGroup (scoring, advantages) → Batch, StepBatch (batching)
    → StepStats (learner)            and EvalReport (evaluate)

Every record is frozen; a stage returns a new record and never changes a field's meaning. Token ids are the only truth:
text exists for rewards and people. Shape suffixes: T packed tokens of one micro-batch, N sequences (N1 = N + 1),
G samples of a group, L tokens of one completion, P prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the reward actor uses these records and does without torch
    import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, rendered and tokenised. `meta` holds the row's other columns, for custom rewards."""

    prompt_id: str
    token_ids: tuple[int, ...]
    question: str
    answer: str
    text: str
    """The rendered prompt, which `token_ids` encode."""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer to a prompt.

    `logprobs[t]` is the sampler's log-probability of `token_ids[t]` under the distribution it was drawn from (after
    temperature, and after top-p/top-k where those are set). The EOS token, if drawn, is part of `token_ids`; `text`
    leaves special tokens out. `selection` is `[L, layers, Hkv, n]`, block numbers from the sequence's start: row t is
    the choice made by the query at the position of completion token t (so the last row is recorded only if that token
    was fed back; engines that stop before leave -2 there, "recompute")."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int
    selection: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt with its G completions. `prompt_selection` is `[P, layers, Hkv, n]` where it was recorded."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    prompt_selection: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the rewards said of one completion.

    `value` is the weighted sum of `parts` (name → unweighted reward); None takes the sample out of its group's
    statistics and out of the loss. `answer` is the extracted final answer, None where there is none. `timed_out` names
    the parts that hit their deadline or whose worker died."""

    value: float | None
    parts: dict[str, float | None]
    answer: str | None = None
    timed_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its scores and group-relative advantages (one per completion; 0 where the sample is left out)."""

    group: Group
    scores: tuple[Score, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One packed micro-batch: whole sequences (prompt + completion), one after the other, never padded.

    Entry t of every `[T]` tensor but `token_ids_T` and `positions_T` is about *predicting token t*; a sequence's first
    token and all prompt tokens have loss weight 0. `loss_weights_T` come from counts over the whole step, so the loss
    of a step is the plain sum over its micro-batches. `old_logprobs_T` (the learner's, before the update) and
    `reference_logprobs_T` are None until the learner has computed them."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens_N1: torch.Tensor
    samples_N2: torch.Tensor
    """(group, completion) of each sequence: indices into the list of groups that was packed."""
    loss_weights_T: torch.Tensor
    advantages_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None
    selection: torch.Tensor | None = None
    """`[T, layers, Hkv, n]` block choices the sampler recorded (to replay, or to compare with); None where it recorded none,
    rows of -2 where a token's were not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """All micro-batches of one optimizer step (of one inner epoch), and the counts their weights came from."""

    micro_batches: tuple[Batch, ...]
    num_sequences: int
    num_loss_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Flat metric name → value of one learner step, under TRL's names where TRL has one."""

    policy_version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number with its 95 % interval (clustered by problem)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """One evaluation of one checkpoint on one dataset. `metrics` is keyed `pass@1`, `pass@8`, `maj@8`, `avg@8`, …"""

    dataset: str
    checkpoint: str
    num_problems: int
    samples_per_problem: int
    metrics: dict[str, Metric]
    extras: dict[str, float]
    """Numbers without an interval: well_formed share, truncated share, mean length, tokens/s."""
    completions_path: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked of the sampler and what its completions depend on besides: see grpo/evaluate.py."""
    curves: dict[str, dict[int, Metric]] = field(default_factory=dict)
    """`pass` and `maj`: K → value, for K = 1, 2, 4, … up to the number of samples."""
