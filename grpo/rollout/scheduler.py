"""Which prompts start when: page arithmetic and admission of groups, on the host and without tensors.

A sample reserves all the pages it may need (prompt + max_tokens) when it starts, so a running sample can always finish
and nothing is ever preempted: with the check in `Scheduler.__init__` there is no deadlock. The price is pages that a short
completion reserved and did not fill. A group's prompt is prefilled once; its samples share the prompt's full pages. Only
one group at a time may be started in part (its prompt's pages are held meanwhile); all others start whole.

Leaves out the pages themselves (nsa.cache) and the rows of the batch (decode_batch.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo.data_types import Completion, Prompt


@dataclass(slots=True, eq=False)
class GroupProgress:
    """A group on its way: how many of its samples have started, and those that are finished."""

    prompt: Prompt
    group_size: int
    num_started: int = 0
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def num_to_start(self) -> int:
        return self.group_size - self.num_started

    @property
    def finished(self) -> bool:
        return len(self.completions) == self.group_size


@dataclass(frozen=True, slots=True)
class PageCounts:
    """How many pages of `page_size` tokens prompts and samples take."""

    page_size: int
    max_tokens: int

    def prompt(self, prompt_length: int) -> int:
        """Pages of a prefilled prompt."""
        return -(-prompt_length // self.page_size)

    def sample(self, prompt_length: int, *, takes_over: bool) -> int:
        """Pages a starting sample adds. Its group's last sample takes over the prompt's own pages; the others share the
        full ones and copy the last where it is not full."""
        shared = self.prompt(prompt_length) if takes_over else prompt_length // self.page_size
        return -(-(prompt_length + self.max_tokens) // self.page_size) - shared

    def samples(self, prompt_length: int, count: int, *, to_start: int) -> int:
        """Pages the next `count` of a group's `to_start` samples add to its prompt's."""
        if count == 0:
            return 0
        last = self.sample(prompt_length, takes_over=count == to_start)
        return (count - 1) * self.sample(prompt_length, takes_over=False) + last

    def least(self, prompt_length: int, group_size: int) -> int:
        """The fewest pages with which a group can be worked off, one sample after the other."""
        return self.prompt(prompt_length) + self.samples(prompt_length, 1, to_start=group_size)

    def whole(self, prompt_length: int, group_size: int) -> int:
        """Pages of a whole group running at once."""
        return self.prompt(prompt_length) + self.samples(prompt_length, group_size, to_start=group_size)


class Scheduler:
    """The waiting groups of one request, in the prompts' order.

    Args:
        num_pages: pages a request may use altogether.

    Raises:
        ValueError: a prompt that could not finish even with the cache to itself.
    """

    def __init__(self, prompts: Sequence[Prompt], *, group_size: int, counts: PageCounts, max_sequences: int, num_pages: int) -> None:
        for prompt in prompts:
            needed = counts.least(len(prompt.token_ids), group_size)
            if needed > num_pages:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} ({len(prompt.token_ids)} tokens) with max_tokens={counts.max_tokens} needs {needed} cache pages of "
                    f"{counts.page_size} tokens, the cache has {num_pages}; raise max_cache_tokens to {needed * counts.page_size} or lower max_tokens"
                )
        self._counts = counts
        self._max_sequences = max_sequences
        self._waiting = deque(GroupProgress(prompt=prompt, group_size=group_size) for prompt in prompts)
        self._partial: GroupProgress | None = None
        self._num_to_start = group_size * len(prompts)

    @property
    def num_to_start(self) -> int:
        """Samples that have not started."""
        return self._num_to_start

    def admit(self, free_rows: int, free_pages: int) -> list[tuple[GroupProgress, int]]:
        """Take what may start now: (group, number of its samples), the samples counted as started.

        Prefilling one prompt at a time wastes launches, so nothing is admitted before an eighth of the rows (or what is
        left to start) is free."""
        if self._num_to_start == 0 or free_rows < min(self._num_to_start, max(1, self._max_sequences // 8)):
            return []
        admitted: list[tuple[GroupProgress, int]] = []
        if self._partial is not None:
            group = self._partial
            count, pages = self._fit(group, free_rows, free_pages)
            if count == 0:
                return []
            self._start(group, count, admitted)
            free_rows, free_pages = free_rows - count, free_pages - pages
        while self._waiting and self._partial is None and free_rows > 0:
            group = self._waiting[0]
            prompt_pages = self._counts.prompt(len(group.prompt.token_ids))
            count, pages = self._fit(group, free_rows, free_pages - prompt_pages)
            if count == 0:
                break
            self._waiting.popleft()
            self._start(group, count, admitted)
            free_rows, free_pages = free_rows - count, free_pages - prompt_pages - pages
        return admitted

    def _fit(self, group: GroupProgress, free_rows: int, free_pages: int) -> tuple[int, int]:
        """How many of the group's next samples fit, and the pages they add."""
        length, to_start = len(group.prompt.token_ids), group.num_to_start
        count = min(to_start, free_rows)
        while count > 0 and self._counts.samples(length, count, to_start=to_start) > free_pages:
            count -= 1
        return count, self._counts.samples(length, count, to_start=to_start)

    def _start(self, group: GroupProgress, count: int, admitted: list[tuple[GroupProgress, int]]) -> None:
        admitted.append((group, count))
        group.num_started += count
        self._num_to_start -= count
        self._partial = group if group.num_to_start else None
