"""ScoredGroups → packed micro-batches whose loss weights come from counts over the whole optimizer step.

A step's loss is the plain sum over its micro-batches, so its gradient does not depend on how sequences were packed.
Samples of one group stay together where they fit: the learner computes their prompt once, and the token budget of a
micro-batch counts it once.
What is left out of the loss is left out of the counts: samples without a score, groups without reward variance
(`drop_zero_variance`), truncated completions (`overlong_filter`), empty completions. Leaves out log-probabilities of
the learner (it fills them in) and devices: everything here is on the CPU.

    kind        weight of a token of completion i            S sequences and Σ|o| tokens that are kept
    grpo, gspo  1 / (S · |o_i|)                              per-sequence mean, then mean over sequences
    token_mean  1 / Σ|o|                                     DAPO
    dr_grpo     1 / (S · max_tokens)                         Dr. GRPO, a constant denominator

Shape suffixes: T packed tokens, N sequences of a micro-batch, N1 = N + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch

from grpo.data_types import Batch, Completion, Group, ScoredGroup, StepBatch

LossKind = Literal["grpo", "token_mean", "dr_grpo", "gspo"]
Sample = tuple[int, int]
"""(index of the group, index of the completion in it)."""

RECOMPUTE = -2
"""First entry of a selection row that was not recorded."""


def kept_samples(scored_groups: Sequence[ScoredGroup], *, drop_zero_variance: bool, overlong_filter: bool) -> list[Sample]:
    """The samples that enter the loss, in the groups' order.

    Raises:
        ValueError: a record whose parts do not fit together.
    """
    kept: list[Sample] = []
    for group_index, scored in enumerate(scored_groups):
        name, completions = f"prompt {scored.group.prompt.prompt_id!r}", scored.group.completions
        if not len(completions) == len(scored.scores) == len(scored.advantages):
            raise ValueError(f"{name}: {len(completions)} completions, but {len(scored.scores)} scores and {len(scored.advantages)} advantages")
        if not scored.group.prompt.token_ids:
            raise ValueError(f"{name} has no tokens, so nothing predicts its completions' first token")
        # Advantages are all exactly 0 if and only if the group is dead (grpo.advantages).
        if drop_zero_variance and not any(scored.advantages):
            continue
        for sample_index, (completion, score) in enumerate(zip(completions, scored.scores)):
            if len(completion.logprobs) != len(completion.token_ids):
                raise ValueError(f"{name}, sample {sample_index}: {len(completion.token_ids)} tokens, but {len(completion.logprobs)} log-probs")
            left_out = score.value is None or not completion.token_ids or (overlong_filter and completion.finish_reason == "length")
            if not left_out:
                kept.append((group_index, sample_index))
    return kept


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget` tokens: first fit, longest first, ties by index.

    A sequence longer than the budget gets a bin of its own.
    """
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be >= 1, got {budget}")
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        slot = next((i for i, room in enumerate(free) if length <= room), None)
        if slot is None:
            bins.append([index])
            free.append(budget - length)
        else:
            bins[slot].append(index)
            free[slot] -= length
    return bins


def stitch_selection(group: Group, completion: Completion) -> torch.Tensor | None:
    """Prompt's and completion's recorded choices as one `[P + L, layers, Hkv, n]`; unrecorded rows are -2; None if neither has any.

    Raises:
        ValueError: a record whose number of rows is not its number of tokens.
    """
    parts = [(group.prompt_selection, len(group.prompt.token_ids)), (completion.selection, len(completion.token_ids))]
    recorded = [selection for selection, _ in parts if selection is not None]
    if not recorded:
        return None
    rows = []
    for selection, length in parts:
        if selection is None:
            rows.append(recorded[0].new_full((length, *recorded[0].shape[1:]), RECOMPUTE))
        elif selection.shape[0] != length:
            raise ValueError(f"a selection record of {selection.shape[0]} rows for {length} tokens of prompt {group.prompt.prompt_id!r}")
        else:
            rows.append(selection)
    return torch.cat(rows)


