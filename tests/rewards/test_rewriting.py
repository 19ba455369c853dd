"""Equivalence under rewriting: 12,000 generated pairs. Equal values in random notations are equal, perturbed ones are not.

One seeded generator instead of hypothesis, so that this many cases fit the time of the suite; a failure prints its pair.
"""

import math
import random
import time
from collections.abc import Callable
from fractions import Fraction

import pytest

from rewards.math_equal import equivalent

Writer = Callable[[random.Random], tuple[str, str, str]]
"""Draws a case: (one notation, another notation of the same value, a notation of a perturbed value)."""


def wrapped(draw: random.Random, text: str) -> str:
    """A bare answer or a completion around it."""
    forms = [
        "{}",
        " {} ",
        "${}$",
        r"\boxed{{{}}}",
        "<think> hm </think> <answer> {} </answer>",
        "The answer is ${}$.",
        r"\({}\)",
        r"\left({}\right)",
        "{}.",
    ]
    return draw.choice(forms if not text.startswith(("(", "[", r"\{")) and "," not in text else forms[:7]).format(text)


def rational(draw: random.Random, value: Fraction) -> str:
    n, d, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    factor = draw.randint(2, 9)
    forms = [
        rf"{sign}\frac{{{n}}}{{{d}}}",
        rf"\dfrac{{{sign}{n}}}{{{d}}}",
        f"{sign}{n}/{d}",
        rf"{sign}\frac{{{factor * n}}}{{{factor * d}}}",
        f"x = {sign}{n}/{d}",
    ]
    forms += [rf"\frac{{{'' if sign else '-'}{n}}}{{-{d}}}", f"{sign}{n} / {d}", f"({sign}{n})/{d}"]
    if d == 1:
        grouped = f"{n:,}"
        forms += [
            f"{sign}{n}",
            f"{sign}{n}.0",
            sign + grouped,
            sign + grouped.replace(",", "{,}"),
            sign + grouped.replace(",", r",\!"),
            f"{sign}{n} apples",
        ]
        forms += [f"{sign}{n}e0", rf"{sign}{n}\text{{ cm}}", f"{sign}0{n}"]
    if math.gcd(d, 10**6) == d:
        digits = f"{n * 10**6 // d:07d}"
        forms += [f"{sign}{digits[:-6]}.{digits[-6:]}", f"{sign}{Fraction(n, d) * 100}" + r"\%" if (100 * n) % d == 0 else f"{sign}{n}/{d}"]
    if d in (3, 9, 11, 33, 99):
        whole, rest = divmod(n, d)
        cycle = f"{rest * (99 // d if 99 % d == 0 else 0):02d}"
        forms += [rf"{sign}{whole}.\overline{{{cycle}}}", f"{sign}{whole}.({cycle})"]
    if n > d > 1:
        forms += [rf"{sign}{n // d}\frac{{{n % d}}}{{{d}}}", f"{sign}{n // d} {n % d}/{d}"]
    return draw.choice(forms)


def a_rational(draw: random.Random) -> tuple[str, str, str]:
    value = Fraction(draw.randint(-30_000, 30_000), draw.choice([1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 25, 99, 125]))
    other = draw.choice([value + 1, -value, value * 10, value / 10, value + Fraction(1, 1000), 1 / value if value else Fraction(1)])
    if other == value:
        other = value + 1
    return wrapped(draw, rational(draw, value)), wrapped(draw, rational(draw, value)), wrapped(draw, rational(draw, other))


def radical(draw: random.Random, factor: int, inside: int) -> str:
    sign = "-" if factor < 0 else ""
    forms = [rf"{factor}\sqrt{{{inside}}}", rf"{sign}\sqrt{{{factor**2 * inside}}}", f"{factor}*sqrt({inside})", rf"{factor} \cdot \sqrt{{{inside}}}"]
    forms += [
        rf"\frac{{{factor * inside}}}{{\sqrt{{{inside}}}}}",
        f"{factor}√{inside}",
        rf"\sqrt{{{inside}}} \cdot {factor}" if factor > 0 else rf"{factor}\sqrt{{{inside}}}",
    ]
    return draw.choice(forms)


def a_radical(draw: random.Random) -> tuple[str, str, str]:
    factor, inside = draw.choice([-7, -3, 2, 3, 5, 12]), draw.choice([2, 3, 5, 6, 7, 10, 11])
    other = draw.choice(
        [radical(draw, factor + 20, inside), radical(draw, factor, inside + 13), f"{factor * inside**0.5:.6f}", radical(draw, -factor, inside)]
    )
    return wrapped(draw, radical(draw, factor, inside)), wrapped(draw, radical(draw, factor, inside)), wrapped(draw, other)


def polynomial(draw: random.Random, values: list[int]) -> str:
    order = draw.sample(range(len(values)), len(values))
    power = {0: "", 1: "x"}
    terms = [f"{values[place]:+d}{power.get(place, f'x^{{{place}}}')}" for place in order]
    return (
        "".join(terms).lstrip("+")
        if draw.random() < 0.7
        else "-(" + "".join(f"{-values[place]:+d}{power.get(place, f'x^{place}')}" for place in order) + ")"
    )


