"""Values of scalar trees: exact rationals first, high-precision numbers where there are roots, π or functions.

Two expressions in free variables are compared at fixed rational points (a polynomial identity test); a wrong identity
passes only if it holds at all of them. Every power, factorial and exponential is bounded before it is computed.
mpmath is sympy's arithmetic; each thread has its own context, because a context's precision is shared state.
"""

from __future__ import annotations

import math
import threading
import zlib
from fractions import Fraction
from typing import Any

from rewards.tree import MAX_BITS, MAX_SPAN, Add, Call, Mul, Node, Number, Power, Symbol, TooLarge, Undefined
from rewards.words import word_set

_POINTS = 5
_local = threading.local()
_CONSTANTS = frozenset({"π", "e", "i", "∞", "°", "ℝ", "ℤ", "ℚ", "ℕ", "ℂ"})
MAX_FACTORIAL = 6_000
_MAX_GAMMA = 40
"""Arguments of factorials and binomials that are no whole numbers: beyond, their values need thousands of digits, and seconds."""


def symbols(node: Node) -> frozenset[str]:
    """Names of the free variables."""
    if isinstance(node, Symbol):
        return frozenset() if node.name in _CONSTANTS else frozenset({node.name})
    return frozenset().union(*(symbols(child) for child in children(node)))


def children(node: Node) -> tuple[Node, ...]:
    """Scalar children of a scalar node."""
    if isinstance(node, Add):
        return node.terms
    if isinstance(node, Mul):
        return node.factors
    if isinstance(node, Power):
        return (node.base, node.exponent)
    if isinstance(node, Call):
        return node.arguments
    return ()


