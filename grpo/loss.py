"""The clipped policy-gradient loss of GRPO and its relatives, the KL estimators, and what is measured beside them.

Everything is per predicted token and summed with the weights made in `grpo.batching`, so micro-batches add up. The
aggregations grpo, token_mean and dr_grpo differ in their weights alone; gspo also has the sequence's ratio.

    ratio_t = π/π_old            (gspo: sg[s_i] · π_t/sg[π_t],  s_i = exp(mean_t log π/π_old): GSPO-token)
    loss    = Σ_t w_t { −min(π_old/π_sampler, C) · min(ratio·Â, clip(ratio, 1−ε_low, 1+ε_high)·Â) + β · KL_t }

The truncated importance weight carries no gradient. At π = π_old = π_sampler the gradient of −loss is
Σ_t w_t (Â + β(π_ref/π − 1)) ∇log π for k3 (DeepSeekMath, appendix A.1).

Shape suffixes: T predicted tokens of a micro-batch (those in the loss), N its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from grpo.batching import LossKind

KlEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 before exp, so that a hopeless token cannot make the loss infinite; beyond, no gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Detached scalars of one micro-batch that merge into those of a step; sums are over tokens."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]
    minima: dict[str, torch.Tensor]


def merge(parts: Sequence[LossSums]) -> LossSums:
    """The sums, maxima and minima of several micro-batches together (all with the same names)."""
    first = parts[0]
    return LossSums(
        sums={name: torch.stack([part.sums[name] for part in parts]).sum() for name in first.sums},
        maxima={name: torch.stack([part.maxima[name] for part in parts]).max() for name in first.maxima},
        minima={name: torch.stack([part.minima[name] for part in parts]).min() for name in first.minima},
    )


def means(total: LossSums) -> dict[str, float]:
    """Metrics: sums over the number of tokens, maxima and minima as they are."""
    count = float(total.sums["tokens"])
    metrics = {name: float(value) / count for name, value in total.sums.items() if name not in ("tokens", "loss")}
    return metrics | {name: float(value) for name, value in (total.maxima | total.minima).items()}


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_estimate(logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor, kind: KlEstimator) -> torch.Tensor:
    """Per-token estimate of KL(π ‖ π_ref) on tokens drawn from π, with d = log π_ref − log π.

    k1 = −d (unbiased, signed), k2 = d²/2, k3 = exp(d) − d − 1 (unbiased, ≥ 0; DeepSeekMath Eq. 4).
    """
    d_T = reference_logprobs_T - logprobs_T
    if kind == "k1":
        return -d_T
    if kind == "k2":
        return 0.5 * d_T.square()
    if kind == "k3":
        return _exp(d_T) - d_T - 1
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', got {kind!r}")


def _log_ratio(logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int, kind: LossKind) -> torch.Tensor:
    log_ratio_T = logprobs_T - old_logprobs_T
    if kind != "gspo":
        return log_ratio_T
    zeros_N = log_ratio_T.new_zeros(num_sequences)
    mean_N = zeros_N.index_add(0, sequence_T, log_ratio_T.detach()) / zeros_N.index_add(0, sequence_T, torch.ones_like(log_ratio_T)).clamp(min=1)
    return mean_N[sequence_T] + (logprobs_T - logprobs_T.detach())


def policy_loss(
    logprobs_T: torch.Tensor,
    *,
    old_logprobs_T: torch.Tensor,
    sampler_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    loss_weights_T: torch.Tensor,
    sequence_T: torch.Tensor,
    num_sequences: int,
    kind: LossKind,
    epsilon_low: float,
    epsilon_high: float,
    tis_cap: float | None = None,
    reference_logprobs_T: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
) -> tuple[torch.Tensor, LossSums]:
    """The micro-batch's share of the step's loss (a scalar with gradient) and its detached measurements.

    All `[T]` tensors hold predicted tokens with non-zero weight only; `sequence_T` numbers their sequences from 0 to
    `num_sequences` − 1, and a sequence's tokens are all present (gspo's mean needs them). Only `logprobs_T` is
    differentiated. `kl_coefficient` > 0 adds the KL term; `reference_logprobs_T` alone only measures it.

    Raises:
        ValueError: k1 as a loss term, a KL term without reference, or an unknown kind.
    """
    if kind not in ("grpo", "token_mean", "dr_grpo", "gspo"):
        raise ValueError(f"loss must be 'grpo', 'token_mean', 'dr_grpo' or 'gspo', got {kind!r}")
    if kl_coefficient > 0 and (kl_estimator == "k1" or reference_logprobs_T is None):
        raise ValueError("a KL term in the loss needs reference log-probs and the estimator k2 or k3 (k1 has no gradient in expectation)")
    ratio_T = _exp(_log_ratio(logprobs_T, old_logprobs_T, sequence_T, num_sequences, kind))
    surrogate_T = torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages_T)
    mismatch_T = (old_logprobs_T - sampler_logprobs_T).detach()
    importance_T = _exp(mismatch_T) if tis_cap is None else _exp(mismatch_T).clamp(max=tis_cap)
    per_token_T = -surrogate_T if tis_cap is None else -surrogate_T * importance_T
    kl_T = None
    if reference_logprobs_T is not None:
        kl_T = kl_estimate(logprobs_T, reference_logprobs_T, kl_estimator)
        if kl_coefficient > 0:
            per_token_T = per_token_T + kl_coefficient * kl_T
    loss = (loss_weights_T * per_token_T).sum()

    with torch.no_grad():
        ratio_T = ratio_T.detach()
        low_T = (ratio_T < 1 - epsilon_low) & (advantages_T < 0)
        high_T = (ratio_T > 1 + epsilon_high) & (advantages_T > 0)
        sums = {
            "tokens": ratio_T.new_tensor(float(ratio_T.numel())),
            "loss": loss.detach(),
            "clip_ratio/low_mean": low_T.sum(),
            "clip_ratio/high_mean": high_T.sum(),
            "clip_ratio/region_mean": (low_T | high_T).sum(),
            "ratio/mean": ratio_T.sum(),
            "mismatch/mean": mismatch_T.abs().sum(),
            "mismatch/k3": (_exp(mismatch_T) - mismatch_T - 1).sum(),
            "sampling/importance_sampling_ratio/mean": importance_T.sum(),
        }
        if kl_T is not None:
            sums["kl"] = kl_T.detach().sum()
        maxima = {"ratio/max": ratio_T.max(), "mismatch/max": mismatch_T.abs().max(), "sampling/importance_sampling_ratio/max": importance_T.max()}
        minima = {"sampling/importance_sampling_ratio/min": importance_T.min()}
    return loss, LossSums(sums=sums, maxima=maxima, minima=minima)
