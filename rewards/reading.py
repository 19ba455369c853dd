"""The text of an answer → its tree: cleaning, choice letters, the parser, and what is left when it fails.

Tried in order: the whole span as maths; the answer inside its prose; the only number of a sentence; short text.
"""

from __future__ import annotations

import re
from functools import lru_cache

from rewards import extract
from rewards.latex import Parser
from rewards.tokens import SyntaxFault, Tokenizer, translate
from rewards.tree import Node, Number, Symbol, Text
from rewards.words import NUMBER_WORDS

_SET_BUILDER = re.compile(r"(?:\\left)?\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)(.{1,500}?)(?:\\right)?\\\}")
_REALS = ("all real numbers", "all reals", r"\text{all real numbers}")
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*:?\s*)?\(?\s*\\?(?:text|textbf|mathrm)?\{?\(?([A-Z])\)?\}?\s*\)?[.:]?", re.IGNORECASE)
_CLEAN = [
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?"), "°"),
    (re.compile(r"°\s*[CF]\b"), "°"),
    (re.compile(r"\\(?:left|right)\s*\."), " "),
    (re.compile(r"\{:\}|\\colon"), ":"),
    (re.compile(r"\\n(?![A-Za-z])"), " "),
    (re.compile(r"(?<=[\d}])\s*\\?\$\s*$|^\s*\\?\$\s*(?=[\d.])(?=[^$]*$)"), " ¤ "),
    (re.compile(r"\\begin\{(?:align|equation|aligned|gather)\*?\}|\\end\{(?:align|equation|aligned|gather)\*?\}|\\\[|\\\]|\\\(|\\\)"), " "),
    (re.compile(r"(?<=\d)(?:st|nd|rd|th)\b"), r"\\text{th}"),
    (re.compile(r"\\q?quad(?=[A-Za-z])"), " "),
    (re.compile(r"\*\*(?=\S[^*]*\*\*)|(?<=\S)\*\*\s*$"), ""),
]


def _clean(span: str) -> str:
    text = translate(span.strip())
    text = text.replace("\\$", "¤").replace("\\%", "%").replace("\\#", "")
    if text.count("$") % 2 == 0 and "$" in text:
        text = text.replace("$", " ")
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,;:").rstrip()


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
    if isinstance(node, Text) and node.words in NUMBER_WORDS:
        return Number(NUMBER_WORDS[node.words])
    return node


def _is_wordy(node: Node) -> bool:
    return isinstance(node, Text) and len(node.words.split()) > 3


def _parse_maths(span: str, thousands: bool) -> Node | None:
    choice = _CHOICE.fullmatch(span.strip())
    if choice and (choice.group(1).isupper() or span.strip()[1:2]) and not choice.group(1).islower():
        return Symbol(choice.group(1).upper())
    builder = _SET_BUILDER.fullmatch(span.strip(" $"))
    if builder:
        span = builder.group(1)
    if span.lower().strip(" .$") in _REALS:
        return Symbol("ℝ")
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
