"""The checker of the package `math-verify` (optional extra) behind our answer span, for users who must match its verdicts.

Both sides are boxed before it reads them, unless the span carries LaTeX delimiters of its own; relations and sets may be
compared. Its own timeouts are off: they need the main thread and do not stop a large power. The pool's deadline and memory
limit hold instead, so it belongs into a worker only. Slower than our checker by two orders of magnitude.
"""

from __future__ import annotations

import importlib
import logging
import re
from functools import lru_cache
from typing import Any

from rewards import extract
from rewards.base import Score

_MAX_SPAN = 2_000
_DELIMITED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")


@lru_cache(maxsize=1)
def _peer() -> Any:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its timeouts are off
    return importlib.import_module("math_verify")


@lru_cache(maxsize=4096)
def _read(span: str) -> Any:
    boxed = span if _DELIMITED.search(span) else f"\\boxed{{{span}}}"
    return _peer().parse(boxed, parsing_timeout=None)


def verdict(gold: str, prediction: str) -> bool:
    """What math-verify says of two answers, each bare or a completion. May hang or fill the memory: call it in a worker."""
    spans = [extract.answer_span(text) for text in (gold, prediction)]
    if any(span is None or len(span) > _MAX_SPAN for span in spans):
        return False
    left, right = (_read(str(span)) for span in spans)
    return bool(_peer().verify(left, right, timeout_seconds=None, allow_set_relation_comp=True))


def math_verify(completion: str, answer: str, prefilled: bool = False, correct: float = 1.0, wrong: float = 0.0, **_: Any) -> Score:
    """`correct` where math-verify accepts the completion's answer, else `wrong`; None where it cannot read the gold answer."""
    if prefilled:
        completion = "<think>" + completion
    span = extract.answer_span(completion)
    gold = extract.answer_span(answer)
    if gold is None or len(gold) > _MAX_SPAN or not _read(gold):
        return Score(value=None, answer=span)
    return Score(value=correct if span is not None and verdict(answer, completion) else wrong, answer=span)
