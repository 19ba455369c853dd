"""A packed batch on the learner's device, and the policy's log-probabilities of its rows in the loss.

Leaves out gradients and the loss. The learner calls `row_logprobs` for π, π_old and π_ref alike, so equal weights give
equal numbers bit for bit.

Shape suffixes: T packed tokens, N sequences, R rows in the loss (predicted tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grpo.data_types import Batch
from grpo.logprobs import token_logprobs
from nsa.packing import SharedPrefix, plan_shared_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A batch with its rows in the loss: row r predicts packed token `rows_R[r]`, of sequence `sequence_R[r]`."""

    batch: Batch
    rows_R: torch.Tensor
    sequence_R: torch.Tensor
    num_sequences: int
    shared_prefix: SharedPrefix | None
    """Plan by which the samples of a group compute their prompt once."""


def prepare(batch: Batch, device: torch.device) -> MicroBatch:
    """Move a packed batch to the device and find its rows in the loss."""
    rows_R = batch.loss_weights_T.nonzero().squeeze(1)
    lengths_N = batch.cu_seqlens_N1.diff().long()
    sequence_T = torch.arange(len(lengths_N)).repeat_interleave(lengths_N)
    # A sequence's first token in the loss is its completion's first: what stands before is its group's prompt.
    sequences, counts = sequence_T[rows_R].unique_consecutive(return_counts=True)
    first_R = rows_R[counts.cumsum(0) - counts] - batch.cu_seqlens_N1[:-1][sequences]
    shared = None
    if len(sequences) == len(lengths_N):
        shared = plan_shared_prefix(batch.cu_seqlens_N1, first_R.tolist(), batch.samples_N2[:, 0].tolist())
    # cu_seqlens stays on the CPU: the model plans its work from it.
    names = ("token_ids_T", "positions_T", "loss_weights_T", "advantages_T", "sampler_logprobs_T")
    moved = {name: getattr(batch, name).to(device) for name in names}
    selection = None if batch.selection is None else batch.selection.to(device)
    return MicroBatch(
        batch=replace(batch, selection=selection, **moved),
        rows_R=rows_R.to(device),
        sequence_R=sequence_T[rows_R].to(device),
        num_sequences=len(lengths_N),
        shared_prefix=shared,
    )


def row_logprobs(
    model: Any,
    micro: MicroBatch,
    *,
    temperature: float,
    chunk: int,
    compute_dtype: torch.dtype | None,
    replay: bool,
    return_selection: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs and entropies `[R]` of the rows in the loss, and the block choices `[T, layers, Hkv, n]` where asked.

    `compute_dtype` None runs in the weights' dtype, otherwise under autocast. `replay` uses the recorded choices.
    """
    batch = micro.batch
    autocast = torch.autocast(batch.token_ids_T.device.type, dtype=compute_dtype) if compute_dtype else contextlib.nullcontext()
    with autocast:
        packed = model.model.forward_packed(
            batch.token_ids_T,
            batch.positions_T,
            batch.cu_seqlens_N1,
            selection=batch.selection if replay else None,
            return_selection=return_selection,
            shared_prefix=micro.shared_prefix,
            rows_R=micro.rows_R - 1,
        )
    logprobs_R, entropy_R = token_logprobs(
        packed.hidden_TE,
        model.lm_head.weight,
        batch.token_ids_T[micro.rows_R],
        temperature=temperature,
        chunk=chunk,
        compute_dtype=compute_dtype,
    )
    return logprobs_R, entropy_R, packed.selection if return_selection else None


def scatter_rows(micro: MicroBatch, values_R: torch.Tensor) -> torch.Tensor:
    """`[T]`: the rows' values at their tokens, 0 elsewhere."""
    return values_R.new_zeros(micro.batch.token_ids_T.shape).index_copy_(0, micro.rows_R, values_R)


@torch.no_grad()
def sequence_logprobs(model: Any, token_ids: Sequence[int], *, chunk: int, compute_dtype: torch.dtype | None) -> torch.Tensor:
    """Log-probabilities `[L]` (fp32, CPU) of one sequence's tokens given those before, at temperature 1; entry 0 is 0."""
    weight_VE, tokens = model.lm_head.weight, torch.tensor(token_ids)
    autocast = torch.autocast(weight_VE.device.type, dtype=compute_dtype) if compute_dtype else contextlib.nullcontext()
    with autocast:
        packed = model.model.forward_packed(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)]))
    targets = tokens[1:].to(weight_VE.device)
    values, _ = token_logprobs(packed.hidden_TE[:-1], weight_VE, targets, chunk=chunk, compute_dtype=compute_dtype)
    return torch.cat([torch.zeros(1), values.float().cpu()])
