r"""Whether two answers are mathematically the same: `equivalent(gold, prediction)`.

    python -c 'from rewards.math_equal import equivalent; print(equivalent(r"\frac{1}{2}", "<answer>0.5</answer>"))'

Text → answer span (extract.py) → tokens → tree (latex.py) → comparison. Conventions: bare comma lists and sets are
unordered, parentheses are ordered, bracket kinds matter, units, currency and degree signs may be left out but must not
contradict each other, exact forms (1/2, 0.5, 50%) are equal, rounded decimals are not, alternatives ("17 or 18") equal
neither. Left out on purpose: solving, and any evaluation of model text as code. Symmetric by construction: every rule is
applied to both orders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from rewards import extract
from rewards.exact import children, exact, is_scalar, scalars_equal, symbols
from rewards.latex import Parser
from rewards.realset import infinite, real_set, sets_equal
from rewards.tokens import SyntaxFault, Tokenizer, translate
from rewards.tree import (
    MAX_TEXT,
    Add,
    Call,
    Collection,
    Expression,
    Matrix,
    Mul,
    Node,
    Number,
    Quantity,
    Ratio,
    Relation,
    SetOperation,
    Symbol,
    Text,
    TooLarge,
    Undefined,
    negate,
)
from rewards.words import NUMBER_WORDS

_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?")
_MAX_ITEMS = 200
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*:?\s*)?\(?\s*\\?(?:text|textbf|mathrm)?\{?\(?([A-Z])\)?\}?\s*\)?[.:]?", re.IGNORECASE)


def equivalent(gold: str, prediction: str) -> bool:
    """Whether `prediction` states the same answer as `gold`; each a bare answer or a whole completion.

    Never raises for any text; an answer that cannot be understood equals only the same text.
    """
    if gold == prediction and _PLAIN_NUMBER.fullmatch(gold):
        return True
    left, right = extract.answer_span(gold), extract.answer_span(prediction)
    if left is None or right is None or len(left) > MAX_TEXT or len(right) > MAX_TEXT:
        return False
    return _spans_equal(left, right)


def parse(text: str) -> Expression | None:
    """The answer in `text` as a tree, None where there is none or it is not understood."""
    span = extract.answer_span(text)
    return None if span is None or len(span) > MAX_TEXT else _parse_span(span)


def cluster(answers: Sequence[str | None]) -> list[int]:
    """Class numbers by equivalence, in order of first appearance; −1 for None and blank (they never vote).

    Rational values are matched by value; the rest is compared with one representative of each class. A quantity with a
    unit joins the class of its value, where the units do not contradict.
    """
    classes: list[int] = []
    by_text: dict[str, int] = {}
    by_value: dict[tuple[Fraction, str], int] = {}
    representatives: list[str] = []
    for answer in answers:
        span = None if answer is None else extract.answer_span(answer)
        if span is None or len(span) > MAX_TEXT:
            classes.append(-1)
            continue
        text = _normal_text(span)
        number = by_text.get(text)
        if number is None:
            key = _value_key(span)
            number = by_value.get(key) if key is not None else None
            if number is None:
                number = next((index for index, other in enumerate(representatives) if _comparable(key, other) and _spans_equal(other, span)), None)
            if number is None:
                number = len(representatives)
                representatives.append(span)
            by_text[text] = number
            if key is not None:
                by_value.setdefault(key, number)
        classes.append(number)
    return classes


def _comparable(key: tuple[Fraction, str] | None, other: str) -> bool:
    """Two different unit-free rationals need no comparison."""
    other_key = _value_key(other)
    return key is None or other_key is None or key[0] == other_key[0]


def _value_key(span: str) -> tuple[Fraction, str] | None:
    node = _parse_span(span)
    unit = ""
    while isinstance(node, Quantity | Relation):
        if isinstance(node, Quantity):
            unit, node = node.unit, node.value
        elif node.operators == ("=",) and _is_label(node.terms[0]):
            node = node.terms[1]
        else:
            return None
    if node is None or not is_scalar(node):
        return None
    try:
        value = exact(node)
    except (Undefined, TooLarge):
        return None
    return None if value is None else (value, unit)


# text → tree

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
def _parse_span(span: str, thousands: bool = True) -> Node | None:
    """The whole span as an answer; failing that, the answer in its prose; failing that, short text."""
    node = _parse_maths(span, thousands)
    if node is not None and not _is_wordy(node):
        return node
    candidate = extract.prose_candidate(span)
    if candidate is not None and candidate != span:
        inner = _parse_maths(candidate, thousands)
        if inner is not None and not _is_wordy(inner):
            return inner
    if node is None or _is_wordy(node):
        sole = extract.sole_number(span)
        if sole is not None:
            return _parse_maths(sole, thousands)
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


# comparison


def _spans_equal(left: str, right: str) -> bool:
    if left == right:
        return bool(re.search(r"\w", left) or _parse_span(left) is not None)
    a, b = _parse_span(left), _parse_span(right)
    if a is None or b is None:
        return _same_source(left, right)
    if _equal(a, b) or _same_source(left, right):
        return True
    return _ambiguous(left, right, a, b) or _ambiguous(right, left, b, a)


def _same_source(left: str, right: str) -> bool:
    """The same characters up to white space and sizing commands."""
    a, b = (re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\(?:left|right|[,;!: ])|\$|\.$", "", text) for text in (left, right))
    return a == b and bool(re.search(r"\w", a))


def _ambiguous(left: str, right: str, a: Node, b: Node) -> bool:
    """`100,200` may be a list where the other side is one; `1000,99` may be a decimal comma."""
    if isinstance(b, Collection) and isinstance(a, Number | Quantity) and "," in left:
        other = _parse_span(left, thousands=False)
        return other is not None and isinstance(other, Collection) and _equal(other, b)
    if isinstance(a, Collection) and is_scalar(b) and re.fullmatch(r"-?(?:\d{4,},\d{1,2}|0,\d{3,})", left.strip()):
        return scalars_equal(Number(Fraction(left.strip().replace(",", "."))), b)
    return False


def _equal(left: Node, right: Node) -> bool:
    if left == right:
        return True
    if isinstance(left, Quantity) or isinstance(right, Quantity):
        return _quantities_equal(left, right)
    if isinstance(left, Relation) or isinstance(right, Relation):
        return _relations_equal(left, right)
    if isinstance(left, Collection) or isinstance(right, Collection):
        return _collections_equal(left, right)
    if isinstance(left, SetOperation) or isinstance(right, SetOperation):
        return _sets_equal(left, right)
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        return (len(left.rows), len(left.rows[0])) == (len(right.rows), len(right.rows[0])) and all(
            _equal(a, b) for row, other in zip(left.rows, right.rows) for a, b in zip(row, other)
        )
    if isinstance(left, Text) or isinstance(right, Text):
        return _texts_equal(left, right)
    if isinstance(left, Ratio) and isinstance(right, Ratio):
        same_minutes = left.written == right.written or len(left.written) == len(right.written) or not (left.written + right.written).isdigit()
        return same_minutes and len(left.terms) == len(right.terms) and all(_equal(a, b) for a, b in zip(left.terms, right.terms))
    if infinite(left) or infinite(right):
        return infinite(left) == infinite(right)
    if is_scalar(left) and is_scalar(right):
        return scalars_equal(left, right)
    return False


def _texts_equal(left: Node, right: Node) -> bool:
    def words(node: Node) -> str | None:
        if isinstance(node, Text):
            return node.words
        factors = node.factors if isinstance(node, Mul) else (node,)
        letters = [factor.name for factor in factors if isinstance(factor, Symbol)]
        return "".join(letters).lower() if len(letters) == len(factors) else None

    a, b = words(left), words(right)
    return a is not None and a == b


def _quantities_equal(left: Node, right: Node) -> bool:
    value, unit = (left.value, left.unit) if isinstance(left, Quantity) else (left, None)
    other, other_unit = (right.value, right.unit) if isinstance(right, Quantity) else (right, None)
    if isinstance(value, Text) or isinstance(other, Text):
        return False
    unit, other_unit = _with_degree(value, unit), _with_degree(other, other_unit)
    if unit and other_unit and unit != other_unit:
        return False
    return _equal(value, other)


def _with_degree(value: Node, unit: str | None) -> str | None:
    return "degree" if unit is None and isinstance(value, Mul) and value.factors[-1] == Symbol("°") else unit


def _is_label(node: Node) -> bool:
    """A name that an answer is given to: x, f(x), AB, |AB|, (x, y), V_1:V_2, "area"."""
    if isinstance(node, Text):
        return True
    if isinstance(node, Symbol):
        return node.name not in "∞πei°"
    if isinstance(node, Mul | Call):
        return all(_is_label(child) or isinstance(child, Number) and isinstance(node, Call) for child in children(node))
    if isinstance(node, Collection):
        return node.brackets in ("()", "") and all(_is_label(item) for item in node.items)
    if isinstance(node, Ratio):
        return all(_is_label(term) for term in node.terms)
    return isinstance(node, Quantity) and _is_label(node.value)


def _unlabelled(node: Node) -> Node | None:
    """`x = 3` → 3, `x ∈ S` → S, `6·3 = 18` → 18 (a sum that is right); None for other nodes."""
    if not isinstance(node, Relation):
        return None
    if node.operators == ("∈",) and _is_label(node.terms[0]):
        return node.terms[1]
    if set(node.operators) != {"="}:
        return None
    first, last = node.terms[0], node.terms[-1]
    steps = node.terms[1:] if _is_label(first) else node.terms
    if len(steps) > 1 and isinstance(steps[0], Number):
        return None
    if all(_equal(step, last) for step in steps[:-1]):
        return last
    return None


def _relations_equal(left: Node, right: Node) -> bool:
    if isinstance(left, Relation) and isinstance(right, Relation):
        return _both_relations(left, right)
    relation, other = (left, right) if isinstance(left, Relation) else (right, left)
    value = _unlabelled(relation)
    if value is not None and _equal(value, other):
        return True
    if isinstance(other, Collection) and other.brackets == "" and len(other.items) > 1 and all(isinstance(item, Relation) for item in other.items):
        return _sets_equal(relation, other)
    return (isinstance(other, Collection | SetOperation) or other == Symbol("ℝ")) and _sets_equal(relation, other)


def _both_relations(left: Relation, right: Relation) -> bool:
    for a, b in ((left, right), (left, _reversed(right))):
        if a.operators == b.operators and len(a.terms) == len(b.terms) and all(_equal(x, y) for x, y in zip(a.terms, b.terms)):
            return True
    if _sets_equal(left, right):
        return True
    return len(left.operators) == 1 and len(right.operators) == 1 and _proportional(left, right)


def _reversed(node: Relation) -> Relation:
    flip = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
    return Relation(node.terms[::-1], tuple(flip.get(operator, operator) for operator in node.operators[::-1]))


def _proportional(left: Relation, right: Relation) -> bool:
    """a = b and c = d describe the same curve if (a − b)/(c − d) is a constant; for inequalities its sign counts."""
    operator, other = left.operators[0], right.operators[0]
    sides = [*left.terms, *right.terms]
    if not all(is_scalar(side) for side in sides):
        return False
    difference, other_difference = (Add((node.terms[0], negate(node.terms[1]))) for node in (left, right))
    names = symbols(difference)
    if not names or names != symbols(other_difference):
        return False
    point = {name: Fraction(3 + 2 * index, 7 + index) for index, name in enumerate(sorted(names))}
    try:
        a, b = exact(difference, point), exact(other_difference, point)
    except (Undefined, TooLarge):
        return False
    if a is None or b is None:
        return operator == other == "=" and (scalars_equal(difference, other_difference) or scalars_equal(difference, negate(other_difference)))
    if a == 0 or b == 0:
        return False
    flipped = _reversed(right).operators[0] if a * b < 0 else other
    return operator == flipped and scalars_equal(difference, Mul((Number(a / b), other_difference)))


def _sets_equal(left: Node, right: Node) -> bool:
    if isinstance(left, SetOperation) and isinstance(right, SetOperation) and left.operator == right.operator == "∪":
        a, b = _union_parts(left), _union_parts(right)
        if len(a) == len(b) and _same_items(a, b):
            return True
    a, b = real_set(left), real_set(right)
    if a is None or b is None:
        return False
    if a[1] is not None and b[1] is not None and a[1] != b[1]:
        return False
    return sets_equal(a[0], b[0])


def _union_parts(node: Node) -> tuple[Node, ...]:
    if isinstance(node, SetOperation) and node.operator == "∪":
        return (*_union_parts(node.left), *_union_parts(node.right))
    return (node,)


def _collections_equal(left: Node, right: Node) -> bool:
    if isinstance(left, Collection) and isinstance(right, Collection):
        if left.brackets in ("", "{}") and right.brackets in ("", "{}"):
            a, b = _plain_items(left), _plain_items(right)
            if max(len(a), len(b)) > _MAX_ITEMS:
                return False
            if len(a) != len(b):
                a, b = _distinct(a), _distinct(b)
            return (len(a) == len(b) and _same_items(a, b)) or _sets_equal(left, right)
        named, other = (left, right) if left.brackets == "" else (right, left)
        values = _named_values(named)
        if values is not None and other.brackets == "()":
            return len(values) == len(other.items) and all(_equal(a, b) for a, b in zip(values, other.items))
        if left.brackets == right.brackets:
            return len(left.items) == len(right.items) and all(_equal(a, b) for a, b in zip(left.items, right.items))
    return _sets_equal(left, right)


def _plain_items(node: Collection) -> tuple[Node, ...]:
    """Items without the name they all share: `x=-2 or x=5` → −2, 5; `n=1, 2, 3` → 1, 2, 3."""
    relations = [item for item in node.items if isinstance(item, Relation) and item.operators == ("=",) and _is_label(item.terms[0])]
    if not relations or len({_label_root(item.terms[0]) for item in relations}) > 1:
        return node.items
    if len(relations) < len(node.items) and (relations[0] is not node.items[0] or len(relations) > 1):
        return node.items
    return tuple(item.terms[1] if isinstance(item, Relation) else item for item in node.items)


def _named_values(node: Collection) -> tuple[Node, ...] | None:
    """`x=3, y=4` → (3, 4), by the names' alphabet; None for other lists."""
    values = {}
    for item in node.items:
        if not (isinstance(item, Relation) and item.operators == ("=",) and isinstance(item.terms[0], Symbol)):
            return None
        values[item.terms[0].name] = item.terms[1]
    return tuple(values[name] for name in sorted(values)) if len(values) == len(node.items) > 1 and node.brackets == "" else None


def _distinct(items: Sequence[Node]) -> list[Node]:
    """Items less repetitions of an earlier one."""
    kept: list[Node] = []
    for item in items:
        if not any(_equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _label_root(node: Node) -> object:
    """x_1 and x_2 are names of the same unknown."""
    return node.name.split("_")[0] if isinstance(node, Symbol) else node


def _same_items(left: Sequence[Node], right: Sequence[Node]) -> bool:
    """Equality as multisets."""
    rest = list(right)
    for item in left:
        for index, other in enumerate(rest):
            if _equal(item, other):
                del rest[index]
                break
        else:
            return False
    return not rest
