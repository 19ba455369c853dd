"""Votes of equal value in one class: what maj@k counts.

The rule. Answers that `equivalent` calls equal share a class. Units count where they are written: 5 cm and 5 kg are two
classes. A bare number (without a unit, or with a noun that is none: 5, 5 apples) joins the largest class of its value, the
earlier of two equally large ones. 50% is 1/2, not 50. No answer, no vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rewards import extract
from rewards.exact import is_scalar, near, rough_value
from rewards.math_equal import is_label, spans_equal
from rewards.reading import parse_span
from rewards.tree import MAX_TEXT, Node, Quantity, Relation


class _Class:
    """Texts that equal the first of them."""

    def __init__(self, first: str, rough: complex | None) -> None:
        self.first = first
        self.rough = rough
        self.texts = [first]

    def holds(self, text: str, rough: complex | None) -> bool:
        return near(self.rough, rough) and spans_equal(self.first, text)


def cluster(answers: Sequence[str | None]) -> list[int]:
    """Class numbers by the rule above, in order of first appearance; −1 for None and blank.

    Each different text is compared with one text per class; numbers are told apart by a rounded value first.
    """
    spans = [None if answer is None else extract.answer_span(answer) for answer in answers]
    spans = [None if span is None or len(span) > MAX_TEXT else span for span in spans]
    votes = Counter(span for span in spans if span is not None)
    with_unit: list[_Class] = []
    bare: list[_Class] = []
    for text in votes:  # in order of first appearance
        value = _value(parse_span(text))
        classes = with_unit if isinstance(value, Quantity) and value.unit else bare
        rough = _rough(value)
        found = next((group for group in classes if group.holds(text, rough)), None)
        if found is None:
            classes.append(_Class(text, rough))
        else:
            found.texts.append(text)
    class_of = {text: group for group in (*with_unit, *bare) for text in group.texts}
    for group in bare:
        same = [other for other in with_unit if other.holds(group.first, group.rough)]
        if same:
            largest = max(same, key=lambda other: sum(votes[text] for text in other.texts))
            class_of.update(dict.fromkeys(group.texts, largest))
    numbers: dict[int, int] = {}
    return [-1 if span is None else numbers.setdefault(id(class_of[span]), len(numbers)) for span in spans]


def _value(node: Node | None) -> Node | None:
    """`x = 5 cm` → 5 cm."""
    while isinstance(node, Relation) and node.operators == ("=",) and is_label(node.terms[0]):
        node = node.terms[1]
    return node


def _rough(node: Node | None) -> complex | None:
    while isinstance(node, Quantity):
        node = node.value
    return rough_value(node) if node is not None and is_scalar(node) else None
