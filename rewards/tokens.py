"""Text of an answer (LaTeX, plain maths, Unicode) → tokens.

Kinds: num (value is a Fraction), name (one letter or Greek letter), func, const, cmd (structural LaTeX), op, rel, set,
infix (`\\over`), money (the currency's unit), word, sep (`,` `;` `or` `and`), open, close, begin, end, row, col. Characters
outside the table raise SyntaxFault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards import words
from rewards.tree import MAX_DIGITS, MAX_TOKENS


class SyntaxFault(ValueError):
    """The text is no answer the grammar knows."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    value: Fraction | None = None
    spaced: bool = False
    """White space stood before it."""
    in_text: bool = False
    """It stood inside \\text{…}."""


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {"½": "1 2", "⅓": "1 3", "⅔": "2 3", "¼": "1 4", "¾": "3 4", "⅕": "1 5", "⅖": "2 5", "⅗": "3 5", "⅘": "4 5", "⅙": "1 6", "⅚": "5 6",
           "⅛": "1 8", "⅜": "3 8", "⅝": "5 8", "⅞": "7 8", "⅐": "1 7", "⅑": "1 9", "⅒": "1 10"}  # fmt: skip
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "*", "⋅": "*", "·": "*", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "∶": ":",
        "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "√": r"\sqrt ", "∛": r"\cbrt ", "∞": r"\infty ", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ø": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "º": "°", "˚": "°", "∖": r"\setminus ",
        "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "\u00a0": " ", "\u2009": " ",
        "\u202f": " ", "\u200b": "", "\u2061": "", "\ufeff": "", "’": "'", "′": "'", "“": '"', "”": '"', "‘": "'",
        "⩵": "=", "、": ",", "。": ".", "\u3000": " ", "∣": "|", "∥": "|", "∧": r"\text{and}", "∨": r"\text{or}", "⟨": "(", "⟩": ")",
        "ⅈ": "i", "ⅇ": "e", "¢": r"\text{ cents}", "…": "...", "△": r"\triangle ", "∠": r"\angle ", "ℓ": r"\ell ",
    }
    | {chr(0xFF01 + offset): chr(0x21 + offset) for offset in range(94)}
)  # fmt: skip
_GREEK = {"π": "pi", "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu", "ν": "nu",
          "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Δ": "Delta", "Ω": "Omega",
          "Σ": "Sigma", "Γ": "Gamma", "Φ": "Phi"}  # fmt: skip
