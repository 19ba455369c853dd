"""The checker: labelled pairs by kind, symmetry, rewriting (property tests), text made to break it, voting classes."""

import math
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.math_equal import equivalent, parse
from rewards.tree import Number

EQUAL = [
    # numbers
    ("42", " 42. "),
    ("42", "$42$"),
    ("42", r"\boxed{42}"),
    ("-3", "−3"),
    ("0", "-0"),
    ("5", "+5"),
    ("004", "4"),
    ("1000000", "1,000,000"),
    ("1000000", r"1{,}000{,}000"),
    (r"12,\!000", "12000"),
    ("1000", r"1\,000"),
    ("1000", "1 000"),
    ("0.75", "3/4"),
    (".5", r"\frac12"),
    ("3.50", r"\$3.5"),
    ("12345678901234567890", "12,345,678,901,234,567,890"),
    (r"3.2\times 10^5", "3.2e5"),
    (r"3.2\times 10^5", "3.2 x 10^5"),
    ("1.5 million", "1500000"),
    (r"0.\overline{3}", "1/3"),
    (r"0.\overline{12}", r"0.\overline{1212}"),
    ("1/3", "0.(3)"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\sqrt[3]{-2}", r"-\sqrt[3]{2}"),
    ("0.1", r"10\%"),
    ("0.75", "75 percent"),
    ("½", "0.5"),
    ("4", r"\text{four}"),
    # fractions and mixed numbers
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{1}{2}", "2/4"),
    (r"3\frac{1}{2}", "7/2"),
    ("7 3/4", "31/4"),
    (r"-2\frac{3}{4}", r"-\frac{11}{4}"),
    (r"\frac9{4}\pi", r"2.25\pi"),
    # roots, π, e, i
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt{3}", "2√3"),
    (r"2\sqrt{3}", "2*sqrt(3)"),
    (r"\frac{\sqrt{2}}{2}", "2^{-1/2}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"\sqrt[3]{8}", "2"),
    (r"9\pi", "9 pi"),
    (r"\frac{\pi}{6}", "π/6"),
    ("3+4i", "4 i + 3"),
    ("-i", "1/i"),
    (r"\log_2 8", r"\frac{\ln 8}{\ln 2}"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    ("2^{100}", "1267650600228229401496703205376"),
    (r"\sin 30^\circ", "1/2"),
    ("90^\\circ", "90°"),
    ("90^\\circ", "90 degrees"),
    # expressions
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{1}{x(x+1)}", r"\frac{1}{x}-\frac{1}{x+1}"),
    ("2^{n+1}", r"2\cdot 2^n"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"\frac{n(n-1)(n-2)}{6}", r"\binom{n}{3}"),
    ("a_1", "a_{1}"),
    # equations, inequalities, intervals
    ("x=3", "3"),
    ("18", r"6 \cdot 3 = 18"),
    ("x=5", "5=x"),
    ("y=2x+3", "2x-y+3=0"),
    ("(x-1)^2+(y+2)^2=9", "x^2+y^2-2x+4y-4=0"),
    ("x < 1", "-x > -1"),
    ("[2,5)", r"2\le x<5"),
    ("2 < x < 7", r"x\in(2,7)"),
    (r"x<-1 \text{ or } x>3", r"(-\infty,-1)\cup(3,\infty)"),
    ("(0,1)\\cup(1,2)", r"(0,2)\setminus\{1\}"),
    (r"x \neq 5", r"(-\infty,5) \cup (5,\infty)"),
    (r"\mathbb{R}", r"(-\infty, \infty)"),
    # collections
    ("(3,4)", r"\left(3, 4\right)"),
    ("(3,4)", "(x,y)=(3,4)"),
    ("-2, 5", r"x=5 \text{ or } x=-2"),
    (r"\{1,2,3\}", "3, 2, 1"),
    ("{1,2,3}", r"\boxed{1} and \boxed{2} and \boxed{3}"),
    (r"\pm 3", "3, -3"),
    (r"\frac{-1\pm\sqrt{5}}{2}", r"\frac{-1-\sqrt5}{2}, \frac{-1+\sqrt5}{2}"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\emptyset", r"\{\}"),
    (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\left[\begin{array}{cc}1&2\\3&\frac{8}{2}\end{array}\right]"),
    # units, text
    ("12", "12 dollars"),
    ("18", "$18"),
    (r"15\text{ cm}^2", "15 square centimeters"),
    ("5", "5 m²"),
    (r"5\text{ m}", "5 m"),
    ("B", "(B) 12"),
    ("x>1", r"\{x \mid x > 1\}"),
    (r"(-\infty,3]", "(-oo, 3]"),
    (r"\mathbb{R}", "all real numbers"),
    ("3:30 p.m.", "3:30 pm"),
    ("2:3", r"2\colon 3"),
    ("1011_2", "1011_{2}"),
    ("A", r"\text{(A)}"),
    ("B", "Option B"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{even}", "Even"),
    # completions
    ("18", "<think>first 10</think>\n<answer>The answer is $18$.</answer>"),
    ("72", "so 48+24 = 72\n#### 72"),
    ("72", "So she sold 72 clips altogether."),
    ("34", "Final Answer: The largest $n$ is 34."),
    ("840", r"\boxed{1}. Wait, \boxed{840}."),
]

DIFFERENT = [
    ("42", "420"),
    ("42", "42x"),
    ("7", "-7"),
    ("1/3", "0.33"),
    (r"\pi", "3.14159265358979"),
    (r"\sqrt{2}", "1.41421356237309504880168872420969807857"),
    ("1000000", "1,000,00"),
    ("12345", "(12,345)"),
    ("100000001", "100000002"),
    ("12345678901234567890", "12345678901234567891"),
    ("0", "10^{-12}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac1{2^{99}}", r"\frac1{2^{98}}"),
    ("20%", "20"),
    ("3.5", "3,5"),
    ("12", "1 2"),
    ("5", "5 or 6"),
    ("5", "5 million"),
    ("5", "not 5"),
    ("5", "about 5"),
    ("5", "the answer is  not 5"),
    ("5", "5m"),
    ("5", "5?6"),
    ("5", "1,2,3,4,5"),
    ("5", "5^{5^{5^5}}"),
    ("42", "42!"),
    ("0", "x-x+1"),
    ("0", "0/0"),
    ("1", "1/0"),
    ("1", "1=0"),
    ("1", "0=0"),
    ("3", r"x\neq 3"),
    ("3", "x>3"),
    ("3", "x=3 or x=4"),
    (r"-2\frac34", "-1.25"),
    (r"\sqrt[3]{16}", r"\sqrt{16}"),
    ("2^{n+1}", "2^n+1"),
    ("2x", "2y"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
    ("1-1/e", "1+1/e"),
    ("3+4i", "3-4i"),
    ("y=2x+3", "y=3x+2"),
    (r"x \geq 5", "x > 5"),
    ("[2,5)", "(2,5)"),
    ("[2,5)", "2,5"),
    ("(3,4)", "(4,3)"),
    ("(3,4)", "4,3"),
    (r"\{1,2,3\}", "1,2"),
    (r"\pm 3", "3"),
    (r"\pm 3", "3, 3"),
    (r"\emptyset", r"\{\emptyset\}"),
    (r"\emptyset", "0"),
    (r"\infty", r"-\infty"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}"),
    (r"5\text{ cm}", r"5\text{ kg}"),
    (r"\$5", "5 cents"),
    (r"15\text{ cm}^2", "15 cm"),
    ("3:30", "3:03"),
    ("3:30 p.m.", "3:30 a.m."),
    ("1011_2", "1011_3"),
    ("A", "B"),
    ("A", "a"),
    (r"\text{Evelyn}", "Evelyn and Angela"),
    ("18", "<think> 18 </think> <answer> </answer>"),
    ("18", "<think> 18 </think>"),
    ("18", "<think> it is 18"),
    ("18", "<answer> 18"),
    ("18", "<think>x</think><answer>16, 17, 18, 19</answer>"),
    ("18", r"\boxed{18}. No: \boxed{19}"),
    ("18", ""),
    ("", ""),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_same_answers_are_equal_in_both_orders(left: str, right: str) -> None:
    assert equivalent(left, right)
    assert equivalent(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers_are_told_apart_in_both_orders(left: str, right: str) -> None:
    assert not equivalent(left, right)
    assert not equivalent(right, left)


BOMBS = [
    "9^{9^{9^9}}",
    "9**9**9**9",
    "10^9!",
    "(10^9)!",
    "5" + "!" * 20,
    "(" * 5000 + "1" + ")" * 5000,
    r"\frac{" * 3000,
    r"\sqrt{" * 3000 + "2" + "}" * 3000,
    "9" * 100_000,
    "1," * 50_000,
    "x" * 100_000,
    "\x00" * 1000,
    "5\x005",
    "\ud800",
    "__import__('os').system('touch {}')",
    r"(x+1)^{500}(x+2)^{500}",
    "(x+y)^{100000}",
    r"\binom{10^9}{5 \cdot 10^8}",
    "1 " * 20_000,
    "1e999999",
    "10^{10^{10}}",
    "10^{-10^{9}}",
    "x^{x^{x^{x^x}}}",
    "e^{e^{e^{e^e}}}",
    "i^{i^{i^i}}",
    r"\sin(10^{300})",
    r"\sqrt[1000000]{2}",
    "((((1+x)^{30})^{30})^{30})^{30}",
    "-" * 5000 + "1",
    "|" * 5000,
    r"\boxed{" * 20_000,
    r"\boxed{" * 20_000 + "}" * 20_000,
    "<think>" * 20_000,
    "<answer>" * 20_000,
    "$ a " * 20_000,
    " is " * 20_000,
    "answer is " * 20_000,
    r"\sin" + "-" * 1900 + "x",
    r"\frac" * 1900,
    r"\sqrt" * 1900 + "2",
    r"\sin" * 1900 + "x",
    "2*" * 900 + "x",
    "x " * 1900,
    "3/" * 900 + "x",
    "x" + "%" * 1900,
    "2^" * 900 + "2",
    "5" + r"\text{ million}" * 900,
    r"x\cup " * 900 + "x",
    "1:" * 900 + "1",
    "1=" * 900 + "1",
    "1<" * 900 + "x",
    r"[1,2]\cup" * 100 + "[3,4]",
    r" \text{or} ".join(f"x<{number}" for number in range(300)),
    ",".join(rf"\sqrt{{{number}}}" for number in range(150)),
    ",".join(f"x_{number}" for number in range(190)),
    "*".join(rf"\sin({number}x)" for number in range(200)),
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: repr(bomb[:20]))
def test_a_bomb_is_answered_quickly_and_equals_nothing_else(bomb: str, tmp_path) -> None:
    bomb = bomb.replace("{}", str(tmp_path / "executed"))
    start = time.process_time()
    for other in ("5", r"\sqrt{2}", "x+1", "1,2,3"):
        assert not equivalent(other, bomb)
        assert not equivalent(bomb, other)
    parse(bomb)
    equivalent(bomb, bomb + " ")
    assert time.process_time() - start < 1  # ten checks
    assert not (tmp_path / "executed").exists()


def test_unparseable_gold_is_seen() -> None:
    assert parse(r"\sqrt") is None
    assert parse("5?6") is None
    assert parse("   ") is None
    assert parse("<think>5</think>") is None
    assert parse("3/4") == Number(Fraction(3, 4))


def test_threads_do_not_share_precision() -> None:
    wrong = []

    def check() -> None:
        for _ in range(20):
            if not equivalent(r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}") or equivalent(r"\sqrt{2}+10^{-50}", r"\sqrt{2}"):
                wrong.append(1)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# rewriting


def notations(value: Fraction) -> list[str]:
    """Ways to write a rational number."""
    n, d = value.numerator, value.denominator
    written = [f"{n}/{d}", f"({n})/({d})", rf"{n} \div {d}", f"{n} / {d} dollars", f"x = {n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"${n}/{d}$"]
    written += [rf"\boxed{{\dfrac{{{n}}}{{{d}}}}}", f"<answer> {3 * n}/{3 * d} </answer>"]
    if d == 1:
        written += [str(n), f"{n}.0", f"{n:,}", f"{n:,}".replace(",", r"{,}"), f"{n:,}".replace(",", r",\!"), rf"\${n}" if n >= 0 else f"{n} dollars"]
    if math.gcd(d, 10**6) == d:
        digits = f"{abs(n) * 10**6 // d:07d}"
        written.append(("-" if n < 0 else "") + f"{digits[:-6]}.{digits[-6:]}")
    if abs(n) > d > 1:
        sign, whole, rest = "-" if n < 0 else "", abs(n) // d, abs(n) % d
        written += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    return written


rationals = st.builds(Fraction, st.integers(-30_000, 30_000), st.sampled_from([1, 1, 1, 2, 3, 4, 5, 7, 8, 16, 25, 99, 125]))


@settings(max_examples=400, deadline=None)
@given(rationals, st.data())
def test_a_number_is_equal_in_all_notations(value: Fraction, data: st.DataObject) -> None:
    left, right = data.draw(st.sampled_from(notations(value))), data.draw(st.sampled_from(notations(value)))
    assert equivalent(left, right), (left, right)


@settings(max_examples=400, deadline=None)
@given(rationals, rationals, st.data())
def test_different_numbers_are_different_in_all_notations(first: Fraction, second: Fraction, data: st.DataObject) -> None:
    if first == second:
        return
    left, right = data.draw(st.sampled_from(notations(first))), data.draw(st.sampled_from(notations(second)))
    assert not equivalent(left, right), (left, right)


coefficients = st.lists(st.integers(-9, 9), min_size=2, max_size=4)


def polynomial(values: list[int], order: list[int]) -> str:
    return " + ".join(f"({values[power]})x^{{{power}}}" for power in order)


@settings(max_examples=150, deadline=None)
@given(coefficients, st.randoms(use_true_random=False), st.integers(1, 5))
def test_a_polynomial_may_be_reordered_but_not_changed(values: list[int], random, delta: int) -> None:
    order = list(range(len(values)))
    shuffled = random.sample(order, len(order))
    assert equivalent(polynomial(values, order), polynomial(values, shuffled))
    changed = [*values]
    changed[shuffled[0]] += delta
    assert not equivalent(polynomial(values, order), polynomial(changed, order))


PIECES = [*"0123456789.,+-*/^_!%$()[]{}|<>=:;xyie \\", r"\frac", r"\sqrt", r"\pi", r"\text{", r"\pm", " or ", "∞", "²"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_gets_a_symmetric_verdict(text: str) -> None:
    parse(text)
    assert equivalent("12", text) == equivalent(text, "12")
    assert equivalent("(1,2)", text) == equivalent(text, "(1,2)")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\sin {}x", "15"),
        (r"\cot x\cot 0", r"\cot x\cot x"),
        ("n(1n-181)!%", "n(1n-181)!"),
        (r"\binom{n}{150.5}", r"\binom{n}{150.5}+1"),
        ("x=1,y=∞i²", "x=1,y=∞i"),
    ],
)
def test_texts_that_once_raised_or_took_seconds(left: str, right: str) -> None:
    start = time.process_time()
    assert not equivalent(left, right)
    assert not equivalent(right, left)
    assert time.process_time() - start < 1
