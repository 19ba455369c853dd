"""Scalar arithmetic of the grammar: sums, products, powers, functions, roots (the lower half of latex.py's parser).

    sum      := [sign] product ((+ | - | ±) product)*
    product  := power ((* | / | : | nothing) power)*
    power    := postfix [^ power]
    postfix  := atom (! | % | ° | ' | _ subscript)*

Nesting is bounded by MAX_DEPTH; nothing is computed but the folding of plain fractions. Raises SyntaxFault for whatever
does not fit. Brackets and matrices hold lists, so latex.py supplies them.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.numerals import cardinal
from rewards.tokens import SyntaxFault, Token
from rewards.tree import (
    EMPTY_SET,
    MAX_DEPTH,
    MAX_SUFFIXES,
    MINUS_ONE,
    Add,
    Based,
    Call,
    Collection,
    Matrix,
    Node,
    Number,
    Power,
    Ratio,
    Symbol,
    divide,
    multiply,
    negate,
)

END = Token("end-of-text", "")
_HALF = Number(Fraction(1, 2))
_STARTS = frozenset({"num", "name", "const", "cmd", "func", "open", "begin"})
_UNKNOWN_FUNCTIONS = frozenset("fg")


LETTER_UNITS = frozenset("mgshlL")
_COMPOUND_UNIT = re.compile(
    r"[mgshlL](?: \^ (?:\{ )?[23](?: \})?(?: / (?:[mgshlL]|[a-z]{2,12})(?: \^ (?:\{ )?[23](?: \})?)?)?|"
    r" / (?:[mgshlL]|[a-z]{2,12})(?: \^ (?:\{ )?[23](?: \})?)?)"
)


def based(digits: Node | str, base: str) -> Node:
    """A numeral with its base; base 10 is the number itself.

    Raises:
        SyntaxFault: no base between 2 and 36, or not a whole number.
    """
    value = cardinal(base)
    number = int(base) if base.isdecimal() and len(base) <= 2 else 0 if value is None or value.denominator > 1 else int(value)
    if isinstance(digits, Number):
        digits = str(digits.value)
    if not 2 <= number <= 36 or not isinstance(digits, str) or not digits.replace(".", "", 1).isdecimal():
        raise SyntaxFault("subscript of a number")
    return Number(Fraction(digits)) if number == 10 else Based(digits.lstrip("0") or "0", number)


class Arithmetic:
    """A cursor over tokens and the rules up to a sum."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0
        self.sign = 1
        """+1 or −1: which branch of ± is being read."""
        self.saw_sign = False
        self.in_bars = 0

    def _bracket(self, opener: str) -> Node:
        raise NotImplementedError

    def _matrix(self, environment: str) -> Node:
        raise NotImplementedError

    def _peek(self, ahead: int = 0) -> Token:
        index = self.index + ahead
        return self.tokens[index] if index < len(self.tokens) else END

    def _at(self, kind: str, *texts: str) -> bool:
        token = self._peek()
        return token.kind == kind and (not texts or token.text in texts)

    def _take(self) -> Token:
        token = self._peek()
        self.index += 1
        return token

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise SyntaxFault("nested too deeply")

    def _sum(self) -> Node:
        self._enter()
        terms = [self._signed_product()]
        while self._at("op", "+", "-", "±", "∓"):
            terms.append(self._signed_product())
        node = terms[0] if len(terms) == 1 else Add(tuple(terms))
        if self._at("infix"):  # `a \\over b`: all of the group before and after it
            over = self._take().text == "over"
            right = self._sum()
            node = divide(node, right) if over else Call("binom", (node, right))
        self.depth -= 1
        return node

    def _signed_product(self) -> Node:
        sign, count = 1, 0
        while self._at("op", "+", "-", "±", "∓"):
            operator = self._take().text
            count += 1
            if count > 3:
                raise SyntaxFault("too many signs")
            if operator in "±∓":
                self.saw_sign = True
                sign *= self.sign if operator == "±" else -self.sign
            elif operator == "-":
                sign = -sign
        node = self._product()
        if sign > 0:
            return node
        return self._times(MINUS_ONE, node) if isinstance(node, Matrix) else negate(node)

    def _product(self) -> Node:
        node = self._power()
        while True:
            if self._at("op", "*", "/"):
                operator = self._take().text
                right = self._signed_power()
                node = self._times(node, right) if operator == "*" else divide(node, right)
            elif self._at_ratio(node):
                node = self._ratio(node)
            elif self._at("name", "x") and self._peek().spaced and self._peek(1).kind == "num" and self._peek(1).spaced and isinstance(node, Number):
                self._take()  # 3.2 x 10^5
                node = multiply(node, self._power())
            elif self._at_bare_unit(node):
                return node
            elif self._peek().kind in _STARTS or (self._at("bar") and not self.in_bars):
                node = self._juxtaposed(node)
            else:
                return node

    def _at_bare_unit(self, node: Node) -> bool:
        """`1,000.99m²`, `5 m/s^2`: a number, then a unit of one letter that has a power or a divisor, and nothing more."""
        if not (isinstance(node, Number) and self._at("name") and self._peek().text in LETTER_UNITS):
            return False
        rest = self.tokens[self.index : self.index + 12]
        return _COMPOUND_UNIT.fullmatch(" ".join(token.text for token in rest)) is not None

    def _at_ratio(self, node: Node) -> bool:
        """`2:3`, or `2 to 3`."""
        return self._at("op", ":") or (isinstance(node, Number) and self._at("word", "to") and self._peek(1).kind == "num")

    def _times(self, left: Node, right: Node) -> Node:
        if isinstance(right, Matrix) and not isinstance(left, Matrix):
            return Matrix(tuple(tuple(multiply(left, entry) for entry in row) for row in right.rows))
        return multiply(left, right)

    def _signed_power(self) -> Node:
        if self._at("op", "-", "+"):
            return negate(self._power()) if self._take().text == "-" else self._power()
        return self._power()

    def _juxtaposed(self, left: Node) -> Node:
        """Two things side by side: a mixed number or a product."""
        token, previous = self._peek(), self.tokens[self.index - 1]
        if previous.kind == "num" and isinstance(left, Number) and left.value.denominator == 1:
            if token.kind == "cmd" and token.text == "frac":
                start = self.index
                part = self._atom()
                if isinstance(part, Number) and 0 < part.value < 1 and not self._at("op", "^"):
                    return self._marked(Number(left.value + part.value))
                self.index = start
                return multiply(left, self._power())
            if token.kind == "num":
                slash, bottom = self._peek(1), self._peek(2)
                if token.spaced and slash.text == "/" and bottom.kind == "num" and token.value and bottom.value and token.value < bottom.value:
                    self.index += 3
                    return self._marked(Number(left.value + token.value / bottom.value))
        numeral = previous.kind in ("num", "name", "const") and previous.text != "π"
        if token.kind == "num" and (numeral or isinstance(left, Number)) and previous.text not in ")}":
            raise SyntaxFault("two numbers side by side")
        return self._times(left, self._power())

    def _ratio(self, first: Node) -> Node:
        terms, written = [first], ""
        while self._at("op", ":") or self._at("word", "to"):
            self._take()
            written = self._peek().text
            terms.append(self._signed_power())
            while self._peek().kind in ("name", "const") and not self._peek().spaced:
                terms[-1] = multiply(terms[-1], self._power())
        if len(terms) > 6:
            raise SyntaxFault("long ratio")
        return Ratio(tuple(terms), written)

    def _power(self) -> Node:
        self._enter()
        node = self._postfix()
        if self._at("op", "^"):
            self._take()
            if self._at("op", "-", "+"):
                sign = self._take().text
                exponent = self._power()
                exponent = negate(exponent) if sign == "-" else exponent
            else:
                exponent = self._script()
                if self._at("op", "^"):
                    raise SyntaxFault("double superscript")
            node = Power(node, exponent)
            if self._at("op", "!", "%", "°"):
                node = self._suffix(node)
        self.depth -= 1
        return node

    def _script(self) -> Node:
        """The argument of ^ : a group, or one token and what binds to it (`x^10` in plain maths is x to the ten)."""
        if self._at("open", "{"):
            return self._group()
        return self._power()

    def _postfix(self) -> Node:
        return self._marked(self._atom())

    def _marked(self, node: Node) -> Node:
        count = 0
        while self._at("op", "!", "%", "°", "'", "_"):
            count += 1
            if count > MAX_SUFFIXES:
                raise SyntaxFault("too many marks after a value")
            node = self._suffix(node)
        return node

    def _suffix(self, node: Node) -> Node:
        mark = self._take().text
        if mark == "!":
            if self._at("op", "!"):
                self._take()
                return Call("double_factorial", (node,))
            return Call("factorial", (node,))
        if mark == "%":
            return divide(node, Number(Fraction(100)))
        if mark == "°":
            return multiply(node, Symbol("°"))
        if mark == "'":
            return Call("prime", (node,))
        written = self.tokens[self.index - 2].text
        subscript = self._subscript()
        if isinstance(node, Number):
            return based(node if written == ")" else written, subscript.removeprefix("base").strip("()"))
        if isinstance(node, Symbol):
            return Symbol(f"{node.name}_{subscript}")
        raise SyntaxFault("subscript")

    def _subscript(self) -> str:
        if not self._at("open", "{"):
            token = self._take()
            if token.kind not in ("num", "name"):
                raise SyntaxFault("subscript")
            return token.text
        self._take()
        parts = []
        while not self._at("close", "}"):
            token = self._take()
            if token is END or len(parts) > 8:
                raise SyntaxFault("subscript")
            parts.append(token.text)
        self._take()
        return "".join(parts)

    def _atom(self) -> Node:
        self._enter()
        node = self._atom_of(self._take())
        self.depth -= 1
        return node

    def _atom_of(self, token: Token) -> Node:
        if token.kind == "num" and token.value is not None:
            return Number(token.value)
        if token.kind == "name":
            name = token.text
            if name in _UNKNOWN_FUNCTIONS and [self._peek(ahead).text for ahead in range(6)] == ["^", "{", "-", "1", "}", "("]:
                name, self.index = f"{name}^-1", self.index + 5
            if name[0] in _UNKNOWN_FUNCTIONS and self._at("open", "("):
                group = self._bracket(self._take().text)
                return Call(name, group.items if isinstance(group, Collection) else (group,))
            return Symbol(token.text)
        if token.kind == "const":
            return EMPTY_SET if token.text == "∅" else Symbol(token.text)
        if token.kind == "cmd":
            return self._command(token.text)
        if token.kind == "func":
            return self._function(token.text)
        if token.kind == "open":
            return self._bracket(token.text)
        if token.kind == "bar":
            return self._absolute()
        if token.kind == "begin":
            return self._matrix(token.text)
        raise SyntaxFault(f"unexpected {token.text!r}")

    def _group(self) -> Node:
        """{ sum }"""
        self._take()
        node = self._sum()
        if not self._at("close", "}"):
            raise SyntaxFault("unclosed group")
        self._take()
        return node

    def _argument(self) -> Node:
        """A LaTeX argument: a group, or one digit or letter (`\\frac12`)."""
        if self._at("open", "{"):
            return self._group()
        if self._at("open", "("):
            return self._atom()
        token = self._peek()
        if token.kind == "num" and len(token.text) > 1 and token.value is not None and token.text.isdigit():
            rest = token.text[1:]
            self.tokens[self.index : self.index + 1] = [
                Token("num", token.text[0], Fraction(int(token.text[0])), token.spaced),
                Token("num", rest, Fraction(int(rest))),
            ]
        return self._atom()

    def _command(self, name: str) -> Node:
        if name == "frac":
            top = self._argument()
            return divide(top, self._argument())
        if name == "binom":
            top = self._argument()
            return Call("binom", (top, self._argument()))
        if name == "cbrt":
            return Power(self._root_body(), Number(Fraction(1, 3)))
        index: Node | None = None
        if self._at("open", "["):
            self._take()
            index = self._sum()
            if not self._at("close", "]"):
                raise SyntaxFault("root index")
            self._take()
        body = self._root_body()
        return Power(
            body, _HALF if index is None else Power(index, MINUS_ONE) if not isinstance(index, Number) else divide(Number(Fraction(1)), index)
        )

    def _root_body(self) -> Node:
        if self._at("open", "{"):
            return self._group()
        if self._at("open", "("):
            self._take()
            return self._bracket("(")
        return self._atom()

    def _function(self, name: str) -> Node:
        if name == "conj":
            return Call(name, (self._argument(),))
        base: Node | None = None
        exponent: Node | None = None
        while self._at("op", "^", "_"):
            if self._take().text == "^":
                exponent = negate(self._power()) if self._at("op", "-") and self._take() else self._script()
            else:
                base = self._group() if self._at("open", "{") else self._atom()
        if self._at("open", "(", "{", "["):
            group = self._bracket(self._take().text)
            arguments = group.items if isinstance(group, Collection) else (group,)
        else:
            arguments = (self._bare_argument(),)
        if not arguments:
            raise SyntaxFault("a function of nothing")
        if name == "lg":
            name, base = "log", Number(Fraction(10))
        if name == "log" and base is not None:
            arguments = (*arguments, base)
        elif base is not None:
            raise SyntaxFault("subscript of a function")
        if exponent == MINUS_ONE and name in ("sin", "cos", "tan"):
            return Call("arc" + name, arguments)
        node = Call(name, arguments)
        return node if exponent is None else Power(node, exponent)

    def _bare_argument(self) -> Node:
        """`\\sin 2x` takes 2x; it stops at a sign, an operator or the next function."""
        sign = self._take().text if self._at("op", "-") else ""
        node = self._function_factor()
        while self._peek().kind in ("num", "name", "const", "cmd") and self._peek().kind != "func":
            node = multiply(node, self._power())
        if self._at("op", "/") and self._peek(1).kind == "num" and isinstance(node, Symbol | Number):
            self._take()
            node = divide(node, self._power())
        return negate(node) if sign else node

    def _function_factor(self) -> Node:
        if self._at("func"):
            self._enter()
            node = self._function(self._take().text)
            self.depth -= 1
            return node
        return self._power()

    def _absolute(self) -> Node:
        self._enter()
        self.in_bars += 1
        node = self._sum()
        self.in_bars -= 1
        if not self._at("bar"):
            raise SyntaxFault("unclosed |")
        self._take()
        self.depth -= 1
        return Call("abs", (node,))
