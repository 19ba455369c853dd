"""The learner: scored groups in, one GRPO update of the policy out.

    scored groups → pack → old log-probs → reference log-probs → (KL in the reward → advantages) → loss, backward → AdamW

One optimizer step per mini-batch and inner epoch. With a single one, π_old is the training forward itself (detached):
the ratio is 1 by construction and a forward pass is saved; with more, or with KL in the reward, the old log-probs are
computed first by the same code on the same micro-batches, and the first ratio is checked to be exactly 1.
Master weights, gradients and optimizer are fp32; bf16 and fp16 run under autocast. Leaves out sampling, rewards, and
when to save: the trainer's.

Shape suffixes: T packed tokens of a micro-batch, N sequences, R rows in the loss (predicted tokens).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import nsa  # noqa: F401 (registers NSAForCausalLM)
from grpo.advantages import group_advantages, shaped_rewards
from grpo.batching import build_mini_batches, with_advantages
from grpo.config import RunConfig
from grpo.data_types import ScoredGroup, StepStats
from grpo.loss import LossSums, kl_estimate, means, merge, policy_loss
from grpo.micro_batch import MicroBatch, prepare, row_logprobs, scatter_rows, sequence_logprobs
from grpo.optimizer import gradient_norms, learning_rate, make_optimizer, set_learning_rate
from grpo.truths import LearnerError, check_mismatch, describe_step, first_kl_difference, first_ratio_deviation, selection_agreement
from nsa.attention import resolve_backend

logger = logging.getLogger(__name__)

STATE_FORMAT = 1


def resolve_device(name: str) -> torch.device:
    """`auto` → CUDA where there is a GPU.

    Raises:
        ValueError: `cuda` was asked for and there is no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"model.device is {name!r}, but torch sees no CUDA GPU; use 'cpu' or 'auto'")
    return torch.device(name)


