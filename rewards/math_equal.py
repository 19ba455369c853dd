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

from rewards import extract
from rewards.exact import children, exact, is_scalar, near, rough_value, scalars_equal, symbols
from rewards.reading import parse_span
from rewards.realset import infinite, pieces_of, real_set, sets_equal
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
from rewards.words import UNITS, plain_words, units_agree

_PLAIN_NUMBER = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?")
_STYLED_LETTER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?([A-J])[.)]?\s*\}")
_MAX_ITEMS = 200
_NUMBER_SETS = frozenset("ℝℤℚℕℂ")


def equivalent(gold: str, prediction: str) -> bool:
    """Whether `prediction` states the same answer as `gold`; each a bare answer or a whole completion.

    Never raises for any text; an answer that cannot be understood equals only the same text.
    """
    if gold == prediction and _PLAIN_NUMBER.fullmatch(gold):
        return True
    left, right = extract.answer_span(gold), extract.answer_span(prediction)
    if left is None or right is None or len(left) > MAX_TEXT or len(right) > MAX_TEXT:
        return False
    return spans_equal(left, right)


def parse(text: str) -> Expression | None:
    """The answer in `text` as a tree, None where there is none or it is not understood."""
    span = extract.answer_span(text)
    return None if span is None or len(span) > MAX_TEXT else parse_span(span)


def spans_equal(left: str, right: str) -> bool:
    """`equivalent` of two answer spans."""
    if left == right:
        return bool(re.search(r"\w", left) or parse_span(left) is not None)
    a, b = parse_span(left), parse_span(right)
    if a is None or b is None:
        return _same_source(left, right)
    if _equal(a, b) or _same_source(left, right):
        return True
    if _chosen(left, b) or _chosen(right, a):
        return True
    return _ambiguous(left, right, a, b) or _ambiguous(right, left, b, a)


