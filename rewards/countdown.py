"""The countdown task: an expression of the given numbers that reaches the target, checked without evaluating text as code.

    numbers [5, 18, 32, 2], target 56:   5*18 - 2 - 32      any right expression counts, `= 56` may follow it

Its own grammar: whole numbers, + - * / (also ×, ÷, \\times, \\cdot, \\div, \\frac{…}{…}) and round brackets. Fractions are
exact. No powers, no decimals, no joined digits. Length, nesting and the count of numbers are bounded before any arithmetic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rewards import extract
from rewards.base import Score

MAX_TEXT = 500
MAX_NUMBERS = 64
MAX_DEPTH = 30
_MAX_DIGITS = 12
_LATEX = [(r"\\left|\\right|\\[,;! ]|\$", " "), (r"\\times|\\cdot|\\ast|×|⋅|·|∗", "*"), (r"\\div|÷|∕|⁄", "/"), ("−|–", "-"), (r"\\[dt]?frac", "F")]
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()\[\]{}F])")


class _Fault(ValueError):
    """Not an expression of the task."""


@dataclass(slots=True)
class _Reader:
    """Recursive descent over tokens; `used` collects the numbers."""

    tokens: list[str]
    used: list[int]
    index: int = 0
    depth: int = 0

    def peek(self) -> str:
        return self.tokens[self.index] if self.index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.index += 1
        return token

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Fault("nested too deeply")
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while self.peek() in ("*", "/"):
            value = value * self.factor() if self.take() == "*" else _divide(value, self.factor())
        return value

    def factor(self) -> Fraction:
        symbol = self.take()
        if symbol == "-":
            return -self.factor() if self.peek() != "-" else self._fail("two signs")
        if symbol == "F":
            return _divide(self.braced(), self.braced())
        if symbol in ("(", "[", "{"):
            self.index -= 1
            return self.braced()
        if not symbol.isdecimal():
            self._fail(f"unexpected {symbol!r}")
        if len(symbol) > _MAX_DIGITS or len(self.used) >= MAX_NUMBERS:
            self._fail("too large")
        self.used.append(int(symbol))
        return Fraction(int(symbol))

    def braced(self) -> Fraction:
        opener = self.take()
        value = self.sum() if opener in ("(", "[", "{") else self._fail("a bracket is missing")
        if self.take() != {"(": ")", "[": "]", "{": "}"}[opener]:
            self._fail("a bracket is not closed")
        return value

    def _fail(self, why: str) -> Fraction:
        raise _Fault(why)


def _divide(left: Fraction, right: Fraction) -> Fraction:
    if right == 0:
        raise _Fault("division by zero")
    return left / right


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """(value, numbers used in order) of an expression, None where `text` is none."""
    if len(text) > MAX_TEXT:
        return None
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    tokens, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(1))
        position = match.end()
    reader = _Reader(tokens, [])
    try:
        value = reader.sum()
    except _Fault:
        return None
    return (value, reader.used) if reader.index == len(tokens) else None


def solves(text: str, numbers: Sequence[int], target: int, *, all_numbers: bool = True) -> bool:
    """Whether the expression reaches `target` with the given numbers, each as often as it is given (`all_numbers`) or less."""
    expression, equals, result = text.partition("=")
    if equals and (stated := evaluate(result)) is not None and stated[0] != target:
        return False
    if equals and evaluate(result) is None:
        return False
    found = evaluate(expression)
    if found is None or found[0] != target:
        return False
    used, given = Counter(found[1]), Counter(numbers)
    return used == given if all_numbers else used <= given


def countdown(
    completion: str,
    numbers: Sequence[int] | None = None,
    nums: Sequence[int] | None = None,
    target: int | None = None,
    prefilled: bool = False,
    all_numbers: bool = True,
    **_: Any,
) -> Score:
    """1 where the answer solves the row's problem, else 0; None where the row has no `numbers` (or `nums`) and `target`.

    `all_numbers: false` lets an expression leave numbers out; none may ever be used more often than it is given.
    """
    given = numbers if numbers is not None else nums
    try:
        given = [int(number) for number in given] if given is not None else None
        goal = None if target is None else int(target)
    except (TypeError, ValueError):
        given = goal = None
    span = extract.answer_span("<think>" + completion if prefilled else completion)
    if given is None or goal is None:
        return Score(value=None, answer=span)
    return Score(value=float(span is not None and solves(span, given, goal, all_numbers=all_numbers)), answer=span)
