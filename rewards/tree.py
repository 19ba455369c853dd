"""The whitelisted expression tree that answers are parsed into, and the limits that hold before any arithmetic.

Nothing outside these node types can be built from model text; no node holds code. Left out: simplification (exact.py
evaluates, math_equal.py compares).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MAX_TEXT = 10_000
"""Characters of an answer span; anything longer is no answer."""
MAX_TOKENS = 1_000
MAX_DEPTH = 60
MAX_SUFFIXES = 8
"""Marks after one value: `!`, `%`, `°`."""
MAX_OPERANDS = 64
"""Operands of one union."""
MAX_DIGITS = 2_000
MAX_BITS = 64_000
"""Size of any exact number; a power or factorial that would be larger is not computed."""
MAX_SPAN = 400
"""Decimal orders of magnitude a numeric comparison may bridge."""


class TooLarge(ArithmeticError):
    """A number beyond the limits."""


class Undefined(ArithmeticError):
    """Division by zero, log of zero, a value that is no finite number."""


class Node:
    """Base of all nodes, for type checks only."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Number(Node):
    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol(Node):
    """A variable, or one of the constants π e i ∞ ° ℝ ℤ ℚ ℕ ℂ."""

    name: str


@dataclass(frozen=True, slots=True)
class Add(Node):
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mul(Node):
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power(Node):
    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call(Node):
    """A function of the whitelist in exact.py, or an unknown one (`f(2)`), which only equals itself."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Collection(Node):
    """Items in brackets: `()`, `[]`, `[)`, `(]`, `{}`, or `""` for a bare list. `joiner` is `,`, `or` or `and`."""

    brackets: str
    items: tuple[Node, ...]
    joiner: str = ","


@dataclass(frozen=True, slots=True)
class SetOperation(Node):
    """`∪`, `∩` or `\\` of two sets."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Relation(Node):
    """A chain a op b op c …; operators are = ≠ < ≤ > ≥ ∈ ≡."""

    terms: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix(Node):
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio(Node):
    """a:b(:c), a ratio or a time of day. `minutes` is the last part as written, so that 3:3 is not 3:03."""

    terms: tuple[Node, ...]
    written: str


@dataclass(frozen=True, slots=True)
class Based(Node):
    """A numeral with its base: 1011_2."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Quantity(Node):
    """A value with a unit. `unit` is canonical (`cm^2`), or "" for a noun that is no known unit."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Text(Node):
    """Words: lower case, single spaces, no punctuation around them."""

    words: str


Expression = Node

ZERO = Number(Fraction(0))
ONE = Number(Fraction(1))
MINUS_ONE = Number(Fraction(-1))
EMPTY_SET = Collection("{}", ())


def negate(node: Node) -> Node:
    """−node, folded for plain numbers."""
    if isinstance(node, Number):
        return Number(-node.value)
    return Mul((MINUS_ONE, node))


def multiply(left: Node, right: Node) -> Node:
    """left · right, flat: a product of many factors must not become a deep tree."""
    return Mul((*left.factors, right)) if isinstance(left, Mul) else Mul((left, right))


def divide(left: Node, right: Node) -> Node:
    """left / right, folded for plain numbers."""
    if isinstance(left, Number) and isinstance(right, Number) and right.value:
        return Number(left.value / right.value)
    return multiply(left, Power(right, MINUS_ONE))
