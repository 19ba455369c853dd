"""One request on its way through the engine: samples start, run, end, and leave as complete groups.

Owns the cache sequences of the request, and gives every one back in `release`, however the request ends. Leaves out what
outlives a request: the model, the cache's size, weights and versions (torch_engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from grpo.data_types import Completion, Group
from grpo.rollout.decode_batch import DecodeBatch, last_logits
from grpo.rollout.engine import Sampling
from grpo.rollout.scheduler import GroupProgress, Scheduler
from grpo.rollout.stops import StopStrings, decode
from grpo.seeding import fold
from nsa.cache import NSACache
from nsa.model import NSAForCausalLM

PACKED_TOKENS = 8192
"""Tokens of one packed prefill or scoring call; a longer sequence goes alone."""


def token_parts(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut items, in order, into parts of at most `budget` tokens; an item above that is a part of its own."""
    parts: list[list[int]] = []
    tokens = budget + 1
    for index, length in enumerate(lengths):
        if tokens + length > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += length
    return parts


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that autograd may save, though it was made in inference mode."""
    with torch.inference_mode(mode=False):
        return tensor.to("cpu", copy=True)


@dataclass(slots=True, eq=False)
class _Sample:
    """One running row: its place in its group, its cache sequence, its output slot, and its tokens at the last look."""

    group: GroupProgress
    index: int
    sequence: int
    slot: int = -1
    count: int = 0


class Generation:
    """The running state of one `generate` call.

    Args:
        batch: configured for `sampling`, without rows. cache: with as many free pages as the scheduler counts on.
        eos_ids: tokens that end a sample. version: stamped on completions.
        steps_per_look: K, the steps between two looks at the batch.
    """

    def __init__(
        self, model: NSAForCausalLM, tokenizer: PreTrainedTokenizerBase, cache: NSACache, batch: DecodeBatch, scheduler: Scheduler,
        stops: StopStrings, sampling: Sampling, *, eos_ids: tuple[int, ...], version: int, steps_per_look: int,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._cache, self._batch, self._scheduler = model, tokenizer, cache, batch, scheduler
        self._stops, self._sampling, self._eos_ids, self._version, self._steps_per_look = stops, sampling, eos_ids, version, steps_per_look
        self._device = model.lm_head.weight.device
        self._rows: list[_Sample] = []
        self._prefilled: dict[GroupProgress, tuple[int, torch.Tensor]] = {}
        """Groups with samples to start: cache sequence of the prompt, fp32 logits `[V]` of its last token."""
        self._prompt_selections: dict[GroupProgress, torch.Tensor] = {}
        self.tokens_made = self.steps_made = 0

    @property
    def num_running(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def finished(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._rows and self._scheduler.num_to_start == 0

    def release(self) -> None:
        """Give back every page this request holds."""
        for sequence in [sample.sequence for sample in self._rows] + [sequence for sequence, _ in self._prefilled.values()]:
            self._cache.release(sequence)
        self._rows, self._prefilled = [], {}
        self._batch.reset()

    @torch.inference_mode()
    def advance(self) -> list[Group]:
        """Start what fits, decode K steps, take out what is finished. Returns the groups that became complete."""
        groups = []
        if self._start_samples():
            groups += self._collect()  # a sample may end with its first token
        if self._rows:
            limit = self._sampling.max_tokens
            steps = min(self._steps_per_look, limit - min(sample.count for sample in self._rows))
            longest = max(len(sample.group.prompt.token_ids) + min(sample.count + steps, limit) for sample in self._rows)
            for _ in range(steps):
                self._batch.step(self._cache.pages_for(longest))
            self.steps_made += steps
            groups += self._collect()
        return groups

    def _start_samples(self) -> bool:
        """Prefill and fork what the scheduler admits, and draw each new row's first token. False: nothing was admitted."""
        sampling = self._sampling
        admitted = self._scheduler.admit(self._batch.max_sequences - self._batch.num_rows, self._cache.num_free_pages)
        if not admitted:
            return False
        self._prefill([group for group, _ in admitted if group not in self._prefilled])
        logits_GV = torch.stack([self._prefilled[group][1] for group, _ in admitted])
        new: list[_Sample] = []
        for group, count in admitted:
            prompt_sequence, _ = self._prefilled[group]
            indices = range(group.num_started - count, group.num_started)
            last = group.num_started == group.group_size  # the last sample takes over the prompt's pages
            children = self._cache.fork(prompt_sequence, count - last)
            if last:
                children.append(prompt_sequence)
                del self._prefilled[group]
            samples = [_Sample(group, index, child) for index, child in zip(indices, children, strict=True)]
            self._rows += samples
            new += samples
        sequences = [sample.sequence for sample in new]
        self._cache.reserve(sequences, sampling.max_tokens)
        repeats = torch.tensor([count for _, count in admitted]).to(self._device)
        slots = self._batch.add(
            [len(sample.group.prompt.token_ids) for sample in new],
            [fold(sampling.seed, sample.group.prompt.prompt_id, sample.index) for sample in new],
            self._cache.block_table(sequences),
            logits_GV.repeat_interleave(repeats, dim=0, output_size=len(new)),
        )
        for sample, slot in zip(new, slots, strict=True):
            sample.slot = slot
        return True

    def _prefill(self, groups: Sequence[GroupProgress]) -> None:
        """Run the prompts of new groups, packed, and keep their pages and the logits of their last tokens."""
        for part in token_parts([len(group.prompt.token_ids) for group in groups], PACKED_TOKENS):
            members = [groups[i] for i in part]
            lengths = torch.tensor([len(group.prompt.token_ids) for group in members])
            sequences = []
            for group in members:
                sequences.append(self._cache.add_sequence())
                self._prefilled[group] = (sequences[-1], torch.empty(0))
            self._cache.reserve(sequences, lengths.tolist())
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            token_ids = torch.tensor([token for group in members for token in group.prompt.token_ids])
            out = self._model.model.forward_cached(
                token_ids, ends, self._cache.block_table(sequences), lengths, self._cache, return_selection=self._sampling.record_selection
            )
            logits = last_logits(self._model, out.hidden_TE[(ends[1:] - 1).to(self._device)])
            for row, group in enumerate(members):
                self._prefilled[group] = (sequences[row], logits[row])
            if out.selection is not None:
                for group, selection in zip(members, out.selection.split(lengths.tolist()), strict=True):
                    self._prompt_selections[group] = own(selection)

    def _collect(self) -> list[Group]:
        """Take out the rows that ended since the last look. Returns the groups that became complete."""
        counts, done, flagged = self._batch.read_flags()
        ends = {row: count for row, count in enumerate(counts) if done[row]}
        stopped: set[int] = set()
        suspects = [row for row in range(len(counts)) if flagged[row]]
        if suspects:
            drawn = self._batch.read_tokens([self._rows[row].slot for row in suspects], max(counts[row] for row in suspects))
            for row, token_ids in zip(suspects, drawn, strict=True):
                end = self._stops.first_end(token_ids[: counts[row]], self._rows[row].count)
                if end is not None:
                    ends[row] = end
                    stopped.add(row)
        for sample, count in zip(self._rows, counts, strict=True):
            sample.count = count
        if not ends:
            return []
        leaving = [self._rows[row] for row in ends]
        groups = self._complete(leaving, list(ends.values()), [row in stopped for row in ends])
        kept = [row for row in range(len(counts)) if row not in ends]
        self._rows = [self._rows[row] for row in kept]
        for sample in leaving:
            self._cache.release(sample.sequence)
        self._batch.keep(kept, [sample.slot for sample in leaving])
        return groups

    def _complete(self, samples: list[_Sample], lengths: list[int], stopped: list[bool]) -> list[Group]:
        """Read finished samples back and make their completions."""
        slots = [sample.slot for sample in samples]
        tokens, logprobs = self._batch.read_outputs(slots, max(lengths))
        groups = []
        for sample, length, stop, row_tokens, row_logprobs in zip(samples, lengths, stopped, tokens, logprobs, strict=True):
            token_ids, group = tuple(row_tokens[:length]), sample.group
            if not all(map(math.isfinite, row_logprobs[:length])):
                raise RuntimeError(
                    f"the policy gave log-probabilities that are not finite for prompt {group.prompt.prompt_id!r}: look at its weights"
                )
            selection = self._batch.read_selection(sample.slot, length)
            group.completions[sample.index] = Completion(
                token_ids=token_ids,
                logprobs=tuple(row_logprobs[:length]),
                text=decode(self._tokenizer, token_ids),
                finish_reason="stop" if stop or token_ids[-1] in self._eos_ids else "length",
                policy_version=self._version,
                selection=None if selection is None else own(selection),
            )
            self.tokens_made += length
            if group.finished:
                completions = tuple(group.completions[index] for index in range(group.group_size))
                groups.append(Group(prompt=group.prompt, completions=completions, prompt_selection=self._prompt_selections.pop(group, None)))
        return groups
