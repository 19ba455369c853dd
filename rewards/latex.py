"""Tokens → expression tree: a recursive-descent parser for LaTeX and plain maths.

    answer   := item ((`,` | or | and) item)*            a bare list is unordered
    item     := setterm (relation setterm)*              ± makes two items of one
    setterm  := quantity ((∪ | ∩ | \\) quantity)*
    quantity := sum [unit]                               `12 square centimeters`, `5 cm^2`, `3:30 p.m.`, `$5`

The rules from sum downwards are in arithmetic.py. Raises SyntaxFault for whatever does not fit.
"""

from __future__ import annotations

from fractions import Fraction

from rewards import words
from rewards.arithmetic import END, LETTER_UNITS, Arithmetic, based
from rewards.tokens import SyntaxFault
from rewards.tree import (
    EMPTY_SET,
    MAX_OPERANDS,
    MINUS_ONE,
    Add,
    Call,
    Collection,
    Matrix,
    Mul,
    Node,
    Number,
    Quantity,
    Relation,
    SetOperation,
    Symbol,
    Text,
    divide,
    multiply,
    negate,
)

_CLOSING = {"(": ")", "[": "]", "{": "}", "{}": "{}", "⌊": "⌋", "⌈": "⌉"}
_WORD_OPERATORS = {"union": "∪", "cup": "∪", "intersect": "∩"}
_MONEY_WORDS = {"usd": "dollar", "us": "dollar", "eur": "euro", "gbp": "sterling", "rs": "rupee", "inr": "rupee"}