GREEK = frozenset(_GREEK.values()) | {"varphi", "varepsilon", "vartheta", "eta", "zeta", "kappa", "xi", "ell", "iota", "Theta", "Lambda", "Pi", "Psi"}
FUNCTIONS = words.word_set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min arccot arcsec arccsc floor ceil abs"
)
MONEY = {"¤": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee", "₽": "rouble", "₩": "won"}
"""Currency signs and their units; `\\$` has become ¤ by then."""
_RELATIONS = {"le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠", "in": "∈",
              "equiv": "≡", "eq": "="}  # fmt: skip
_SETS = {"cup": "∪", "cap": "∩", "setminus": "\\", "backslash": "\\"}
_OPERATORS = {"cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "∓", "colon": ":", "ratio": ":"}
_OPENERS = {"{": "{}", "lbrace": "{}", "langle": "(", "lvert": "|", "lbrack": "[", "lfloor": "⌊", "lceil": "⌈"}
_CLOSERS = {"}": "{}", "rbrace": "{}", "rangle": ")", "rvert": "|", "rbrack": "]", "rfloor": "⌋", "rceil": "⌉"}
_SHAPES = {"triangle": "△", "angle": "∠", "measuredangle": "∠", "square": "□", "odot": "⊙", "parallel": "∥", "perp": "⊥", "circledcirc": "⊙"}
"""Signs before the name of a figure; part of the name."""
_IGNORED = words.word_set(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits quad qquad nobreak enspace thinspace "
    "mathrm mathbf mathit mathsf boldsymbol bold operatorname mathop mathord rm bf it hline bigg( ensuremath"
)
_TEXT_COMMANDS = words.word_set("text textbf textit textrm textnormal mbox hbox mathrm mathbf mathsf mathit operatorname textsf emph")
_WRAPPERS = words.word_set("overline vec hat widehat tilde bar underline boldsymbol overrightarrow boxed")

_GROUPED = re.compile(r"\d{1,3}(?P<sep>\{,\}|,\\!|\\,|\\;|\\ |\\!|,| )\d{3}(?:(?P=sep)\d{3})*(?![,\d]\d|\d)(?:\.\d+)?")
_MIXED = re.compile(r"\d+ +\d+/\d")
_GROUPED_SAFE = re.compile(r"\d{1,3}(?P<sep>\{,\}|,\\!|\\,|\\!)\d{3}(?:(?P=sep)\d{3})*(?!\d)(?:\.\d+)?")
_DECIMAL = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar)\s*(?:\{\s*(\d{1,60})\s*\}|(\d))|\((\d{1,60})\)(?![\d(])"
    r"|\\dot\s*\{?(\d)\}?(?:(\d{0,60})\\dot\s*\{?(\d)\}?)?)"
)
"""0.1\\overline{6}, 0.1(6), and with a dot on the first and last digit of the cycle."""
_SKIP = re.compile(r"\s*\*?\s*\{[^{}]{0,20}\}")
_CONJUGATE = re.compile(r"\s*(?:\{\s*([A-Za-z]|\\[a-z]+|[^{}]*[-+*/^i][^{}]*)\s*\}|\s[A-Za-z])")
"""What a bar makes another value of: one letter (a mean, a complement, a conjugate) or a sum; `AB` is a segment, `12` digits."""
_POINT = re.compile(r"\.(?:\d|\\(?:overline|bar|dot)\b)")
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})(?![\w.])")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_LETTERS = re.compile(r"[A-Za-z]+(?:'[a-z]+|(?:\.[A-Za-z])+\.?(?![A-Za-z]))?")
_SYMBOLS = {"+": "+", "-": "-", "*": "*", "/": "/", "^": "^", "_": "_", "!": "!", "%": "%", "°": "°", ":": ":", "'": "'"}


def translate(text: str) -> str:
    """Unicode maths → the ASCII/LaTeX the tokenizer reads."""
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    for sign, parts in _VULGAR.items():
        if sign in text:
            top, bottom = parts.split()
            text = text.replace(sign, rf"\frac{{{top}}}{{{bottom}}}")
    for sign, name in _GREEK.items():
        text = text.replace(sign, f"\\{name} ")
    return text.translate(_UNICODE)


class Tokenizer:
    """One pass over `text`; `tokens()` gives the list. `thousands=False` reads `12,345` as two numbers."""

    def __init__(self, text: str, *, thousands: bool = True) -> None:
        self.text = text
        self.position = 0
        self.depth = 0
        self.thousands = thousands
        self.spaced = False
        self.out: list[Token] = []

    def tokens(self) -> list[Token]:
        self._run(len(self.text), in_text=False)
        return self.out

    def _emit(self, kind: str, text: str, value: Fraction | None = None, in_text: bool = False) -> None:
        if len(self.out) >= MAX_TOKENS:
            raise SyntaxFault("too many tokens")
        self.out.append(Token(kind, text, value, self.spaced, in_text))
        self.spaced = False

    def _run(self, end: int, in_text: bool) -> None:
        text = self.text
        while self.position < end:
            char = text[self.position]
            if char.isspace() or char == "~":
                self.spaced = True
                self.position += 1
            elif char in "0123456789" or (char == "." and _POINT.match(text, self.position)):
                self._number(in_text)
            elif char.isascii() and char.isalpha():
                self._letters(in_text)
            elif char == "\\":
                self._command()
            else:
                self._symbol(char, in_text)

    def _number(self, in_text: bool) -> None:
        text, start = self.text, self.position
        repeating = _REPEATING.match(text, start)
        if repeating:
            whole, fixed, *cycles = repeating.groups(default="")
            cycle = "".join(cycles)
            if len(whole) + len(fixed) > MAX_DIGITS:
                raise SyntaxFault("too many digits")
            base = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed))
            value = base + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
            self.position = repeating.end()
            self._emit("num", repeating.group(), value, in_text)
            return
        pattern = _GROUPED if self.thousands and self.depth == 0 else _GROUPED_SAFE
        grouped = None if _MIXED.match(text, start) else pattern.match(text, start)
        match = grouped or _DECIMAL.match(text, start)
        if match is None:
            raise SyntaxFault("bad number")
        digits = re.sub(r"[^\d.]", "", match.group())
        if len(digits) > MAX_DIGITS:
            raise SyntaxFault("too many digits")
        value = Fraction(int(digits)) if "." not in digits else Fraction(digits)
        self.position = match.end()
        exponent = _EXPONENT.match(text, self.position)
        if exponent:
            power = int(exponent.group(1))
            if abs(power) > MAX_DIGITS:
                raise SyntaxFault("exponent too large")
            value *= Fraction(10) ** power
            self.position = exponent.end()
            digits += exponent.group()
        self._emit("num", digits, value, in_text)

    def _letters(self, in_text: bool) -> None:
        match = _LETTERS.match(self.text, self.position)
        if match is None:
            raise SyntaxFault("bad letters")
        run = match.group()
        if "'" in run and not in_text and len(run) <= 3:  # f'(x), not a word with an apostrophe
            run = run.split("'")[0]
        elif run.endswith(".") and run.replace(".", "").lower() not in ("am", "pm"):
            run = run.split(".")[0]
        self.position += len(run)
        plain = run.replace(".", "")
        lower = plain.lower()
        if lower in words.CONNECTIVES:
            self._emit("sep", lower, in_text=in_text)
        elif not in_text and plain in FUNCTIONS and not (plain == "min" and self.out and self.out[-1].kind == "num"):  # 30 min
            self._emit("func", plain)
        elif plain in ("sqrt", "cbrt"):
            self._emit("cmd", plain)
        elif plain in GREEK:
            self._greek(plain)
        elif lower in ("infinity", "infty", "inf", "oo"):
            self._emit("const", "∞")
        elif plain in ("choose", "over") and self.out and not in_text:
            self._emit("infix", plain)
        elif plain == "U" and self.out and self.out[-1].text in ")]" and self.text[self.position :].lstrip()[:1] in ("(", "["):
            self._emit("set", "∪")
        elif len(plain) == 1:
            unit = plain.isupper() and self.spaced and bool(self.out) and self.out[-1].kind == "num"  # 5 \text{N}
            self._emit("word" if in_text and (unit or not plain.isupper()) else "name", plain, in_text=in_text)
        elif in_text or len(plain) > 3 or lower in words.SHORT_WORDS or lower in words.UNITS or (plain[0].isupper() and plain[1:].islower()):
            self._emit("word", plain, in_text=in_text)
        else:
            for letter in plain:
                self._emit("name", letter)

    def _greek(self, name: str) -> None:
        if name == "pi":
            self._emit("const", "π")
        else:
            self._emit("name", name.removeprefix("var") if name != "var" else name)

    def _symbol(self, char: str, in_text: bool) -> None:
        text, start = self.text, self.position
        pair = text[start : start + 2]
        self.position += 1
        if pair in ("<=", ">=", "!=", "=<", "=>", "=="):
            self.position += 1
            self._emit("rel", {"<=": "≤", "=<": "≤", ">=": "≥", "=>": "≥", "!=": "≠", "==": "="}[pair])
        elif pair == "**":
            self.position += 1
            self._emit("op", "^")
        elif char in "=<>":
            self._emit("rel", char)
        elif char in "([{":
            self.depth += char != "{" or not self._is_argument()
            self._emit("open", char)
        elif char in ")]}":
            self.depth = max(0, self.depth - 1)
            self._emit("close", char)
        elif char == "|":
            self._emit("bar", "|")
        elif char in ",;":
            self._emit("sep", ",")
        elif char == "&":
            self._emit("col", "&")
        elif char in _SYMBOLS:
            self._emit("op", char, in_text=in_text)
        elif char in MONEY:
            self._emit("money", MONEY[char])
        elif char in '$"' or (char == "." and in_text):
            self.spaced = True
        else:
            raise SyntaxFault(f"character {char!r}")

    def _is_argument(self) -> bool:
        """A brace right after a command, ^ or _ groups; it does not make a list."""
        last = self.out[-1] if self.out else None
        return last is not None and (last.kind in ("cmd", "close") or last.text in "^_")

    def _command(self) -> None:
        match = _COMMAND.match(self.text, self.position)
        if match is None:
            raise SyntaxFault("stray backslash")
        name = match.group(1)
        self.position = match.end()
        if name in _TEXT_COMMANDS and self.text[self.position :].lstrip()[:1] == "{":
            self._text_argument(name)
        elif name in ("frac", "dfrac", "tfrac", "cfrac", "sqrt", "cbrt", "binom", "dbinom", "tbinom"):
            self._emit("cmd", "frac" if name.endswith("frac") else "binom" if name.endswith("binom") else name)
        elif name in ("begin", "end"):
            self._environment(name)
        elif name == "\\":
            self._emit("row", "\\\\")
        elif name in ("pmod", "bmod", "mod"):
            raise SyntaxFault("modular answer")
        elif name in _OPERATORS:
            self._emit("op", _OPERATORS[name])
        elif name in _RELATIONS:
            self._emit("rel", _RELATIONS[name])
        elif name in _SETS:
            self._emit("set", _SETS[name])
        elif name in _OPENERS:
            self.depth += 1
            self._emit("bar" if _OPENERS[name] == "|" else "open", _OPENERS[name])
        elif name in _CLOSERS:
            self.depth = max(0, self.depth - 1)
            self._emit("bar" if _CLOSERS[name] == "|" else "close", _CLOSERS[name])
        elif name in ("emptyset", "varnothing"):
            self._emit("const", "∅")
        elif name in ("infty", "infin"):
            self._emit("const", "∞")
        elif name in ("circ", "degree"):
            self._emit("op", "°")
        elif name in ("mid", "vert", "|"):
            self._emit("bar", "|")
        elif name in ("mathbb", "Bbb", "mathcal"):
            self._number_set()
        elif name in ("land", "wedge", "lor", "vee"):
            self._emit("sep", "and" if name in ("land", "wedge") else "or")
        elif name in FUNCTIONS:
            self._emit("func", name)
        elif name in GREEK:
            self._greek(name)
        elif name in ("overline", "bar") and _CONJUGATE.match(self.text, self.position):
            self._emit("func", "conj")
        elif name in _IGNORED or name in _WRAPPERS:
            self.spaced = True
        elif name in "%":
            self._emit("op", "%")
        elif name in "$":
            self._emit("money", "dollar")
        elif name in ("pounds", "euro"):
            self._emit("money", "sterling" if name == "pounds" else "euro")
        elif name in ("over", "choose"):
            self._emit("infix", name)
        elif name in _SHAPES:
            self._emit("name", _SHAPES[name])
        elif name in ("hspace", "vspace", "phantom", "color", "label"):
            skipped = _SKIP.match(self.text, self.position)
            self.position = skipped.end() if skipped else self.position
            self.spaced = True
        elif name in ",;: !>()[] \n\t":
            self.spaced = name != "!" or self.spaced
        else:
            raise SyntaxFault(f"command \\{name}")

    def _number_set(self) -> None:
        match = re.compile(r"\s*\{?\s*([A-Za-z])\s*\}?").match(self.text, self.position)
        if match is None:
            raise SyntaxFault("\\mathbb without a letter")
        self.position = match.end()
        self._emit("const", {"R": "ℝ", "Z": "ℤ", "Q": "ℚ", "N": "ℕ", "C": "ℂ"}.get(match.group(1), match.group(1)))

    def _environment(self, which: str) -> None:
        match = re.compile(r"\s*\{([a-zA-Z*]+)\}(?:\{[clr|@\s]*\})?").match(self.text, self.position)
        if match is None or not re.fullmatch(r"[pbvBV]?(?:small)?matrix|array", match.group(1)):
            raise SyntaxFault("environment")
        self.position = match.end()
        self._emit(which, match.group(1))

    def _text_argument(self, name: str) -> None:
        start = self.text.index("{", self.position)
        depth, end = 0, start
        for end in range(start, len(self.text)):
            depth += (self.text[end] == "{") - (self.text[end] == "}")
            if depth == 0:
                break
        if depth:
            raise SyntaxFault("unclosed \\text")
        content = self.text[start + 1 : end].strip()
        if name == "operatorname" and content in FUNCTIONS:
            self._emit("func", content)
        elif name.startswith("math") and len(content) == 1 and content.isalpha():
            self._emit("name", content)
        else:
            self.position = start + 1
            self._run(end, in_text=True)
        self.position = end + 1
        self.spaced = True