def _pack_selection(groups: Sequence[ScoredGroup], samples: Sequence[Sample]) -> torch.Tensor | None:
    stitched = [stitch_selection(groups[g].group, groups[g].group.completions[i]) for g, i in samples]
    some = next((selection for selection in stitched if selection is not None), None)
    if some is None:
        return None
    full = []
    for (g, i), selection in zip(samples, stitched):
        length = len(groups[g].group.prompt.token_ids) + len(groups[g].group.completions[i].token_ids)
        full.append(some.new_full((length, *some.shape[1:]), RECOMPUTE) if selection is None else selection)
    return torch.cat(full)


def _build_batch(groups: Sequence[ScoredGroup], samples: Sequence[Sample], weights: Sequence[float]) -> Batch:
    """Pack `samples`; `weights[j]` is the loss weight of each completion token of sample j."""
    prompts = [groups[g].group.prompt for g, _ in samples]
    completions = [groups[g].group.completions[i] for g, i in samples]
    # Segments alternate prompt, completion; per-segment constants are spread over their tokens.
    segments = torch.tensor([n for p, c in zip(prompts, completions) for n in (len(p.token_ids), len(c.token_ids))])
    lengths_N = segments.view(-1, 2).sum(1)
    cu_seqlens_N1 = torch.zeros(len(samples) + 1, dtype=torch.int32)
    cu_seqlens_N1[1:] = lengths_N.cumsum(0)
    num_tokens = int(cu_seqlens_N1[-1])

    def spread(per_completion: Sequence[float]) -> torch.Tensor:
        values = torch.zeros(len(samples), 2, dtype=torch.float64)
        values[:, 1] = torch.tensor(per_completion, dtype=torch.float64)
        return values.view(-1).repeat_interleave(segments).float()

    is_completion_T = torch.tensor([False, True]).repeat(len(samples)).repeat_interleave(segments)
    sampler_logprobs_T = torch.zeros(num_tokens)
    sampler_logprobs_T[is_completion_T] = torch.tensor(list(chain.from_iterable(c.logprobs for c in completions)), dtype=torch.float32)
    return Batch(
        token_ids_T=torch.tensor(list(chain.from_iterable(chain(p.token_ids, c.token_ids) for p, c in zip(prompts, completions)))),
        positions_T=torch.arange(num_tokens) - cu_seqlens_N1[:-1].long().repeat_interleave(lengths_N),
        cu_seqlens_N1=cu_seqlens_N1,
        loss_weights_T=spread(weights),
        advantages_T=spread([groups[g].advantages[i] for g, i in samples]),
        sampler_logprobs_T=sampler_logprobs_T,
        selection=_pack_selection(groups, samples),
        samples_N2=torch.tensor(samples),
    )


def token_weights(completion_lengths: Sequence[int], *, loss: LossKind, max_tokens: int) -> list[float]:
    """Loss weight of each token of each kept completion (see the module's table).

    Raises:
        ValueError: an unknown kind.
    """
    num_sequences = len(completion_lengths)
    if loss in ("grpo", "gspo"):
        return [1.0 / (num_sequences * length) for length in completion_lengths]
    if loss == "token_mean":
        return [1.0 / sum(completion_lengths)] * num_sequences
    if loss == "dr_grpo":
        return [1.0 / (num_sequences * max_tokens)] * num_sequences
    raise ValueError(f"loss must be 'grpo', 'token_mean', 'dr_grpo' or 'gspo', got {loss!r}")


def _units(group_indices: Sequence[int], completion_lengths: Sequence[int], lengths: Sequence[int], budget: int) -> list[tuple[int, list[int]]]:
    """(tokens, samples) of each group's samples, cut where they exceed `budget`. A unit computes its prompt once."""
    units: list[tuple[int, list[int]]] = []
    last_group = None
    for index, group in enumerate(group_indices):
        if group == last_group and units[-1][0] + completion_lengths[index] <= budget:
            units[-1] = (units[-1][0] + completion_lengths[index], [*units[-1][1], index])
        else:
            units.append((lengths[index], [index]))
        last_group = group
    return units


