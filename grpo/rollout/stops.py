"""Stop strings on token ids: the first token whose text completes one, found without decoding every token.

A token can complete a stop string only if its own text holds the string's last character, so the device flags those
tokens by table look-up (`candidate_ids`) and the host decodes a short tail for flagged rows alone. The tail reaches back
over as many tokens with text as the longest stop string has characters, and a few more, so it holds the whole string.

Leaves out stops inside special tokens: they are not part of a completion's text; a model's EOS list is the place for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

_SLACK_TOKENS = 4  # a decoder may treat the first tokens of what it is given differently (a leading space)
_REPLACEMENT = "\ufffd"  # stands in decoded text where a token holds part of a character's bytes


class TokenPieces:
    """The text of every single token id, decoded once per tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        known = min(len(tokenizer), vocab_size)
        self.texts: list[str] = [decode(tokenizer, [token_id]) for token_id in range(known)] + [""] * (vocab_size - known)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """A completion's text: special tokens left out."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


class StopStrings:
    """The stop strings of one request; `pieces` may be None where there are none.

    Raises:
        ValueError: an empty stop string, or one that is a special token of the tokenizer.
    """

    def __init__(self, stops: Sequence[str], pieces: TokenPieces | None) -> None:
        self._stops, self._pieces = tuple(stops), pieces
        self._candidates: list[bool] = []
        if not stops:
            return
        assert pieces is not None
        special = set(pieces.tokenizer.all_special_tokens)
        for stop in stops:
            if not stop:
                raise ValueError("a stop string is empty; leave it out")
            if stop in special:
                raise ValueError(f"stop string {stop!r} is a special token, which text leaves out; put its id into the model's eos_token_id")
        self._reach = max(len(stop) for stop in stops) + _SLACK_TOKENS
        last = {stop[-1] for stop in stops}
        # A byte-level token holds an ASCII character whole; of any other character it may hold the last byte alone. Spaces
        # are dropped or added by some decoders depending on the neighbours.
        anywhere = any(not char.isascii() or char.isspace() for char in last)
        self._candidates = [anywhere or any(char in text for char in last) for text in pieces.texts]

    def candidate_ids(self, vocab_size: int) -> torch.Tensor:
        """bool `[V]`: tokens after which a completion has to be looked at."""
        return torch.tensor(self._candidates or [False] * vocab_size, dtype=torch.bool)

    def first_end(self, token_ids: Sequence[int], start: int) -> int | None:
        """The smallest length > `start` at which the text of `token_ids[:length]` holds a stop string; None if there is
        none. Everything up to `start` has been looked at before."""
        if not self._stops:
            return None
        for index in range(start, len(token_ids)):
            if self._candidates[token_ids[index]] and self._ends_at(token_ids, index):
                return index + 1
        return None

    def _ends_at(self, token_ids: Sequence[int], index: int) -> bool:
        assert self._pieces is not None
        begin, with_text = index, 0
        while begin > 0 and with_text < self._reach:
            begin -= 1
            text = self._pieces.texts[token_ids[begin]]
            with_text += bool(text) and _REPLACEMENT not in text
        tail = decode(self._pieces.tokenizer, token_ids[begin : index + 1])
        return any(stop in tail for stop in self._stops)
