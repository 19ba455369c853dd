"""Language consistency: the share of words of the chain of thought that are in the target language.

LaTeX, code and numbers are removed first; every Han, kana, Hangul or Thai character counts as one word. Two ways to tell:

    detector="script"      by Unicode script alone, without a dependency; languages that share one (English, German) look alike
    detector="py3langid"   besides, each stretch of at least ten words must be recognised as the language (extra `language`)
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from functools import lru_cache
from typing import Any, Literal

_SCRIPTS: dict[str, tuple[str, ...]] = {
    "en": ("LATIN",), "de": ("LATIN",), "fr": ("LATIN",), "es": ("LATIN",), "it": ("LATIN",), "pt": ("LATIN",), "vi": ("LATIN",),
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ko": ("HANGUL",), "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "ar": ("ARABIC",),
    "fa": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "el": ("GREEK",), "th": ("THAI",), "bn": ("BENGALI",),
}  # fmt: skip
_MIN_WORDS = 10
_MAX_TEXT = 200_000
_REMOVED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*|<[^<>\n]{0,40}>|https?://\S+", re.DOTALL
)
_PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]|[^\W\d_]+")
_SENTENCE = re.compile(r"(?<=[.!?。！？\n])")


def _thought(completion: str) -> str:
    start = completion.find("<think>")
    end = completion.find("</think>")
    return completion[start + 7 if start >= 0 else 0 : end if end >= 0 else len(completion)]


def language_share(completion: str, language: str = "en", detector: Literal["script", "py3langid"] = "script", **_: Any) -> float:
    """Share of words in `language`, 0 to 1; 1 (neutral) where there are fewer than ten words to judge.

    Raises:
        ValueError: an unknown language or detector, or py3langid is not installed.
    """
    scripts = _SCRIPTS.get(language)
    if scripts is None:
        raise ValueError(f"language {language!r} is not one of {', '.join(sorted(_SCRIPTS))}")
    if detector not in ("script", "py3langid"):
        raise ValueError(f"detector {detector!r} is neither script nor py3langid")
    text = _REMOVED.sub(" ", _thought(completion)[:_MAX_TEXT])
    total = matching = 0
    for stretch, words in _stretches(text) if detector == "py3langid" else [(text, _words(text))]:
        total += len(words)
        if detector == "script" or len(words) < _MIN_WORDS or _detect(stretch) == language:
            matching += sum(unicodedata.name(word[0], "").startswith(scripts) for word in words)
    return 1.0 if total < _MIN_WORDS else matching / total


def _words(text: str) -> list[str]:
    return [piece for piece in _PIECES.findall(text) if len(piece) > 1 or not piece.isascii()]


def _stretches(text: str) -> list[tuple[str, list[str]]]:
    """Sentences, short ones put together until they have words enough to be recognised; a short rest goes to the last."""
    found: list[tuple[str, list[str]]] = []
    pending, count = "", 0
    for sentence in _SENTENCE.split(text):
        pending, count = pending + sentence, count + len(_words(sentence))
        if count >= _MIN_WORDS:
            found.append((pending, _words(pending)))
            pending, count = "", 0
    if count and found:
        last = found.pop()[0] + pending
        found.append((last, _words(last)))
    elif count:
        found.append((pending, _words(pending)))
    return found


def _detect(text: str) -> str:
    return str(_identifier().classify(text)[0])


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid, restricted to the languages we know: unrestricted it takes short Chinese for other languages."""
    try:
        detector: Any = importlib.import_module("py3langid")
    except ImportError as error:
        raise ValueError("detector py3langid is not installed: pip install -e '.[language]' (in the checkout of nsa-grpo)") from error
    detector.set_languages(sorted(_SCRIPTS))
    return detector
