"""Intervals, unions and inequalities as one normal form: a sorted tuple of pieces of the real line."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cmp_to_key

from rewards.exact import exact, is_scalar, scalars_equal, sign, symbols
from rewards.tree import (
    Add,
    Call,
    Collection,
    Mul,
    Node,
    Number,
    Quantity,
    Relation,
    SetOperation,
    Symbol,
    TooLarge,
    Undefined,
    divide,
    negate,
)

INFINITY = Symbol("∞")
MINUS_INFINITY = negate(INFINITY)
_FLIP = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}


@dataclass(frozen=True, slots=True)
class Piece:
    """From low to high; `low_in`, `high_in` say whether the ends belong to it."""

    low: Node
    low_in: bool
    high: Node
    high_in: bool


def infinite(node: Node) -> int:
    """1 for ∞, −1 for −∞, else 0."""
    if node == INFINITY:
        return 1
    if isinstance(node, Mul) and INFINITY in node.factors and len(node.factors) == 2:
        other = node.factors[0] if node.factors[1] == INFINITY else node.factors[1]
        return sign(other) or 0
    return 0


def _strip(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node


def _bound(node: Node) -> Node | None:
    node = _strip(node)
    direction = infinite(node)
    if direction:
        return INFINITY if direction > 0 else MINUS_INFINITY
    return node if is_scalar(node) and sign(node) is not None else None


def compare(left: Node, right: Node) -> int:
    """−1, 0, 1 of two bounds."""
    a, b = infinite(left), infinite(right)
    if a or b:
        return (a > b) - (a < b)
    if left == right or scalars_equal(left, right):
        return 0
    return sign(Add((left, negate(right)))) or 0


def _merge(pieces: list[Piece]) -> tuple[Piece, ...]:
    kept = []
    for piece in pieces:
        order = compare(piece.low, piece.high)
        if order < 0 or (order == 0 and piece.low_in and piece.high_in):
            kept.append(piece)
    kept.sort(key=cmp_to_key(lambda a, b: compare(a.low, b.low) or (b.low_in - a.low_in)))
    merged: list[Piece] = []
    for piece in kept:
        if merged:
            last = merged[-1]
            order = compare(last.high, piece.low)
            if order > 0 or (order == 0 and (last.high_in or piece.low_in)):
                farther = compare(piece.high, last.high)
                if farther > 0:
                    merged[-1] = Piece(last.low, last.low_in, piece.high, piece.high_in)
                elif farther == 0:
                    merged[-1] = Piece(last.low, last.low_in, last.high, last.high_in or piece.high_in)
                continue
        merged.append(piece)
    return tuple(merged)


def _complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    result, low, low_in = [], MINUS_INFINITY, False
    for piece in pieces:
        result.append(Piece(low, low_in, piece.low, not piece.low_in and not infinite(piece.low)))
        low, low_in = piece.high, not piece.high_in and not infinite(piece.high)
    result.append(Piece(low, low_in, INFINITY, False))
    return _merge(result)


def _intersect(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return _complement(_merge([*_complement(left), *_complement(right)]))


REALS = (Piece(MINUS_INFINITY, False, INFINITY, False),)
MAX_PIECES = 64


def real_set(node: Node) -> tuple[tuple[Piece, ...], Node | None] | None:
    """(pieces, the variable it was written in or None), None where `node` is no set of reals."""
    if node == Symbol("ℝ"):
        return REALS, None
    if isinstance(node, Relation):
        return _of_relation(node)
    if isinstance(node, SetOperation):
        left, right = pieces_of(node.left), pieces_of(node.right)
        if left is None or right is None:
            return None
        if node.operator == "∪":
            return _merge([*left, *right]), None
        return _intersect(left, right if node.operator == "∩" else _complement(right)), None
    if isinstance(node, Collection) and node.brackets == "" and len(node.items) <= MAX_PIECES:
        return _of_alternatives(node)
    if isinstance(node, Collection) and len(node.items) == 2 and node.brackets and node.brackets != "{}":
        low, high = (_bound(item) for item in node.items)
        if low is None or high is None or compare(low, high) >= 0:
            return None
        return (Piece(low, node.brackets[0] == "[" and not infinite(low), high, node.brackets[1] == "]" and not infinite(high)),), None
    return None


def pieces_of(node: Node) -> tuple[Piece, ...] | None:
    """The pieces of a set that may be finite; None where `node` is no set of reals."""
    if isinstance(node, Collection) and node.brackets in ("{}", "") and len(node.items) <= MAX_PIECES and not _has_relation(node):
        points = [_bound(item) for item in node.items]
        if any(point is None or infinite(point) for point in points):
            return None
        return _merge([Piece(point, True, point, True) for point in points if point is not None])
    found = real_set(node)
    return None if found is None or len(found[0]) > MAX_PIECES else found[0]


def _has_relation(node: Collection) -> bool:
    return any(isinstance(item, Relation) for item in node.items)


def _of_alternatives(node: Collection) -> tuple[tuple[Piece, ...], Node | None] | None:
    """Inequalities in one variable; a comma means "and" where both can hold at once, else "or"."""
    sets: list[tuple[Piece, ...]] = []
    variables: list[Node | None] = []
    for item in node.items:
        found = real_set(item) if isinstance(item, Relation) else None
        if found is None:
            return None
        sets.append(found[0])
        variables.append(found[1])
    if not sets or any(variable != variables[0] for variable in variables) or all(_is_equation(item) for item in node.items):
        return None
    both = sets[0]
    for pieces in sets[1:]:
        both = _intersect(both, pieces)
    if node.joiner == "and" or (node.joiner == "," and both):
        return (both, variables[0]) if both else None
    return _merge([piece for pieces in sets for piece in pieces]), variables[0]


def _is_equation(node: Node) -> bool:
    return isinstance(node, Relation) and set(node.operators) == {"="}


def _of_relation(node: Relation) -> tuple[tuple[Piece, ...], Node | None] | None:
    terms = [_strip(term) for term in node.terms]
    if node.operators == ("∈",):
        found = pieces_of(terms[1])
        return None if found is None or not is_scalar(terms[0]) else (found, terms[0])
    variables = [index for index, term in enumerate(terms) if _bound(term) is None]
    if len(variables) != 1 or not set(node.operators) <= set(_FLIP) or ("=" in node.operators and len(terms) > 2):
        return None
    place = variables[0]
    unknown = terms[place]
    result, variable = REALS, unknown
    for index, operator in enumerate(node.operators):
        if place not in (index, index + 1):
            if compare(terms[index], terms[index + 1]) != {"<": -1, ">": 1}.get(operator, 0):
                return None
            continue
        bound = terms[index + 1] if index == place else terms[index]
        solved = _solutions(unknown, operator if index == place else _FLIP[operator], bound)
        if solved is None:
            return None
        variable, pieces = solved
        result = _intersect(result, pieces)
    return result, variable


def _solutions(unknown: Node, operator: str, bound: Node) -> tuple[Node, tuple[Piece, ...]] | None:
    """(variable, pieces) of unknown operator bound; |u| < b is two rays."""
    if isinstance(unknown, Call) and unknown.name == "abs" and symbols(unknown) and len(unknown.arguments) == 1:
        low, high = (_solve(unknown.arguments[0], direction, limit) for direction, limit in ((_FLIP[operator], negate(bound)), (operator, bound)))
        if low is None or high is None or infinite(bound) or compare(bound, Number(Fraction(0))) < 0:
            return None
        pieces, others = _ray(*low[1:]), _ray(*high[1:])
        inside = operator in "<≤≠"
        return low[0], _intersect(pieces, others) if inside else _merge([*pieces, *others])
    solved = _solve(unknown, operator, bound)
    return None if solved is None else (solved[0], _ray(*solved[1:]))


def _ray(operator: str, value: Node) -> tuple[Piece, ...]:
    if operator in "≠=":
        point = () if infinite(value) else (Piece(value, True, value, True),)
        return point if operator == "=" else _complement(point)
    if operator in "<≤":
        return _merge([Piece(MINUS_INFINITY, False, value, operator == "≤" and not infinite(value))])
    return _merge([Piece(value, operator == "≥" and not infinite(value), INFINITY, False)])


def _solve(unknown: Node, operator: str, bound: Node) -> tuple[Node, str, Node] | None:
    """unknown operator bound, for a variable, a function value, or a linear expression in one variable."""
    if isinstance(unknown, Symbol | Call):
        return unknown, operator, bound
    if not is_scalar(unknown) or infinite(bound):
        return None
    names = symbols(unknown)
    if len(names) != 1:
        return None
    (name,) = names
    variable = Symbol(name)
    try:
        samples = [exact(unknown, {name: Fraction(x)}) for x in (0, 1, 7)]
    except (TooLarge, Undefined):
        return None
    constant, at_one, at_seven = samples
    if constant is None or at_one is None or at_seven is None:
        return None
    slope = at_one - constant
    if slope == 0 or constant + 7 * slope != at_seven:
        return None
    value = divide(Add((bound, Number(-constant))), Number(slope))
    return variable, operator if slope > 0 else _FLIP[operator], value


def sets_equal(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> bool:
    """Piece by piece; both are merged and sorted."""
    return len(left) == len(right) and all(
        a.low_in == b.low_in and a.high_in == b.high_in and compare(a.low, b.low) == 0 and compare(a.high, b.high) == 0 for a, b in zip(left, right)
    )
