"""Length shaping and repetition. Lengths are tokens (`num_tokens`, which the scorer passes), else words."""

from __future__ import annotations

from typing import Any

_MAX_WORDS = 20_000


def _length(completion: str, num_tokens: int | None) -> int:
    return len(completion.split()) if num_tokens is None else num_tokens


def overlong(completion: str, max_tokens: int, buffer_tokens: int, num_tokens: int | None = None, **_: Any) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0, falling to −1 over the last `buffer_tokens`.

    Raises:
        ValueError: buffer_tokens not in 1..max_tokens.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens must be in 1..max_tokens={max_tokens}, got {buffer_tokens}")
    over = _length(completion, num_tokens) - (max_tokens - buffer_tokens)
    return -min(1.0, max(0.0, over / buffer_tokens))


def short_enough(completion: str, target_tokens: int, max_tokens: int, num_tokens: int | None = None, **_: Any) -> float:
    """1 up to `target_tokens`, falling linearly to 0 at `max_tokens`.

    Raises:
        ValueError: target_tokens not below max_tokens.
    """
    if not 0 <= target_tokens < max_tokens:
        raise ValueError(f"target_tokens must be in 0..max_tokens-1, got {target_tokens} and {max_tokens}")
    over = _length(completion, num_tokens) - target_tokens
    return 1.0 - min(1.0, max(0.0, over / (max_tokens - target_tokens)))


def repetition(completion: str, ngram: int = 4, max_penalty: float = 1.0, **_: Any) -> float:
    """−max_penalty × the share of word n-grams that repeat an earlier one; 0 for texts shorter than one n-gram.

    Raises:
        ValueError: ngram < 1 or max_penalty < 0.
    """
    if ngram < 1 or max_penalty < 0:
        raise ValueError(f"ngram must be at least 1 and max_penalty at least 0, got {ngram} and {max_penalty}")
    words = completion.lower().split()[:_MAX_WORDS]
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(words[start : start + ngram]) for start in range(total)})
    return -max_penalty * (1 - distinct / total) + 0.0