class Parser(Arithmetic):
    """One parse of one token list."""

    def parse(self) -> Node:
        node = self._answer(frozenset())
        if self.index != len(self.tokens):
            raise SyntaxFault(f"unexpected {self._peek().text!r}")
        return node

    def _answer(self, closers: frozenset[str]) -> Node:
        items, joiners = self._items(closers)
        if len(items) == 1:
            return items[0]
        joiner = "and" if "and" in joiners else "or" if "or" in joiners else ","
        return Collection("", tuple(items), joiner)

    def _items(self, closers: frozenset[str], expand: bool = True) -> tuple[list[Node], set[str]]:
        """Items up to a closer; `expand` makes two items of ±, otherwise the enclosing item does (a tuple with ± is two tuples)."""
        items: list[Node] = []
        joiners: set[str] = set()
        while True:
            items += self._item() if expand else [self._relation()]
            if not self._at("sep"):
                return items, joiners
            joiners.add(self._take().text)
            while self._at("sep"):  # ", and"
                joiners.add(self._take().text)
            if self._peek() is END or (self._at("close") and self._peek().text in closers):
                return items, joiners  # a trailing comma

    def _item(self) -> list[Node]:
        """One item; two where ± was read."""
        start, outer = self.index, (self.sign, self.saw_sign)
        self.sign, self.saw_sign = 1, False
        first = self._relation()
        both, end = self.saw_sign, self.index
        result = [first]
        if both:
            self.index, self.sign = start, -1
            result.append(self._relation())
            if self.index != end:
                raise SyntaxFault("± read two ways")
        self.sign, self.saw_sign = outer
        return result

    def _relation(self) -> Node:
        terms, operators = [self._set_term()], []
        while self._at("rel"):
            operators.append(self._take().text)
            terms.append(self._set_term())
        return Relation(tuple(terms), tuple(operators)) if operators else terms[0]

    def _set_term(self) -> Node:
        node, count = _as_set(self._quantity()), 0
        while self._at("set") or (self._at("word") and self._peek().text.lower() in _WORD_OPERATORS):
            token = self._take()
            count += 1
            if count > MAX_OPERANDS:
                raise SyntaxFault("too many sets")
            operator = token.text if token.kind == "set" else _WORD_OPERATORS[token.text.lower()]
            node = SetOperation(operator, node, self._quantity())
        return node

    def _quantity(self) -> Node:
        if self._at("word") and self._peek().text.lower() in words.SIGNS and self._peek(1).kind in ("num", "cmd", "money"):
            return negate(self._quantity()) if words.SIGNS[self._take().text.lower()] < 0 else self._quantity()
        money = self._money()
        if self._at("word"):
            return self._words()
        node = self._sum()
        while self._at("word") and self._peek().text.lower() in words.SCALES:
            node = multiply(node, Number(words.SCALES[self._take().text.lower()]))
        if self._at("word") and self._peek().text.lower() in words.PERCENT:
            self._take()
            return divide(node, Number(Fraction(100)))
        if self._at("word", "base") and self._peek(1).kind == "num":
            self._take()
            return based(node, self._take().text)
        if self._at("money"):
            money = self._take().text
        if (self._at("word") and self._peek().text.lower() not in _WORD_OPERATORS) or self._at_bare_unit(node):
            return Quantity(node, self._unit())
        return Quantity(node, money) if money else node

    def _money(self) -> str:
        """The currency before a number (`$5`, `-$5`, `US$5`, `Rs. 5`); "" where there is none."""
        if self._at("word") and self._peek().text.lower() in _MONEY_WORDS and self._peek(1).kind in ("num", "money"):
            unit = _MONEY_WORDS[self._take().text.lower()]
            if self._at("money"):
                self._take()
            return unit
        if self._at("money"):
            return self._take().text
        if self._at("op", "-") and self._peek(1).kind == "money":
            unit = self._peek(1).text
            del self.tokens[self.index + 1]
            return unit
        return ""

    def _words(self) -> Node:
        """An item that begins with a word: text, or the name of a quantity before a relation."""
        words_read = ""
        while self._peek().kind in ("word", "name", "num"):
            token = self._take()
            words_read += (" " if token.spaced else "") + token.text
        return Text(words_read.strip().lower())

    def _unit(self) -> str:
        parts: list[tuple[str, int]] = []
        known, direction, factor, count = True, 1, 1, 0
        while self._at("word") or self._at("name") or self._at("op", "/", "^", "*"):
            token = self._take()
            word = token.text.lower()
            count += 1
            if count > 8 or (word in words.NOT_A_NOUN and word not in ("squared", "cubed")):
                raise SyntaxFault(f"not a unit: {word}")
            if word in ("per", "/"):
                direction = -1
            elif word == "*":
                continue
            elif word in ("square", "sq", "cubic", "cu"):
                factor = 2 if word.startswith("sq") else 3
            elif word == "^" or word in ("squared", "cubed"):
                power = self._unit_power() if word == "^" else 2 if word == "squared" else 3
                if not parts:
                    raise SyntaxFault("a power without a unit")
                parts[-1] = (parts[-1][0], parts[-1][1] * power)
            elif word in words.UNITS and (token.kind == "word" or token.text in LETTER_UNITS):
                parts.append((words.UNITS[word], direction * factor))
                direction = factor = 1
            else:
                known = False
        return words.canonical_unit(parts) if known else ""

    def _unit_power(self) -> int:
        braces = self._at("open", "{")
        if braces:
            self._take()
        number = self._take()
        if number.text not in ("2", "3") or (braces and self._take().text != "}"):
            raise SyntaxFault("unit power")
        return int(number.text)

    def _bracket(self, opener: str) -> Node:
        self._enter()
        bars, self.in_bars = self.in_bars, 0
        closers = frozenset({")", "]"}) if opener in "([" else frozenset({_CLOSING[opener]})
        if self._at("close") and self._peek().text in closers:
            self._take()
            self.depth -= 1
            self.in_bars = bars
            if opener == "{}" or opener == "{":
                return EMPTY_SET
            raise SyntaxFault("empty brackets")
        items, joiners = self._items(closers, expand=opener == "{}")
        if not (self._at("close") and self._peek().text in closers):
            raise SyntaxFault("unbalanced brackets")
        closer = self._take().text
        self.depth -= 1
        self.in_bars = bars
        if opener == "⌊" or opener == "⌈":
            return Call("floor" if opener == "⌊" else "ceil", tuple(items))
        if opener == "{}":
            return Collection("{}", tuple(items))
        matching = closer == _CLOSING[opener]
        if len(items) == 1 and matching and opener != "[":
            return items[0]
        if not matching and len(items) != 2:
            raise SyntaxFault("mismatched brackets")
        if "or" in joiners and opener != "{":
            raise SyntaxFault("or inside brackets")
        if opener == "[" and len(items) > 1 and all(isinstance(item, Collection) and item.brackets == "[]" for item in items):
            return _rows(items)
        if opener == "[" and len(items) == 1 and (self.depth > 1 or self.index < len(self.tokens)):
            return items[0]
        return Collection("{}" if opener == "{" else opener + closer, tuple(items))

    def _matrix(self, environment: str) -> Node:
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self._at("end"):
                self._take()
                break
            row.append(self._sum())
            if self._at("col"):
                self._take()
            elif self._at("row"):
                self._take()
                rows.append(tuple(row))
                row = []
            elif not self._at("end"):
                raise SyntaxFault("matrix")
        if row:
            rows.append(tuple(row))
        if not rows or any(len(other) != len(rows[0]) for other in rows):
            raise SyntaxFault("ragged matrix")
        if environment.startswith("v"):
            raise SyntaxFault("determinant")
        return Matrix(tuple(rows))


def _rows(items: list[Node]) -> Node:
    """`[[1,2],[3,4]]`: a matrix where the rows are equally long."""
    rows = [item.items for item in items if isinstance(item, Collection)]
    return Matrix(tuple(rows)) if len({len(row) for row in rows}) == 1 else Collection("[]", tuple(items))


def _as_set(node: Node) -> Node:
    """`ℝ − {1}` as a difference of sets, `P(3,4)` as a point with its name."""
    if isinstance(node, Add) and len(node.terms) == 2 and node.terms[0] == Symbol("ℝ") and isinstance(node.terms[1], Mul):
        sign, removed = node.terms[1].factors[0], node.terms[1].factors[-1]
        if sign == MINUS_ONE and isinstance(removed, Collection) and len(node.terms[1].factors) == 2:
            return SetOperation("\\", node.terms[0], removed)
    if isinstance(node, Mul) and len(node.factors) == 2 and isinstance(node.factors[0], Symbol) and isinstance(node.factors[1], Collection):
        name, point = node.factors
        if isinstance(name, Symbol) and len(name.name) == 1 and name.name.isupper() and isinstance(point, Collection) and point.brackets == "()":
            return Relation((name, point), ("=",))
    return node
