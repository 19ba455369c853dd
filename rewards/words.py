"""Words that answers carry: units, number scales, connectives, and short words that are no product of variables."""

from __future__ import annotations

import re
from fractions import Fraction


def word_set(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


_UNIT_SPELLINGS = {
    "m": "meter meters metre metres m",
    "cm": "centimeter centimeters centimetre centimetres cm cms",
    "mm": "millimeter millimeters millimetre millimetres mm",
    "km": "kilometer kilometers kilometre kilometres km kms",
    "in": "inch inches in",
    "ft": "foot feet ft",
    "yd": "yard yards yd yds",
    "mi": "mile miles mi",
    "g": "gram grams g",
    "kg": "kilogram kilograms kg kgs kilo kilos",
    "mg": "milligram milligrams mg",
    "lb": "pound pounds lb lbs",
    "oz": "ounce ounces oz",
    "ton": "ton tons tonne tonnes",
    "s": "second seconds sec secs s",
    "min": "minute minutes min mins",
    "h": "hour hours hr hrs h",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "l": "liter liters litre litres l",
    "ml": "milliliter milliliters millilitre millilitres ml",
    "gal": "gallon gallons gal",
    "quart": "quart quarts",
    "cup": "cup cups",
    "dollar": "dollar dollars usd bucks",
    "cent": "cent cents",
    "euro": "euro euros eur",
    "sterling": "gbp",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "mph": "mph",
    "kph": "kph kmh",
    "am": "am",
    "pm": "pm",
    "unit": "unit units",
    "th": "th",
    "yen": "yen",
    "rupee": "rupee rupees",
}
UNITS: dict[str, str] = {spelling: unit for unit, spellings in _UNIT_SPELLINGS.items() for spelling in spellings.split()}

_DERIVED = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1))}

SCALES: dict[str, Fraction] = {
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
    "dozen": Fraction(12),
}

SIGNS = {"negative": -1, "minus": -1, "positive": 1, "plus": 1}
"""Words for a sign, before a number."""

PERCENT = frozenset({"percent", "percents", "percentage", "pct"})

NOT_A_NOUN = word_set(
    "not or and to is are was minus plus times over than nor either neither but if unless isn't approximately about around nearly "
    "almost roughly half halves third thirds quarter quarters squared cubed factorial remainder mod modulo base zero one two three four five "
    "six seven eight nine ten none nothing no never maybe perhaps wrong incorrect between except without more less fewer greater equals equal "
    "through until from negative positive false true sqrt root pi infinity"
)
"""Words after a number that change what it says; with one of them the answer is not `number + unit`."""

SHORT_WORDS = word_set(
    "yes no odd the not one two six ten men day cow cat dog red any all his her its are was has had can may see sum set few old new "
    "boy bus car pen egg box bag hat cup pie jar toy bed job mile am pm is it of to in on at as by an or and for per if so be he we us do go "
    "sq cu deg usd eur gbp inr rs mr ms mrs dr vs "
    "null nan zoo jan feb mar apr jun jul aug sep oct nov dec mon tue wed thu fri sat sun tie win man ant bee fox hen pig elk ape"
)
"""Runs of two or three letters that are words; other short runs are products of variables (`xy`, `abc`)."""

CONNECTIVES = {"and": "and", "or": "or"}


_MONTHS = "january february march april may june july august september october november december"
_SHORT_MONTHS = {month[:3]: month for month in _MONTHS.split()} | {"sept": "september"}
_ARTICLES = frozenset({"a", "an", "the"})
_PLACE = re.compile(r"(\d) ?(?:st|nd|rd|th)\b")


def plain_words(text: str) -> str:
    """Lower-case words without a leading article, with whole names of months and plain numbers of days."""
    found = _PLACE.sub(r"\1", text).replace(" solutions", " solution").split()
    found = found[1:] if len(found) > 1 and found[0] in _ARTICLES else found
    return " ".join(_SHORT_MONTHS.get(word.rstrip("."), word) for word in found)


def units_agree(left: str, right: str) -> bool:
    """Equal, or both called pounds."""
    return left == right or {left, right} == {"lb", "sterling"}


def canonical_unit(parts: list[tuple[str, int]]) -> str:
    """`[("cm", 2)]` → "cm^2"; sorted, so that the order of writing does not matter."""
    powers: dict[str, int] = {}
    for name, power in parts:
        for base, exponent in _DERIVED.get(name, ((name, 1),)):
            powers[base] = powers.get(base, 0) + exponent * power
    return "·".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power)