def _same_source(left: str, right: str) -> bool:
    """The same characters up to white space and sizing commands."""
    a, b = (re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\(?:left|right|[,;!: ])|\$|\.$", "", text) for text in (left, right))
    return a == b and bool(re.search(r"\w", a))


def _chosen(text: str, letter: Node) -> bool:
    """`B) 12` where the other side is the letter B."""
    text = _STYLED_LETTER.sub(r"(\1) ", text)
    option = re.match(r"\(?([A-J])(?:\)|[.:]\s)\s*\S", text)
    return option is not None and letter == Symbol(option.group(1))


def _ambiguous(left: str, right: str, a: Node, b: Node) -> bool:
    """`100,200` may be a list where the other side is one; `1000,99` may be a decimal comma."""
    if isinstance(b, Collection) and isinstance(a, Number | Quantity) and "," in left:
        other = parse_span(left, thousands=False)
        return other is not None and isinstance(other, Collection) and _equal(other, b)
    if isinstance(a, Collection) and is_scalar(b) and re.fullmatch(r"-?(?:\d{4,},\d{1,2}|0,\d{3,})", left.strip()):
        return scalars_equal(Number(Fraction(left.strip().replace(",", "."))), b)
    return False


def _equal(left: Node, right: Node) -> bool:
    if left == right:
        return True
    if not isinstance(left, SetOperation) and not isinstance(right, SetOperation):
        left, right = _alone(left), _alone(right)
    if isinstance(left, Relation) or isinstance(right, Relation):
        return _relations_equal(left, right)
    if isinstance(left, Quantity) or isinstance(right, Quantity):
        return _quantities_equal(left, right)
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


def _alone(node: Node) -> Node:
    """The only element of a set, where it is a number or a tuple: {5} is the list 5; and `15 1/2 or 31/2` is one number."""
    if isinstance(node, Collection) and node.brackets == "{}" and len(node.items) == 1:
        (item,) = node.items
        if is_scalar(item) or (isinstance(item, Collection) and item.brackets == "()"):
            return item
    if isinstance(node, Collection) and node.brackets == "" and node.joiner == "or" and len(node.items) <= _MAX_ITEMS:
        first, *others = node.items
        if is_scalar(first) and all(_equal(first, other) for other in others):
            return first
    return node


def _texts_equal(left: Node, right: Node) -> bool:
    def words(node: Node) -> str | None:
        if isinstance(node, Text):
            return plain_words(node.words)
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
    if unit is None:
        value, unit = _letter_unit(value, other_unit)
    if other_unit is None:
        other, other_unit = _letter_unit(other, unit)
    if unit and other_unit and not units_agree(unit, other_unit):
        return False
    return _equal(value, other)


def _letter_unit(value: Node, unit: str | None) -> tuple[Node, str | None]:
    """A factor that can be read as the other side's unit: `5 m` beside `5\\text{ m}`; a degree sign always."""
    if isinstance(value, Mul) and isinstance(value.factors[-1], Symbol):
        name = value.factors[-1].name
        if name == "°":
            return value, "degree"
        if unit and UNITS.get(name) == unit and len(value.factors) == 2:
            return value.factors[0], unit
    return value, None


def is_label(node: Node) -> bool:
    """A name that an answer is given to: x, f(x), AB, |AB|, (x, y), V_1:V_2, "area"."""
    if isinstance(node, Text):
        return True
    if isinstance(node, Symbol):
        return node.name not in "∞πei°"
    if isinstance(node, Mul | Call):
        return all(is_label(child) or (isinstance(child, Number) and isinstance(node, Call)) for child in children(node))
    if isinstance(node, Collection):
        return node.brackets in ("()", "") and all(is_label(item) for item in node.items)
    if isinstance(node, Ratio):
        return all(is_label(term) for term in node.terms)
    return isinstance(node, Quantity) and is_label(node.value)


def _unlabelled(node: Node) -> Node | None:
    """`x = 3` → 3, `x ∈ S` → S, `6·3 = 18` → 18 (a sum that is right); None for other nodes."""
    if not isinstance(node, Relation):
        return None
    if node.operators == ("∈",) and is_label(node.terms[0]):
        return node.terms[1]
    if set(node.operators) != {"="}:
        return None
    first, last = node.terms[0], node.terms[-1]
    named = is_label(first) or (len(node.terms) > 2 and is_scalar(first) and bool(symbols(first)))  # a + b = 2 + 3 = 5
    steps = node.terms[1:] if named else node.terms
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
    if not all(isinstance(node, Collection | SetOperation | Relation) or node == Symbol("ℝ") for node in (left, right)):
        return False
    if isinstance(left, SetOperation) or isinstance(right, SetOperation):
        c, d = pieces_of(left), pieces_of(right)
        return c is not None and d is not None and sets_equal(c, d) and not _named_apart(left, right)
    a, b = real_set(left), real_set(right)
    if a is None or b is None:
        return False
    if a[1] is not None and b[1] is not None and a[1] != b[1]:
        return False
    return sets_equal(a[0], b[0])


def _named_apart(left: Node, right: Node) -> bool:
    """Both are conditions, on different variables."""
    a, b = (found[1] if (found := real_set(node)) is not None else None for node in (left, right))
    return a is not None and b is not None and a != b


def _union_parts(node: Node) -> tuple[Node, ...]:
    if isinstance(node, SetOperation) and node.operator == "∪":
        return (*_union_parts(node.left), *_union_parts(node.right))
    return (node,)


def _conditions(items: Sequence[Node]) -> bool:
    """Equations or inequalities, of which all or any may have to hold."""
    return len(items) > 1 and all(isinstance(item, Relation) for item in items)


def _domainless(node: Node) -> Node | None:
    """`π/4 + kπ, k ∈ ℤ` → `π/4 + kπ`; None where nothing is said of the parameter."""
    if isinstance(node, Collection) and node.brackets == "" and len(node.items) > 1:
        *items, last = node.items
        if isinstance(last, Relation) and last.operators == ("∈",) and isinstance(last.terms[1], Symbol) and last.terms[1].name in _NUMBER_SETS:
            return items[0] if len(items) == 1 else Collection("", tuple(items), node.joiner)
    return None


def _collections_equal(left: Node, right: Node) -> bool:
    a, b = _domainless(left), _domainless(right)
    if (a is None) != (b is None):
        return _equal(left if a is None else a, right if b is None else b)
    if isinstance(left, Collection) and isinstance(right, Collection):
        if left.brackets in ("", "{}") and right.brackets in ("", "{}"):
            a, b = _plain_items(left), _plain_items(right)
            if max(len(a), len(b)) > _MAX_ITEMS:
                return False
            if left.joiner != right.joiner and "or" in (left.joiner, right.joiner) and _conditions(a) and _conditions(b):
                return _sets_equal(left, right)
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
    relations = [item for item in node.items if isinstance(item, Relation) and item.operators == ("=",) and is_label(item.terms[0])]
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
    kept: list[tuple[Node, complex | None]] = []
    for item in items:
        rough = _rough(item)
        if not any(near(rough, other_rough) and _equal(item, other) for other, other_rough in kept):
            kept.append((item, rough))
    return [item for item, _ in kept]


def _rough(node: Node) -> complex | None:
    """A value that tells numbers apart at once, None where there is none."""
    value = node.value if isinstance(node, Quantity) else node
    return rough_value(value) if is_scalar(value) else None


def _label_root(node: Node) -> object:
    """x_1 and x_2 are names of the same unknown."""
    return node.name.split("_")[0] if isinstance(node, Symbol) else node


def _same_items(left: Sequence[Node], right: Sequence[Node]) -> bool:
    """Equality as multisets."""
    rest = [(other, _rough(other)) for other in right] if len(right) > 3 else [(other, None) for other in right]
    for item in left:
        rough = _rough(item) if len(right) > 3 else None
        for index, (other, other_rough) in enumerate(rest):
            if near(rough, other_rough) and _equal(item, other):
                del rest[index]
                break
        else:
            return False
    return not rest
