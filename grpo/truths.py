"""What must hold at every step of the learner, and what is measured of a step's data: checks, selection agreement, counts.

Leaves out what happens after a broken truth: the learner makes no update, the run stops with the message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.batching import RECOMPUTE
from grpo.data_types import ScoredGroup, StepBatch
from grpo.loss import LossSums
from nsa.config import SparsityConfig


class LearnerError(RuntimeError):
    """A truth that must hold at every step does not; no update was made with the data that broke it."""


def first_ratio_deviation(logprobs_R: torch.Tensor, old_logprobs_R: torch.Tensor) -> float:
    """Largest |π/π_old − 1| before the first update of a step.

    Raises:
        LearnerError: it is not exactly 0.
    """
    deviation = ((logprobs_R - old_logprobs_R).exp() - 1).abs().max().item()
    if deviation != 0:
        raise LearnerError(
            f"before the first update of a step the ratio must be exactly 1, but it deviates by {deviation:.3g}: two forward passes over the same "
            "micro-batch differ, so something in the model is not deterministic"
        )
    return deviation


def first_kl_difference(logprobs_R: torch.Tensor, reference_logprobs_R: torch.Tensor) -> float:
    """Largest |log π − log π_ref| while the reference is a snapshot of a policy not updated since.

    Raises:
        LearnerError: it is not exactly 0.
    """
    difference = (logprobs_R - reference_logprobs_R).abs().max().item()
    if difference != 0:
        raise LearnerError(
            "the reference is a snapshot of the policy and nothing was updated since, so their KL must be exactly 0, but log-probs differ by up to "
            f"{difference:.3g}: something in the model is not deterministic, or the policy's weights were changed from outside"
        )
    return difference


def check_mismatch(total: LossSums, bound: float | None) -> None:
    """Compare the mean |log π_learner − log π_sampler| with its bound (None: never).

    Raises:
        LearnerError: above the bound, or not a number.
    """
    mean = (total.sums["mismatch/mean"] / total.sums["tokens"]).item()
    if bound is not None and not mean <= bound:
        raise LearnerError(
            f"sampler and learner disagree: mean |Δ log p| is {mean:.4g} nats (largest {total.maxima['mismatch/max'].item():.4g}), above "
            f"algorithm.mismatch_bound={bound:g}. Usual causes: weights not sent to the sampler after an update, another temperature, dtype or "
            "attention backend there, or other block choices (algorithm.selection=replay uses the sampler's)"
        )


def is_sparse(positions: torch.Tensor, sparsity: SparsityConfig) -> torch.Tensor:
    """Whether the query at each position (counted from 0) sees more blocks than it may select."""
    return positions // sparsity.select_block_size + 1 > sparsity.num_selected_blocks


def selection_agreement(recorded: torch.Tensor, own: torch.Tensor, positions_T: torch.Tensor, sparsity: SparsityConfig) -> tuple[float, float]:
    """(blocks both chose, blocks the sampler chose), over recorded queries that see more blocks than they may select.

    `recorded` and `own` are `[T, layers, Hkv, n]`: each row's blocks once, −1 where fewer, −2 first where unrecorded.
    """
    rows = (is_sparse(positions_T, sparsity) & (recorded[:, 0, 0, 0] != RECOMPUTE)).nonzero().squeeze(1)
    counts = torch.zeros(2, dtype=torch.int64, device=recorded.device)
    for layer in range(recorded.shape[1]):
        theirs, ours = recorded[rows, layer].int(), own[rows, layer].int()
        # No list holds a block twice, so a block in both is a pair of equal neighbours in the sorted union.
        union = torch.cat([theirs, ours], dim=-1).sort(dim=-1).values
        counts[0] += ((union[..., 1:] == union[..., :-1]) & (union[..., 1:] >= 0)).sum()
        counts[1] += (theirs >= 0).sum()
    agreed, total = counts.tolist()
    return float(agreed), float(total)


def describe_step(
    scored_groups: Sequence[ScoredGroup], step_batches: Sequence[StepBatch], *, policy_version: int, sparsity: SparsityConfig
) -> dict[str, float]:
    """Metrics known before any forward pass: dead groups, counts of what is trained on, staleness, share of sparse queries.

    `groups/dead_fraction` (TRL: frac_reward_zero_std) is the share of groups without reward variance;
    `selection/sparse_queries` the share of queries in the loss that leave visible blocks unselected.
    """
    dead = sum(not any(scored.advantages) for scored in scored_groups) / max(1, len(scored_groups))
    lags = [policy_version - completion.policy_version for scored in scored_groups for completion in scored.group.completions]
    batches = [batch for step_batch in step_batches for batch in step_batch.micro_batches]
    num_loss_tokens = sum(step_batch.num_loss_tokens for step_batch in step_batches)
    metrics = {
        "frac_reward_zero_std": dead,
        "groups/dead_fraction": dead,
        "learner/sequences": float(sum(step_batch.num_sequences for step_batch in step_batches)),
        "learner/loss_tokens": float(num_loss_tokens),
        "learner/tokens": float(sum(batch.token_ids_T.numel() for batch in batches)),
        "learner/micro_batches": float(len(batches)),
        "sampling/version_lag": float(max(lags, default=0)),
    }
    if num_loss_tokens:
        # The query that predicts token t stands at position t − 1.
        sparse = sum(int(is_sparse(batch.positions_T[batch.loss_weights_T != 0] - 1, sparsity).sum()) for batch in batches)
        metrics["selection/sparse_queries"] = sparse / num_loss_tokens
    return metrics
