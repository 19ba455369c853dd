"""The sampler's protocol: what every engine (built in, vLLM) offers, and the record of sampling settings.

Leaves out how an engine works. An engine stamps its weight version on every completion and is the only place that
knows about caches and continuous batching.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from grpo.data_types import Group, Prompt

if TYPE_CHECKING:  # the reward actor imports this and does without torch
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. `temperature=0` is greedy. Randomness is a function of (seed, prompt_id, sample index,
    position) alone, so the same request gives the same tokens whatever else is in the batch (up to rounding)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """A completion ends right after the first of these strings appears in its text; the string stays in the text."""
    seed: int = 0
    group_size: int = 1
    record_selection: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 = off), got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be >= 1, got {self.group_size}")


class Engine(Protocol):
    """A sampler of one policy."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """Yield one Group per prompt, each as soon as all its samples are finished (so not in the prompts' order)."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Per sequence the log-probabilities `[L]` (fp32, CPU) of its tokens given those before; entry 0 is 0."""
        ...

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the policy's weights (all of them, HF parameter names) and stamp `version` on what follows."""
        ...

    def sleep(self) -> None:
        """Free the cache's memory until `wake`; vLLM on a shared GPU frees the weights' too."""
        ...

    def wake(self) -> None:
        """Allow requests again. Where weights were freed, `load_weights` has to come first."""
        ...

    def health(self) -> dict[str, float]:
        """Small facts about the engine (version, cache pages, tokens made); raises if it can no longer work."""
        ...

    def close(self) -> None: ...