def is_scalar(node: Node) -> bool:
    """Whether the tree holds nothing but scalar nodes."""
    return isinstance(node, Number | Symbol) or (isinstance(node, Add | Mul | Power | Call) and all(is_scalar(child) for child in children(node)))


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge("number too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _integer_root(value: int, degree: int) -> int | None:
    """The exact root, or None."""
    if value < 0:
        root = _integer_root(-value, degree) if degree % 2 else None
        return None if root is None else -root
    if degree == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if value.bit_length() > 4096:
        return None
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if middle**degree <= value:
            low = middle
        else:
            high = middle - 1
    return low if low**degree == value else None


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        if exponent.denominator > 64 or (base < 0 and exponent.denominator % 2 == 0):
            return None
        top = _integer_root(base.numerator, exponent.denominator)
        bottom = _integer_root(base.denominator, exponent.denominator)
        if top is None or bottom is None:
            return None
        base, exponent = Fraction(top, bottom), Fraction(exponent.numerator)
    if base == 0 and exponent <= 0:
        raise Undefined("0 to a power that is not positive")
    if base in (0, 1):
        return base
    if abs(exponent) * _bits(base) > MAX_BITS:
        if base == -1:
            return Fraction(1 if exponent % 2 == 0 else -1)
        raise TooLarge("power too large")
    return base ** int(exponent)


def exact(node: Node, values: dict[str, Fraction] | None = None) -> Fraction | None:
    """The exact rational value, None where the value is not (known to be) rational.

    Raises:
        Undefined: division by zero. TooLarge: a number beyond MAX_BITS.
    """
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        if node.name == "°":
            return Fraction(1)
        return values.get(node.name) if values else None
    if isinstance(node, Power):
        base, exponent = exact(node.base, values), exact(node.exponent, values)
        return None if base is None or exponent is None else _rational_power(base, exponent)
    if isinstance(node, Call):
        return _exact_call(node, values)
    total = Fraction(0) if isinstance(node, Add) else Fraction(1)
    for child in children(node):
        value = exact(child, values)
        if value is None:
            return None
        total = _checked(total + value if isinstance(node, Add) else total * value)
    return total


def _exact_call(node: Call, values: dict[str, Fraction] | None) -> Fraction | None:
    if node.name not in ("abs", "factorial", "double_factorial", "binom", "floor", "ceil", "max", "min", "gcd", "lcm"):
        return None
    arguments = [exact(argument, values) for argument in node.arguments]
    known = [value for value in arguments if value is not None]
    if len(known) < len(arguments) or not known:
        return None
    first = known[0]
    if node.name == "abs":
        return abs(first)
    if node.name in ("floor", "ceil"):
        return Fraction(math.floor(first) if node.name == "floor" else math.ceil(first))
    if node.name in ("max", "min"):
        return max(known) if node.name == "max" else min(known)
    if any(value.denominator != 1 for value in known):
        return None
    integers = [int(value) for value in known]
    if node.name == "factorial":
        if not 0 <= integers[0] <= MAX_FACTORIAL:
            raise TooLarge("factorial")
        return Fraction(math.factorial(integers[0]))
    if node.name == "double_factorial":
        if not 0 <= integers[0] <= 2 * MAX_FACTORIAL:
            raise TooLarge("factorial")
        return Fraction(math.prod(range(integers[0], 0, -2)))
    if node.name == "binom":
        if len(integers) != 2 or not 0 <= integers[0] <= MAX_FACTORIAL or integers[1] < 0:
            raise TooLarge("binomial")
        return Fraction(math.comb(*integers))
    return Fraction(math.gcd(*integers) if node.name == "gcd" else math.lcm(*integers))


def _context() -> Any:
    context = getattr(_local, "context", None)
    if context is None:
        import mpmath  # deferred: most answers are rational

        context = _local.context = mpmath.MPContext()
    return context


class Numeric:
    """Evaluates a tree at one point with `digits` decimal digits.

    `span` is the largest |log10| of any value met, `branch` whether a root or logarithm of something not positive was
    taken (then identities that hold for positive reals may fail)."""

    def __init__(self, values: dict[str, Fraction], digits: int) -> None:
        self.context = _context()
        self.context.dps = digits
        self.values = values
        self.span = 0.0
        self.scale = self.context.mpf(0)
        self.branch = False

    def value(self, node: Node) -> Any:
        try:
            result = self._value(node)
        except (Undefined, TooLarge):
            raise
        except (ArithmeticError, ValueError) as error:  # mpmath's way to say that there is a pole, or no convergence
            raise Undefined(type(error).__name__) from error
        if not self.context.isfinite(result):
            raise Undefined("not finite")
        if result:
            magnitude = abs(float(self.context.mag(result))) * 0.30103
            if magnitude > MAX_SPAN:
                raise TooLarge("beyond the numeric range")
            self.span = max(self.span, magnitude)
        return result

    def _value(self, node: Node) -> Any:
        mp = self.context
        if isinstance(node, Number):
            return mp.mpf(node.value.numerator) / node.value.denominator
        if isinstance(node, Symbol):
            return self._symbol(node.name)
        if isinstance(node, Add):
            terms = [self.value(term) for term in node.terms]
            self.scale = max([self.scale, *(abs(term) for term in terms)])
            return mp.fsum(terms)
        if isinstance(node, Mul):
            product = mp.mpf(1)
            for factor in node.factors:
                product *= self.value(factor)
            return product
        if isinstance(node, Power):
            return self._power(self.value(node.base), node.exponent)
        if isinstance(node, Call):
            return self._call(node)
        raise Undefined("no scalar")

    def _symbol(self, name: str) -> Any:
        mp = self.context
        if name == "π":
            return +mp.pi
        if name == "e":
            return +mp.e
        if name == "i":
            return mp.mpc(0, 1)
        if name == "°":
            return mp.mpf(1)
        if name in self.values:
            value = self.values[name]
            return mp.mpf(value.numerator) / value.denominator
        raise Undefined(f"no value for {name}")

    def _power(self, base: Any, power: Node) -> Any:
        mp = self.context
        if isinstance(power, Number) and power.value.denominator % 2 and power.value.denominator > 1 and mp.im(base) == 0 and base.real < 0:
            root = self._power(-base, power)  # ∛(−8) is −2, as in school
            return -root if power.value.numerator % 2 else root
        exponent = self.value(power)
        if base == 0:
            if mp.re(exponent) <= 0:
                raise Undefined("0 to a power that is not positive")
            return mp.mpf(0)
        integer = mp.isint(exponent)
        if not integer and (mp.im(base) != 0 or base.real < 0):
            self.branch = True
        size = abs(float(mp.re(exponent))) * abs(float(mp.log(abs(base), 10))) + 2 * abs(float(mp.im(exponent)))
        if size > MAX_SPAN:
            raise TooLarge("power")
        return mp.power(base, int(mp.re(exponent)) if integer and mp.im(exponent) == 0 else exponent)

    def _call(self, node: Call) -> Any:
        mp = self.context
        name = node.name
        in_degrees = name in _TRIGONOMETRIC and any(_has_degree(argument) for argument in node.arguments)
        arguments = [self.value(argument) for argument in node.arguments]
        first = arguments[0]
        if in_degrees:
            first = first * mp.pi / 180
        if name in _SAFE_CALLS and len(arguments) == 1:
            if abs(first) > 10**6 and name != "abs":
                raise TooLarge(name)
            return getattr(mp, _SAFE_CALLS[name])(first)
        if name in ("ln", "log") and len(arguments) <= 2:
            if any(mp.im(value) != 0 or mp.re(value) <= 0 for value in arguments):
                self.branch = True
            if any(value == 0 for value in arguments):
                raise Undefined("log of zero")
            if len(arguments) == 2:
                if arguments[1] == 1:
                    raise Undefined("log to base 1")
                return mp.log(first) / mp.log(arguments[1])
            return mp.log(first) if name == "ln" or symbols(node) else mp.log10(first)
        if name == "factorial":
            if abs(first) > _MAX_GAMMA:
                raise TooLarge("factorial")
            return mp.gamma(first + 1)
        if name == "binom" and len(arguments) == 2:
            if max(abs(value) for value in arguments) > _MAX_GAMMA:
                raise TooLarge("binomial")
            return mp.binomial(*arguments)
        if name == "conj" and not symbols(node):
            return mp.conj(first)
        if name in ("max", "min") and all(mp.im(value) == 0 for value in arguments):
            return max(arguments, key=mp.re) if name == "max" else min(arguments, key=mp.re)
        # an unknown function: a value of its own for each argument
        key = name + "|" + "|".join(mp.nstr(value, 15) for value in arguments)
        return mp.mpf(_hashed(key)) / 1_000_003 + 1


_TRIGONOMETRIC = word_set("sin cos tan cot sec csc")
_SAFE_CALLS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "exp": "exp", "abs": "fabs", "floor": "floor", "ceil": "ceil",
}  # fmt: skip