def a_polynomial(draw: random.Random) -> tuple[str, str, str]:
    values = [draw.choice([-9, -4, -1, 1, 2, 3, 8]) for _ in range(draw.randint(2, 5))]
    other = list(values)
    place = draw.randrange(len(values))
    other[place] = -other[place] if draw.random() < 0.5 else other[place] + 1 or 5
    return polynomial(draw, values), polynomial(draw, values), polynomial(draw, other)


def interval(draw: random.Random, low: int, high: int, closed: tuple[bool, bool]) -> str:
    left, right = (r"\le" if end else "<" for end in closed)
    forms = [f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}", rf"{low} {left} x {right} {high}"]
    forms += [
        rf"x \in {forms[0]}",
        rf"\left{forms[0][:-1]}\right{forms[0][-1]}",
        rf"{high} {right.replace('le', 'ge').replace('<', '>')} x {left.replace('le', 'ge').replace('<', '>')} {low}",
    ]
    return draw.choice(forms)


def an_interval(draw: random.Random) -> tuple[str, str, str]:
    low = draw.randint(-20, 20)
    high, closed = low + draw.randint(1, 9), (draw.random() < 0.5, draw.random() < 0.5)
    changed = draw.choice(
        [(low, high, (not closed[0], closed[1])), (low, high, (closed[0], not closed[1])), (low - 1, high, closed), (low, high + 1, closed)]
    )
    return interval(draw, low, high, closed), interval(draw, low, high, closed), interval(draw, *changed)


def a_list(draw: random.Random) -> tuple[str, str, str]:
    values = draw.sample(range(-30, 30), draw.randint(2, 5))
    shuffled = [rational(draw, Fraction(value)) if draw.random() < 0.1 else str(value) for value in draw.sample(values, len(values))]
    shuffled = [item for item in shuffled if "," not in item and "=" not in item and "apples" not in item and "text" not in item]
    if len(shuffled) < len(values):
        shuffled = [str(value) for value in values]
    forms = [", ".join(shuffled), r"\{" + ",".join(shuffled) + r"\}", "x = " + r" \text{ or } x = ".join(shuffled), " and ".join(shuffled)]
    other = draw.choice([values[:-1], [*values, 31], [*values[:-1], 40]])
    return ", ".join(map(str, values)), draw.choice(forms), ", ".join(map(str, other))


def a_tuple(draw: random.Random) -> tuple[str, str, str]:
    values = draw.sample(range(-30, 30), draw.randint(2, 4))
    text = ", ".join(map(str, values))
    forms = [f"({text})", rf"\left( {text} \right)", f"({', '.join(f'{value}.0' for value in values)})", f"P = ({text})"]
    other = draw.choice([f"({', '.join(map(str, values[::-1]))})", f"({text}, 1)", text, f"({', '.join(map(str, [values[0] + 1, *values[1:]]))})"])
    return f"({text})", draw.choice(forms), other


def an_equation(draw: random.Random) -> tuple[str, str, str]:
    a, b, c, factor = draw.choice([-5, -2, 3, 4]), draw.choice([-7, 2, 5]), draw.randint(1, 9), draw.choice([-3, 2, 5])
    forms = [
        f"{a}x{b:+d}y={c}",
        f"{factor * a}x{factor * b:+d}y={factor * c}",
        f"{a}x={c}{-b:+d}y",
        rf"y=\frac{{{c}{-a:+d}x}}{{{b}}}",
        f"0={c}{-a:+d}x{-b:+d}y",
    ]
    other = draw.choice([f"{a}x{b:+d}y={c + 1}", f"{a}x{-b:+d}y={c}", f"{a + 1}x{b:+d}y={c}"])
    return draw.choice(forms), draw.choice(forms), other


def a_matrix(draw: random.Random) -> tuple[str, str, str]:
    rows = [[draw.randint(-9, 9) for _ in range(2)] for _ in range(2)]
    changed = [list(row) for row in rows]
    changed[draw.randrange(2)][draw.randrange(2)] += draw.choice([-1, 1])

    def write(values: list[list[int]]) -> str:
        body = r" \\ ".join(" & ".join(draw.choice([str(value), f"{value}.0", rf"\frac{{{2 * value}}}{{2}}"]) for value in row) for row in values)
        kind = draw.choice(["pmatrix", "bmatrix"])
        return rf"\begin{{{kind}}} {body} \end{{{kind}}}"

    return write(rows), write(rows), write(changed)


KINDS: dict[str, tuple[Writer, int]] = {
    "rational": (a_rational, 2_600),
    "radical": (a_radical, 600),
    "polynomial": (a_polynomial, 500),
    "interval": (an_interval, 600),
    "list": (a_list, 700),
    "tuple": (a_tuple, 500),
    "equation": (an_equation, 200),
    "matrix": (a_matrix, 300),
}


def test_there_are_more_than_ten_thousand_cases() -> None:
    assert 2 * sum(count for _, count in KINDS.values()) >= 12_000


@pytest.mark.parametrize("kind", KINDS)
def test_rewritten_answers_are_equal_and_perturbed_ones_are_not(kind: str) -> None:
    write, count = KINDS[kind]
    draw = random.Random(f"{kind} 1")
    start = time.process_time()
    for number in range(count):
        left, right, wrong = write(draw)
        pair = (left, right) if number % 2 else (right, left)
        assert equivalent(*pair), pair
        pair = (left, wrong) if number % 2 else (wrong, left)
        assert not equivalent(*pair), pair
    assert time.process_time() - start < 60
