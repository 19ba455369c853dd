"""The think/answer format of R1-Zero: the strict rule, and partial credit by tag.

Whether the prompt already opened <think> is an explicit setting, never guessed from the completion.
"""

from __future__ import annotations

import re
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LAYOUT = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)


def is_well_formed(completion: str, *, prefilled: bool = False) -> bool:
    """Each of the four tags exactly once, in order, nothing around the two blocks, both with something in them.

    `prefilled` says that the prompt ended in `<think>`, which then is not part of the completion.
    """
    text = "<think>" + completion if prefilled else completion
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    match = _LAYOUT.fullmatch(text)
    return match is not None and bool(match.group(1).strip()) and bool(match.group(2).strip())


def format_reward(completion: str, prefilled: bool = False, **_: Any) -> float:
    """1 for a well-formed completion, else 0."""
    return float(is_well_formed(completion, prefilled=prefilled))


def tag_count(completion: str, prefilled: bool = False, **_: Any) -> float:
    """A quarter for each of the four tags that occurs exactly once (with a pre-filled <think>, a third for each of three)."""
    tags = TAGS[1:] if prefilled else TAGS
    return sum(completion.count(tag) == 1 for tag in tags) / len(tags)
