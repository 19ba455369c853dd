"""Language consistency: the share of words of the chain of thought in the target language's script.

LaTeX, code and numbers are removed first; every Han, kana or Hangul character counts as one word. By script alone two
languages that share one (English, German) cannot be told apart.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

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


def _thought(completion: str) -> str:
    start = completion.find("<think>")
    end = completion.find("</think>")
    return completion[start + 7 if start >= 0 else 0 : end if end >= 0 else len(completion)]


def language_share(completion: str, language: str = "en", **_: Any) -> float:
    """Share of words in `language`'s script, 0 to 1; 1 (neutral) where there are fewer than ten words to judge.

    Raises:
        ValueError: an unknown language.
    """
    scripts = _SCRIPTS.get(language)
    if scripts is None:
        raise ValueError(f"language {language!r} is not one of {', '.join(sorted(_SCRIPTS))}")
    words = [piece for piece in _PIECES.findall(_REMOVED.sub(" ", _thought(completion)[:_MAX_TEXT])) if len(piece) > 1 or not piece.isascii()]
    if len(words) < _MIN_WORDS:
        return 1.0
    return sum(unicodedata.name(word[0], "").startswith(scripts) for word in words) / len(words)