def _has_degree(node: Node) -> bool:
    return node == Symbol("°") or any(_has_degree(child) for child in children(node))


def _hashed(key: str) -> int:
    return zlib.crc32(key.encode()) % 1_000_003


def _points(names: frozenset[str]) -> list[dict[str, Fraction]]:
    """Fixed points: three positive, two with negative coordinates."""
    points = []
    for number in range(_POINTS if names else 1):
        point = {}
        for name in names:
            base = Fraction(_hashed(f"{name}#{number}") % 9_973 + 31, 4_001)
            point[name] = base + 2 if number < 2 else base / 4 if number == 2 else -base
        points.append(point)
    return points


def scalars_equal(left: Node, right: Node) -> bool:
    """Whether two scalar trees have the same value (at every point, where they hold variables).

    Undefined or too large values equal nothing but the identical tree."""
    if left == right:
        return True
    names = symbols(left) | symbols(right)
    agreed = branched = 0
    for point in _points(names):
        try:
            a, b = exact(left, point), exact(right, point)
            if a is not None and b is not None:
                if a != b:
                    return False
                agreed += 1
                continue
            same, branch = _numerically_equal(left, right, point)
        except (Undefined, TooLarge):
            continue
        if branch and names:
            branched += same
            if not same and agreed == 0:
                return False
        elif not same:
            return False
        else:
            agreed += 1
    return agreed > 0 if not names else agreed >= 2 or (agreed == 0 and branched >= 3) or agreed + branched >= 3


def _numerically_equal(left: Node, right: Node, point: dict[str, Fraction]) -> tuple[bool, bool]:
    """(equal, a branch cut was met); precision grows with the orders of magnitude that the values span."""
    digits, margin = 60, 40
    while True:
        evaluator = Numeric(point, digits)
        difference, size = _difference(evaluator, left, right)
        ten = evaluator.context.mpf(10)
        if difference > size * ten ** -(margin // 2):
            return False, evaluator.branch
        if digits > 60 or evaluator.span <= 15:
            return bool(difference <= size * ten**-margin), evaluator.branch
        digits, margin = 60 + 3 * int(evaluator.span), 40 + 2 * int(evaluator.span)


def _difference(evaluator: Numeric, left: Node, right: Node) -> tuple[Any, Any]:
    """|left − right| and the size that rounding errors are relative to."""
    a, b = evaluator.value(left), evaluator.value(right)
    return abs(a - b), max(abs(a), abs(b), evaluator.scale)


def rough_value(node: Node) -> complex | None:
    """The value at the first point to about nine digits; None where cancellation, size or a fault forbids to trust it.

    Trees whose rough values differ are not equal."""
    (point, *_) = _points(symbols(node))
    try:
        evaluator = Numeric(point, 30)
        value = evaluator.value(node)
    except (Undefined, TooLarge):
        return None
    if evaluator.span > 100 or abs(value) <= evaluator.scale * evaluator.context.mpf(10) ** -10:
        return None
    return complex(value)


def near(left: complex | None, right: complex | None) -> bool:
    """Whether two rough values leave it open that their trees are equal."""
    return left is None or right is None or abs(left - right) <= 1e-9 * max(abs(left), abs(right))


def sign(node: Node) -> int | None:
    """−1, 0, 1 of a real constant; None where it is no real constant."""
    try:
        value = exact(node)
        if value is None:
            if symbols(node):
                return None
            number = Numeric({}, 50).value(node)
            context = _context()
            if context.im(number) != 0:
                return None
            return 0 if abs(number) < context.mpf(10) ** -40 else 1 if context.re(number) > 0 else -1
        return (value > 0) - (value < 0)
    except (Undefined, TooLarge):
        return None