def _step_batch(groups: Sequence[ScoredGroup], kept: Sequence[Sample], loss: LossKind, micro_batch_tokens: int, max_tokens: int) -> StepBatch:
    completion_lengths = [len(groups[g].group.completions[i].token_ids) for g, i in kept]
    lengths = [len(groups[g].group.prompt.token_ids) + length for (g, _), length in zip(kept, completion_lengths)]
    weights = token_weights(completion_lengths, loss=loss, max_tokens=max_tokens)
    units = _units([g for g, _ in kept], completion_lengths, lengths, micro_batch_tokens)
    bins = [[j for unit in members for j in units[unit][1]] for members in pack([length for length, _ in units], micro_batch_tokens)]
    return StepBatch(
        micro_batches=tuple(_build_batch(groups, [kept[j] for j in members], [weights[j] for j in members]) for members in bins),
        num_sequences=len(kept),
        num_loss_tokens=sum(completion_lengths),
    )


def build_step(
    scored_groups: Sequence[ScoredGroup],
    *,
    loss: LossKind,
    micro_batch_tokens: int,
    max_tokens: int,
    drop_zero_variance: bool = True,
    overlong_filter: bool = False,
) -> StepBatch:
    """All micro-batches of one optimizer step over `scored_groups`.

    `num_sequences` and `num_loss_tokens` of the result count the completions (and their tokens) that are in the loss.
    Where nothing is left to train on the StepBatch has no micro-batches and both counts are 0.

    Raises:
        ValueError: an unknown loss kind, a budget below 1, or a record whose parts do not fit together.
    """
    kept = kept_samples(scored_groups, drop_zero_variance=drop_zero_variance, overlong_filter=overlong_filter)
    return _step_batch(scored_groups, kept, loss, micro_batch_tokens, max_tokens)


def build_mini_batches(
    scored_groups: Sequence[ScoredGroup],
    *,
    mini_batches: int,
    loss: LossKind,
    micro_batch_tokens: int,
    max_tokens: int,
    drop_zero_variance: bool = True,
    overlong_filter: bool = False,
) -> tuple[StepBatch, ...]:
    """The groups dealt over at most `mini_batches` optimizer steps, each with counts of its own.

    Groups stay whole; those with something to train on are dealt round robin, and a step that would be empty is left
    out, so the result is empty where nothing is left to train on.
    """
    if mini_batches < 1:
        raise ValueError(f"mini_batches must be >= 1, got {mini_batches}")
    kept = kept_samples(scored_groups, drop_zero_variance=drop_zero_variance, overlong_filter=overlong_filter)
    order = {group_index: rank for rank, group_index in enumerate(dict.fromkeys(g for g, _ in kept))}
    shares = [[(g, i) for g, i in kept if order[g] % mini_batches == share] for share in range(min(mini_batches, len(order)))]
    return tuple(_step_batch(scored_groups, share, loss, micro_batch_tokens, max_tokens) for share in shares)


def with_advantages(batch: Batch, advantages: Sequence[Sequence[float]]) -> Batch:
    """The batch with the advantages `advantages[group][sample]` in place of its own (prompt tokens keep 0)."""
    per_sequence_N = torch.tensor([advantages[g][i] for g, i in batch.samples_N2.tolist()], dtype=torch.float32)
    lengths_N = batch.cu_seqlens_N1.cpu().diff().long()
    spread_T = per_sequence_N.repeat_interleave(lengths_N).to(batch.advantages_T.device)
    return replace(batch, advantages_T=torch.where(batch.loss_weights_T != 0, spread_T, torch.zeros_like(spread_T)))
