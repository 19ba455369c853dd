r"""Which part of a completion is its answer.

In this order: nothing inside <think> counts; the last <answer>…</answer>; the last \boxed{…} (boxes joined only by commas,
"and", "or" are one list); the text after the last `####`; after the last "the answer is"; and in prose without any of
these the last formula or what follows the last "is"/"=". All scans are linear in the text.
"""

from __future__ import annotations

import re

from rewards.words import NOT_A_NOUN

MAX_COMPLETION = 2_000_000
_TAIL = 4_000
"""Characters at the end of untagged prose that are searched for an answer."""
_TAGS = re.compile(r"</?(?:think|answer)>")
_STOP = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>|</s>")
_PHRASE = re.compile(
    r"(?:final\s+answer|the\s+(?:correct\s+|final\s+|right\s+)?(?:answer|solution|result|choice|option)|\banswer)\b"
    r"(?:\s+is)?\s*(?:therefore|thus|simply|just)?\s*\**\s*[:=]?\s*\**\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?:\s+[A-Z\[]|\s*$)|\n|\s+I hope")
_IS = re.compile(
    r"(?:\b(?:is|are|be|equals?|it's|was)\s*:?|=)\s++"
    r"(?!not\b|(?:the|our|my|a)\s+(?:final\s+|correct\s+)?(?:solution|answer|result|domain|range)\b)"
)
_MATH = re.compile(r"\$\$(.{1,2000}?)\$\$|\$([^$]{1,2000})\$|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL)
_JOIN = re.compile(
    r"(?:\s|[,;$.]|[a-z](?:_\{?\d\}?)? ?=|\\[,;: ]|\\q?quad|\\\(|\\\)|\\text\{|\}|\band\b|\bor\b|for part \([a-z]\)|\\\[|\\\])*", re.IGNORECASE
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|\s(\w+))")
_LIST_JOIN = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*", re.IGNORECASE)


def _visible(text: str) -> str | None:
    """The text less its chain of thought; the inside of the last <answer> where there is one; None for an open one."""
    if "<" not in text:
        return text
    pieces, inside, start, answer, answer_start = [], False, 0, None, None
    for tag in _TAGS.finditer(text):
        name = tag.group()
        if name == "<think>":
            if not inside:
                pieces.append(text[start : tag.start()])
            inside, answer_start = True, None
        elif name == "</think>":
            if not inside:
                pieces, answer = [], None  # the prompt had opened it
            inside, start, answer_start = False, tag.end(), None
        elif name == "<answer>" and not inside:
            answer_start = tag.end()
        elif name == "</answer>" and answer_start is not None:
            answer, answer_start = text[answer_start : tag.start()], None
    if answer is not None:
        return answer
    if inside:
        return "".join(pieces) if any(piece.strip() for piece in pieces) else None
    if answer_start is not None:
        return None
    return "".join(pieces) + text[start:]


def _close(text: str, start: int) -> int:
    """Index after the brace that closes the one before `start`, −1 if there is none."""
    depth, index = 1, start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        index += 1
        if depth == 0:
            return index
    return -1


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every closed top-level \boxed{…} or \fbox{…}; at most the last 64."""
    found = []
    end = 0
    starts, place = [], len(text)
    while len(starts) < 64 and (place := max(text.rfind("\\boxed", 0, place), text.rfind("\\fbox", 0, place))) >= 0:
        starts.append(place)
    for start in reversed(starts):
        match = _BOX.match(text, start)
        if match is None or start < end:
            continue
        if match.group(1):
            found.append((match.start(), match.end(), match.group(1)))
            end = match.end()
            continue
        closed = _close(text, match.end())
        if closed > 0:
            found.append((match.start(), closed, text[match.end() : closed - 1]))
            end = closed
    return found


def _boxed(text: str) -> str | None:
    found = boxes(text)
    if not found:
        return None
    group = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : group[0][0]]
        if len(between) > 80 or not re.search(r",|;|\band\b|\bor\b", between) or not _JOIN.fullmatch(between):
            break
        group.insert(0, box)
    joiner = " or " if len(group) > 1 and re.search(r"\bor\b", text[group[0][1] : group[-1][0]]) else ", "
    return joiner.join(box[2] for box in group)


def _sentence(text: str) -> str:
    match = _SENTENCE_END.search(text)
    return text[: match.start()] if match else text


def answer_span(text: str) -> str | None:
    """The answer's text (unparsed, stripped), None where there is none."""
    if len(text) > MAX_COMPLETION:
        return None
    visible = _visible(text)
    if visible is None:
        return None
    stop = _STOP.search(visible)
    if stop and visible[: stop.start()].strip():
        visible = visible[: stop.start()]
    span = _marked(visible)
    span = visible if span is None else span
    return span.strip() or None


def answer_text(text: str) -> str | None:
    """The answer as it was written: all of the last <answer>…</answer>, line breaks too; without tags like `answer_span`."""
    visible = _visible(text) if len(text) <= MAX_COMPLETION else None
    if visible is None or "<answer>" not in text:
        return answer_span(text)
    return visible.strip() or None


def _marked(text: str) -> str | None:
    if "\\boxed" in text or "\\fbox" in text:
        boxed = _boxed(text)
        if boxed is not None:
            return boxed
    if "####" in text:
        head, *rest = [line.strip() for line in text.rsplit("####", 1)[1].split("\n") if line.strip()] or [""]
        return rest[0] if rest and _PHRASE.fullmatch(head) else head
    phrase = _last_phrase(text)
    return None if phrase is None else _after_phrase(text, phrase)


def _last_phrase(text: str) -> int | None:
    """End of the last "the answer is" that something follows."""
    tail = max(0, len(text) - _TAIL)
    last = None
    for match in _PHRASE.finditer(text, tail):
        follows = text[match.end() :].strip(" .*$\n")
        stated = match.group().rstrip(" \n*").endswith((":", "=", "is")) or "**" in match.group() or _is_heading(text, match)
        if follows and (stated or _direct(text, match)):
            last = match.end()
    return last


def _is_heading(text: str, match: re.Match[str]) -> bool:
    """`Answer` alone on a line, perhaps after `#` marks."""
    start, phrase = text.rfind("\n", 0, match.start()) + 1, match.group()
    return "\n" in phrase and not text[start : match.start()].strip(" #*\t")


def _direct(text: str, match: re.Match[str]) -> bool:
    """`Answer $ 9 $`: the phrase opens the text or line, and a formula follows."""
    if text[: match.start()].strip():
        return False
    follows = text[match.end() :].lstrip()[:1]
    return follows.isdigit() or follows in ("$", "\\", "(")


def _after_phrase(text: str, start: int) -> str:
    sentence = _sentence(text[start : start + 2_000])
    in_prose = re.search(r"\s(?:is|are)\s", sentence) or ("=" not in sentence and _MATH.search(sentence))
    inner = prose_candidate(sentence) if in_prose else None
    return inner if inner is not None else sentence


def sole_number(text: str) -> str | None:
    """The only number in a sentence of at least three words none of which qualifies it ("so she sold 72 clips")."""
    text = text.replace("\\$", "$")
    if len(text) > 400 or "\\" in text:
        return None
    found = re.findall(r"[$€£]?-?\d[\d,]*(?:\.\d+)?%?", text)
    letters = re.findall(r"[^\W\d_]+(?:'\w+)?", text.lower())
    if len(found) != 1 or len(letters) < 3 or NOT_A_NOUN.intersection(letters) or re.search(r"[=<>^/*+!?_|]", text):
        return None
    return found[0].rstrip(",")


def prose_candidate(text: str) -> str | None:
    """The answer in running text: the last formula, or what follows the last "is" or "=", whichever ends later."""
    text = text[-_TAIL:].strip()
    best: tuple[int, str] | None = None
    end = 0
    for match in _MATH.finditer(text):
        content = next(group for group in match.groups() if group is not None)
        joiner = _LIST_JOIN.fullmatch(text, end, match.start()) if best else None
        best = (best[0], f"{best[1]}{joiner.group()}{content}") if best and joiner else (match.start(), content)
        end = match.end()
    sentence = text.rstrip(" .")
    for match in _IS.finditer(sentence):
        rest = sentence[match.end() :]
        if rest.strip() and len(rest) <= 200 and (best is None or match.end() > best[0]):
            best = (match.end(), _sentence(rest))
    if best is None or not best[1].strip():
        return None
    return best[1].strip()
