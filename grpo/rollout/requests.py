"""What every engine checks of a request before the first token, in the same words.

Leaves out what depends on an engine: its cache, its state, its stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from grpo.data_types import Prompt


def check_prompts(prompts: Sequence[Prompt], *, max_tokens: int, context: int, vocabulary: int) -> None:
    """Refuse prompts that are empty, hold unknown ids, or leave no room for `max_tokens`.

    Raises:
        ValueError: names the prompt.
    """
    for prompt in prompts:
        check_sequence(prompt.token_ids, f"prompt {prompt.prompt_id!r}", context=context, vocabulary=vocabulary)
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.prompt_id!r} has no tokens")
        if len(prompt.token_ids) + max_tokens > context:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.token_ids)} tokens and max_tokens is {max_tokens}: more than the "
                f"model's context of {context}"
            )


def check_sequence(token_ids: Sequence[int], name: str, *, context: int, vocabulary: int) -> None:
    """Raise ValueError for a sequence longer than the context or with ids outside the vocabulary."""
    if len(token_ids) > context:
        raise ValueError(f"{name} has {len(token_ids)} tokens, more than the model's context of {context}")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary):
        raise ValueError(f"{name} has token ids from {min(token_ids)} to {max(token_ids)}, the model's vocabulary is 0 to {vocabulary - 1}")


def eos_token_ids(configs: Iterable[Any], vocabulary: int) -> tuple[int, ...]:
    """Every `eos_token_id` (a number, a list or none) of a model's generation config and config, ascending.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    ids: set[int] = set()
    for config in configs:
        given = config.eos_token_id if config is not None else None
        ids.update([] if given is None else [given] if isinstance(given, int) else given)
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise ValueError(f"eos_token_id {outside[0]} lies outside the model's vocabulary of {vocabulary}")
    return tuple(sorted(ids))
