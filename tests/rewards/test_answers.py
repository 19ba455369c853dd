"""Labelled answers of every kind that people give (answers.txt): each verdict, in both orders."""

import random
from pathlib import Path

from rewards.math_equal import equivalent

CASES = Path(__file__).with_name("answers.txt")


def cases() -> list[tuple[bool, str, str, str]]:
    """(equal, kind, gold, answer) of every line."""
    found, kind = [], ""
    for line in CASES.read_text(encoding="utf-8").split("\n"):
        if line.startswith("[") and line.endswith("]"):
            kind = line[1:-1]
        elif line[:2] in ("= ", "≠ "):
            gold, _, answer = line[2:].replace("⏎", "\n").partition(" ⇒")
            found.append((line[0] == "=", kind, gold, answer.removeprefix(" ")))
    return found


def test_every_labelled_answer_gets_its_verdict_in_both_orders() -> None:
    known = cases()
    assert len(known) > 1400
    wrong = [case for case in known if {equivalent(case[2], case[3]), equivalent(case[3], case[2])} != {case[0]}]
    assert not wrong, "\n".join(map(repr, wrong))


def test_damaged_answers_raise_nothing_and_get_symmetric_verdicts() -> None:
    draw = random.Random(1)
    texts = [text for _, _, *pair in cases() for text in pair if len(text) <= 200]
    pieces = [
        *"0123456789.,+-*/^_!%$()[]{}|<>=:;xyie \\'~",
        r"\frac",
        r"\sqrt",
        r"\pi",
        r"\text{",
        r"\pm",
        " or ",
        "∞",
        "²",
        r"\over ",
        r"\overline",
        "€",
    ]
    for _ in range(4_000):
        text = draw.choice(texts)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(text) + 1)
            inserted = draw.choice([draw.choice(pieces), draw.choice(texts)[:20], ""])
            text = text[:place] + inserted + text[place + draw.choice([0, 0, 1, 3]) :]
        other = draw.choice([draw.choice(texts), text + draw.choice(pieces)])
        assert equivalent(other, text) == equivalent(text, other), (other, text)
