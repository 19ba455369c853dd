"""The text of an answer → its tree: cleaning, choice letters, the parser, and what is left when it fails.

Tried in order: the whole span as maths; the answer inside its prose; the only number of a sentence; short text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from rewards import extract
from rewards.latex import Parser
from rewards.numerals import cardinal, ordinal
from rewards.tokens import SyntaxFault, Tokenizer, translate
from rewards.tree import EMPTY_SET, Collection, Node, Number, Quantity, Symbol, Text

_SET_BUILDER = re.compile(r"(?:\\left)?\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)(.{1,500}?)(?:\\right)?\\\}")
_REALS = frozenset({"all real numbers", "all reals", "the real numbers", "the set of all real numbers", "the set of real numbers"})
_NO_ELEMENTS = frozenset({"empty set", "the empty set", "null set", "the null set"})
_EXCEPT = re.compile(r"(?:x is )?(?:all|any|every) real (?:numbers?|values?)(?: of)?(?: x)?,? (?:except|other than|but|besides)(?: for)?\s+(.{1,80})")
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*:?\s*)?\(?\s*\\?(?:text|textbf|mathrm)?\{?\(?([A-Z])\)?\}?\s*\)?[.:]?", re.IGNORECASE)
_CLEAN = [
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?"), "°"),
    (re.compile(r"°\s*(?:\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|[CF]\b)"), "°"),
    (re.compile(r"\{([-+=,])\}"), r"\1"),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"^(?:hence|thus|so|therefore|then|finally|consequently)\b[,:]?\s+(?=\S)", re.IGNORECASE), ""),
    (re.compile(r"\\(?:left|right)\s*\."), " "),
    (re.compile(r"\{:\}|\\colon"), ":"),
    (re.compile(r"\\n(?![A-Za-z])"), " "),
    (re.compile(r"(?<=[\d}])\s*\\?\$\s*$|^\s*\\?\$\s*(?=[\d.])(?=[^$]*$)"), " ¤ "),
    (re.compile(r"\\begin\{(?:align|equation|aligned|gather)\*?\}|\\end\{(?:align|equation|aligned|gather)\*?\}|\\\[|\\\]|\\\(|\\\)"), " "),
    (re.compile(r"(?<=\d)\s*\^?\s*\{?(?:\\(?:text|mathrm|textrm)\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}*"), r"\\text{th}"),
    (re.compile(r"^(['\"`])([^'\"`]*)\1$"), r"\2"),
    (re.compile(r"\\q?quad(?=[A-Za-z])"), " "),
    (re.compile(r"\b(sq|cu|ft|in|yd|mi|lbs?|oz|hrs?|mins?|secs?|rs|Rs)\.(?=\s|$)"), r"\1"),
    (re.compile(r"(?<![\w)}\]])\*\*(?=\S[^*]*\*\*)|(?<=\S)\*\*(?![\w({\[\\. -])|(?<=\S)\*\*\s*$"), ""),
]


def _clean(span: str) -> str:
    text = translate(span.strip())
    text = text.replace("\\$", "¤").replace("\\%", "%").replace("\\#", "")
    if text.count("$") % 2 == 0 and "$" in text:
        text = text.replace("$", " ")
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text.endswith("..") or text.startswith("~"):  # an unfinished list, "about"
        raise SyntaxFault("not one value")
    return text.rstrip(".,;:").rstrip()


@lru_cache(maxsize=4096)
def parse_span(span: str, thousands: bool = True) -> Node | None:
    """The tree of an answer's text, None where it is not understood; `thousands=False` reads `12,345` as two numbers."""
    node = _parse_maths(span, thousands)
    if node is None or _is_wordy(node):
        for part in (extract.prose_candidate(span), extract.sole_number(span)):
            inner = None if part is None or part == span else _parse_maths(part, thousands)
            if inner is not None and not _is_wordy(inner):
                return inner
    if node is None:
        node = _as_text(span)
    return _meaning(node) if isinstance(node, Text) else node


def _meaning(node: Text) -> Node:
    """Text that names a number or a set."""
    value, place = cardinal(node.words), ordinal(node.words)
    if place is not None:
        return Quantity(Number(Fraction(place)), "th")
    if value is not None:
        return Number(value)
    return EMPTY_SET if node.words in _NO_ELEMENTS else Symbol("ℝ") if node.words in _REALS else node


def _is_wordy(node: Node) -> bool:
    """A sentence, not an answer in words."""
    items = node.items if isinstance(node, Collection) else (node,)
    words = [word for item in items if isinstance(item, Text) for word in item.words.split()]
    return len(words) > 3 or (len(words) > 2 and bool({"is", "are"}.intersection(words)))


def _parse_maths(span: str, thousands: bool) -> Node | None:
    choice = _CHOICE.fullmatch(span.strip())
    if choice and (choice.group(1).isupper() or span.strip()[1:2]) and not choice.group(1).islower():
        return Symbol(choice.group(1).upper())
    builder = _SET_BUILDER.fullmatch(span.strip(" $"))
    if builder:
        span = builder.group(1)
    others = _EXCEPT.fullmatch(_normal_text(span)) if "xcept" in span or "real" in span else None
    if others:
        span = rf"\mathbb{{R}} \setminus \{{{re.sub(r'^x *(?:=|is)', '', others.group(1))}\}}"
    try:
        tokens = Tokenizer(_clean(span), thousands=thousands).tokens()
        return Parser(tokens).parse() if tokens else None
    except SyntaxFault:
        return None


def _as_text(span: str) -> Text | None:
    words = _normal_text(span)
    if not re.search(r"[a-z]", words) or "\\" in words or len(words) > 200:
        return None
    return Text(words)


def _normal_text(span: str) -> str:
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textit|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", span.replace("$", ""))
    text = re.sub(r"\\(?:left|right|[,;!: ])", " ", text)
    return " ".join(text.split()).strip(" .,;:!\"'*").lower()
