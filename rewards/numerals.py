"""English numerals: "twenty-five", "one million", "negative seven", "three fourths", "sixth" → their values.

Only whole phrases of such words; a phrase with any other word has no value.
"""

from __future__ import annotations

from fractions import Fraction

from rewards.words import SCALES

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
CARDINALS: dict[str, int] = {word: number for number, word in enumerate(_UNITS.split())} | {
    word: 10 * number for number, word in enumerate(_TENS.split(), start=2)
}
_IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
ORDINALS: dict[str, int] = {
    _IRREGULAR.get(word, word[:-1] + "ieth" if word.endswith("y") else word + "th"): number for word, number in CARDINALS.items() if number
} | {"hundredth": 100, "thousandth": 1000}
_PARTS = {f"{word}s": number for word, number in ORDINALS.items() if number > 2} | {"halves": 2, "quarters": 4}
_PART = {word: number for word, number in ORDINALS.items() if number > 2} | {"half": 2, "quarter": 4}
_MAX_WORDS = 16


def cardinal(phrase: str) -> Fraction | None:
    """The value of a numeral in lower case; None for anything else."""
    words = phrase.replace("-", " ").split()
    if not 0 < len(words) <= _MAX_WORDS:
        return None
    if words[0] in ("negative", "minus"):
        value = _positive(words[1:])
        return None if value is None else -value
    return _positive(words)


def ordinal(phrase: str) -> int | None:
    """6 for "sixth", 23 for "twenty-third"; None for anything else."""
    words = phrase.replace("-", " ").split()
    if len(words) == 1:
        return ORDINALS.get(words[0])
    if len(words) == 2 and CARDINALS.get(words[0], 0) >= 20 and ORDINALS.get(words[1], 10) < 10:
        return CARDINALS[words[0]] + ORDINALS[words[1]]
    return None


def _positive(words: list[str]) -> Fraction | None:
    if len(words) > 1 and (words[-1] in _PARTS or words[-1] in _PART):
        top = _whole(words[:-1])
        bottom = _PARTS.get(words[-1]) if top != 1 else _PART.get(words[-1])
        return None if top is None or bottom is None else Fraction(top, bottom)
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _whole(words: list[str]) -> int | None:
    """Sum of groups below a thousand, each before its scale."""
    total = group = 0
    last = 0
    seen = False
    for word in words:
        if word == "and" and last >= 100:
            continue
        if word in ("a", "an") and not seen:
            group, last = 1, 1
        elif word in CARDINALS:
            number = CARDINALS[word]
            if seen and not (last >= 100 or (20 <= last < 100 and 0 < number < 10)):
                return None
            group, last = group + number, number
        elif word == "hundred" and 0 < group < 100:
            group, last = group * 100, 100
        elif word in SCALES and word not in ("hundred", "dozen") and group:
            total, group, last = total + group * int(SCALES[word]), 0, 1000
        else:
            return None
        seen = True
    return total + group if seen and words[-1] not in ("and", "a", "an") else None