def load_policy(config: RunConfig) -> torch.nn.Module:
    """The NSA checkpoint of `config.model.path` in fp32, on the CPU.

    Raises:
        ValueError: a checkpoint of another architecture.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    if not hasattr(model.model, "forward_packed"):
        raise ValueError(f"{config.model.path} is a {type(model).__name__}, not an NSA model; `nsa-grpo convert` makes one of a dense checkpoint")
    return model


class Learner:
    """The policy, its reference and its optimizer.

    Args:
        config: the run's configuration (model, rollout, algorithm, optimizer, train).
        device: in place of `config.model.device`.
        model: an NSAForCausalLM in place of loading `config.model.path`; trained as it is, so its dtype should be fp32.

    `policy_version` counts the calls of `step`; the reference is a snapshot of the policy, taken here where
    `algorithm.kl_coefficient` > 0, and never read from disk but by `load_state_dict`.
    """

    def __init__(self, config: RunConfig, *, device: str | torch.device | None = None, model: Any = None) -> None:
        self.config = config
        self.device = torch.device(device) if device is not None else resolve_device(config.model.device)
        resolve_backend(config.model.attention_backend, self.device)  # a wrong one is found before the weights are loaded
        self.policy_version = 0
        self._model: Any = (load_policy(config) if model is None else model).to(self.device)
        self._saved_backend = self._model.config.attention_backend
        if config.model.attention_backend != "auto":
            self._model.config.attention_backend = config.model.attention_backend
        self._model.requires_grad_(True)
        self._model.eval()
        self._reference: Any = None
        if config.algorithm.kl_coefficient > 0:
            self._reference = copy.deepcopy(self._model).requires_grad_(False)
        self._reference_is_policy = True
        self._reference_is_initial = True
        if config.model.gradient_checkpointing:
            self._model.gradient_checkpointing_enable()
            self._model.train()
        self._optimizer = make_optimizer(self._model.named_parameters(), config.optimizer)
        dtype = getattr(torch, config.model.dtype)
        self._compute_dtype: torch.dtype | None = None if dtype == torch.float32 else dtype
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, scored_groups: Sequence[ScoredGroup]) -> StepStats:
        """Update the policy once per mini-batch and inner epoch, and raise `policy_version` by one.

        Where nothing is left to train on, weights and optimizer stay as they are and `learner/updates` is 0.

        Raises:
            LearnerError: first ratio not 1, KL to an equal reference not 0, mismatch above the bound, a gradient that
                is not finite. Nothing was changed by the optimizer step that raised.
            ValueError: records that do not fit, or replay without recorded selections.
        """
        algorithm, section = self.config.algorithm, self.config.optimizer
        step_batches = build_mini_batches(
            scored_groups,
            mini_batches=algorithm.mini_batches,
            loss=algorithm.loss,
            micro_batch_tokens=section.micro_batch_tokens,
            max_tokens=self.config.rollout.max_tokens,
            drop_zero_variance=algorithm.drop_zero_variance,
            overlong_filter=algorithm.overlong_filter,
        )
        rate = learning_rate(self.policy_version, self.config.train.steps, section)
        metrics = describe_step(scored_groups, step_batches, policy_version=self.policy_version, sparsity=self._model.config.sparsity)
        metrics |= {"learning_rate": rate, "learner/updates": 0.0}
        if not step_batches:
            logger.warning("step %d: no sample is left to train on; the policy stays as it is", self.policy_version)
            metrics |= {"loss": 0.0, "grad_norm": 0.0}
        else:
            set_learning_rate(self._optimizer, rate)
            batches = [step_batch.micro_batches for step_batch in step_batches]
            if algorithm.selection == "replay" and any(batch.selection is None for of_step in batches for batch in of_step):
                raise ValueError("algorithm.selection is 'replay', but the sampler recorded no selections")
            metrics |= self._update(scored_groups, [[prepare(batch, self.device) for batch in of_step] for of_step in batches])
        self.policy_version += 1
        every = algorithm.reference_refresh_steps
        if self._reference is not None and every is not None and self.policy_version % every == 0:
            self._reference.load_state_dict(self._model.state_dict())
            self._reference_is_policy, self._reference_is_initial = True, False
        return StepStats(policy_version=self.policy_version, metrics=metrics)

    def _update(self, scored_groups: Sequence[ScoredGroup], prepared: list[list[MicroBatch]]) -> dict[str, float]:
        """Everything after packing; `prepared` holds the micro-batches of each mini-batch."""
        algorithm = self.config.algorithm
        reward_kl = self._reference is not None and algorithm.kl_place == "reward"
        if reward_kl or algorithm.inner_epochs > 1:
            prepared = [[self._with_old(micro) for micro in step] for step in prepared]
        else:  # the first mini-batch meets the old policy itself: its own forward pass gives the old log-probs
            prepared = [prepared[0], *([self._with_old(micro) for micro in step] for step in prepared[1:])]
        if self._reference is not None:
            prepared = [[self._with_reference(micro) for micro in step] for step in prepared]
        if reward_kl:
            prepared = self._with_reward_kl(scored_groups, prepared)
        parts: list[LossSums] = []
        agreements: list[tuple[float, float]] = []
        norms: list[dict[str, float]] = []
        checks: dict[str, float] = {}
        for epoch in range(algorithm.inner_epochs):
            for step in prepared:
                self._optimizer.zero_grad(set_to_none=True)
                step_parts = []
                for micro in step:
                    sums, agreement = self._accumulate(micro, checks, first_epoch=epoch == 0)
                    step_parts.append(sums)
                    agreements += [agreement] if agreement else []
                if epoch == 0:
                    check_mismatch(merge(step_parts), algorithm.mismatch_bound)
                norms.append(self._optimizer_step())
                parts += step_parts
        updates = len(norms)
        total = merge(parts)
        metrics = means(total) | checks | {name: sum(norm[name] for norm in norms) / updates for name in norms[0]}
        metrics |= {"loss": float(total.sums["loss"]) / updates, "learner/updates": float(updates)}
        recorded = sum(chosen for _, chosen in agreements)
        if recorded > 0:
            metrics["selection/agreement"] = sum(agreed for agreed, _ in agreements) / recorded
        return metrics

    def _accumulate(self, micro: MicroBatch, checks: dict[str, float], *, first_epoch: bool) -> tuple[LossSums, tuple[float, float] | None]:
        """Forward and backward of one micro-batch; gradients add up in the parameters. A step's first one fills `checks`.

        Returns the measurements, and (agreed, recorded) block choices where the sampler recorded its own."""
        algorithm, batch, rows_R = self.config.algorithm, micro.batch, micro.rows_R
        compare = first_epoch and batch.selection is not None and algorithm.selection == "recompute"
        logprobs_R, entropy_R, selection = self._logprobs(self._model, micro, return_selection=compare)
        old_R = logprobs_R.detach() if batch.old_logprobs_T is None else batch.old_logprobs_T[rows_R]
        reference_R = None if batch.reference_logprobs_T is None else batch.reference_logprobs_T[rows_R]
        if not checks:
            checks["check/first_ratio_deviation"] = first_ratio_deviation(logprobs_R.detach(), old_R)
            if reference_R is not None and self._reference_is_policy:
                checks["check/first_kl_difference"] = first_kl_difference(logprobs_R.detach(), reference_R)
        loss, sums = policy_loss(
            logprobs_R,
            old_logprobs_T=old_R,
            sampler_logprobs_T=batch.sampler_logprobs_T[rows_R],
            advantages_T=batch.advantages_T[rows_R],
            loss_weights_T=batch.loss_weights_T[rows_R],
            sequence_T=micro.sequence_R,
            num_sequences=micro.num_sequences,
            kind=algorithm.loss,
            epsilon_low=algorithm.epsilon_low,
            epsilon_high=algorithm.epsilon_high,
            tis_cap=algorithm.tis_cap,
            reference_logprobs_T=reference_R,
            kl_coefficient=algorithm.kl_coefficient if algorithm.kl_place == "loss" else 0.0,
            kl_estimator=algorithm.kl_estimator,
        )
        self._scaler.scale(loss).backward()
        sums = replace(sums, sums=sums.sums | {"entropy": entropy_R.sum()})
        if not compare or batch.selection is None or selection is None:
            return sums, None
        return sums, selection_agreement(batch.selection, selection, batch.positions_T, self._model.config.sparsity)

    def _optimizer_step(self) -> dict[str, float]:
        """Clip, update, and return the gradient norms (before clipping)."""
        self._scaler.unscale_(self._optimizer)
        by_kind = gradient_norms(self._model.named_parameters())
        total = torch.stack(list(by_kind.values())).square().sum().sqrt()
        finite = math.isfinite(total.item())
        if not finite and not self._scaler.is_enabled():
            bad = [kind for kind, norm in by_kind.items() if not math.isfinite(norm.item())]
            raise LearnerError(
                f"the gradient of {', '.join(bad)} is not finite at policy version {self.policy_version}; the weights were left as they are"
            )
        torch.nn.utils.clip_grads_with_norm_(list(self._model.parameters()), self.config.optimizer.max_grad_norm, total)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if finite:
            self._reference_is_policy = False
        norms = {"grad_norm": total.item()} | {f"grad_norm/{kind}": norm.item() for kind, norm in by_kind.items()}
        if self._scaler.is_enabled():
            norms |= {"fp16/loss_scale": self._scaler.get_scale(), "fp16/skipped": float(not finite)}
        return norms

    def _logprobs(self, model: Any, micro: MicroBatch, *, return_selection: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return row_logprobs(
            model,
            micro,
            temperature=self.config.rollout.temperature,
            chunk=self.config.optimizer.logprob_chunk_tokens,
            compute_dtype=self._compute_dtype,
            replay=self.config.algorithm.selection == "replay",
            return_selection=return_selection,
        )

    @torch.no_grad()
    def _scattered(self, model: Any, micro: MicroBatch) -> torch.Tensor:
        return scatter_rows(micro, self._logprobs(model, micro)[0])

    def _with_old(self, micro: MicroBatch) -> MicroBatch:
        return replace(micro, batch=replace(micro.batch, old_logprobs_T=self._scattered(self._model, micro)))

    def _with_reference(self, micro: MicroBatch) -> MicroBatch:
        return replace(micro, batch=replace(micro.batch, reference_logprobs_T=self._scattered(self._reference, micro)))

    def _with_reward_kl(self, scored_groups: Sequence[ScoredGroup], prepared: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Subtract β Σ_t KL_t from each packed sample's reward and take the advantages anew.

        Which groups are dead was decided before, on the rewards alone (noise of the KL would keep every group alive).
        Samples that are scored but not packed keep their reward in the group's statistics.
        """
        algorithm = self.config.algorithm
        rewards = [
            list(
                shaped_rewards(
                    scored.group,
                    scored.scores,
                    max_tokens=self.config.rollout.max_tokens,
                    overlong_penalty_tokens=algorithm.overlong_penalty_tokens,
                )
            )
            for scored in scored_groups
        ]
        for micro in (micro for step in prepared for micro in step):
            old_T, reference_T = micro.batch.old_logprobs_T, micro.batch.reference_logprobs_T
            assert old_T is not None
            assert reference_T is not None
            kl_R = kl_estimate(old_T[micro.rows_R], reference_T[micro.rows_R], algorithm.kl_estimator)
            kl_N = kl_R.new_zeros(micro.num_sequences).index_add_(0, micro.sequence_R, kl_R)
            for (group_index, sample_index), kl in zip(micro.batch.samples_N2.tolist(), kl_N.tolist()):
                rewards[group_index][sample_index] -= algorithm.kl_coefficient * kl
        advantages = [group_advantages(of_group, algorithm.advantage) for of_group in rewards]
        return [[replace(micro, batch=with_advantages(micro.batch, advantages)) for micro in step] for step in prepared]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once (tied ones under their first name), detached, fp32, on the learner's device; not copies."""
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach()

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities `[L]` (fp32, CPU) of a sequence's tokens given those before, as the policy is now; entry 0 is 0."""
        chunk = self.config.optimizer.logprob_chunk_tokens
        return sequence_logprobs(self._model, token_ids, chunk=chunk, compute_dtype=self._compute_dtype)

    def save_model(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write the fp32 policy as a Hugging Face checkpoint (safetensors, config.json), with the tokenizer where given."""
        running = self._model.config.attention_backend
        self._model.config.attention_backend = self._saved_backend
        try:
            self._model.save_pretrained(folder)
        finally:
            self._model.config.attention_backend = running
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights that `save_model` wrote: tensors (references, as torch's) and plain values.

        `torch.save` it; `torch.load(weights_only=True)` reads it. The reference is in it once it is no longer the initial policy.
        """
        reference = None if self._reference is None or self._reference_is_initial else self._reference.state_dict()
        return {
            "format": STATE_FORMAT,
            "policy_version": self.policy_version,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "reference": reference,
            "reference_is_policy": self._reference_is_policy,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any], model_folder: str | Path) -> None:
        """Continue where `state_dict` and `save_model(model_folder)` were called; on the CPU the next steps are bit-equal.

        The learner must have been built from the run's own configuration: its reference is then the initial policy.

        Raises:
            ValueError: a state of another format, or weights of another model.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"learner state has format {state.get('format')!r}, this version reads {STATE_FORMAT}")
        loaded = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
        try:
            self._model.load_state_dict(loaded)
        except RuntimeError as error:
            raise ValueError(f"{model_folder} does not hold the weights of this run's model: {' '.join(str(error).split())}") from error
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.policy_version = state["policy_version"]
        if self._reference is not None and state["reference"] is not None:
            self._reference.load_state_dict(state["reference"])
            self._reference_is_initial = False
        self._reference_is_policy = state["reference_is_policy"]
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
