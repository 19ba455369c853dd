"""Binary reward for tasks of the package `reasoning-gym` (optional extra), without those of its scorers that evaluate text.

A row names its task, configuration and index (grpo/gym_data.py made it); the entry is built again here, with all of its
metadata. How an answer is judged, decided once per task by reading the scorer's source:

    countdown, puzzle24            our own checker: any right expression counts
    algebra tasks whose scorer     equality with the entry's answer as mathematics
      evaluates text
    other such tasks, and those    equality with one of the entry's answers: the same text up to white space and quotes, or the
      without a scorer, yes/no       same number
    any other                      the package's scorer; its partial credit counts as 0

What is left out: curricula and composite tasks.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from functools import lru_cache
from typing import Any, Literal

from rewards import countdown, extract
from rewards.base import Score
from rewards.math_equal import equivalent, parse
from rewards.tree import Number

_EVALUATES = re.compile(
    r"(?<![\w_])(?:eval|exec|compile|__import__|sympify|nsimplify|simplify|parse_expr|parse_latex|lambdify|Poly)\s*\("
    r"|\b(?:sp|sympy)\.\w+\s*\(|\bpickle\.|\bos\.system|\bsubprocess\."
)
_YES_OR_NO = frozenset({"true", "false", "yes", "no"})
Judge = Literal["countdown", "mathematics", "text", "package"]


def dataset(task: str, configuration: str) -> Any:
    """The package's dataset; `configuration` is a JSON object of its settings.

    Raises:
        ValueError: no such task, or settings it does not take.
    """
    return _dataset(task, configuration)


@lru_cache(maxsize=32)
def _dataset(task: str, configuration: str) -> Any:
    package: Any = importlib.import_module("reasoning_gym")
    known: Any = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        raise ValueError(f"reasoning-gym has no task {task!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    try:
        return package.create_dataset(task, **json.loads(configuration))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym task {task} with {configuration}: {' '.join(str(error).split()) or type(error).__name__}") from error


@lru_cache(maxsize=4096)
def _entry(task: str, configuration: str, index: int) -> dict[str, Any]:
    return _dataset(task, configuration)[index]


@lru_cache(maxsize=256)
def judge(task: str, configuration: str) -> Judge:
    """How answers to a task are judged."""
    if task in ("countdown", "puzzle24"):
        return "countdown"
    scorer = type(_dataset(task, configuration)).score_answer
    if scorer.__qualname__.startswith("ProceduralDataset."):
        return "text"
    if not _EVALUATES.search(_sources(type(_dataset(task, configuration)), scorer)):
        return "package"
    return "mathematics" if ".algebra." in scorer.__module__ else "text"


def _sources(owner: type, scorer: Any) -> str:
    """Source text of a scorer and of every method and function of its module that it names, however far away."""
    module: Any = inspect.getmodule(scorer)
    package = module.__name__.partition(".")[0]
    texts, waiting, seen = [], [scorer], set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        texts.append(inspect.getsource(function))
        for name in set(re.findall(r"\b\w+\b", texts[-1])):
            for found in (getattr(owner, name, None), getattr(module, name, None)):
                if inspect.isfunction(found) and found.__module__.startswith(package):
                    waiting.append(found)
    return "\n".join(texts)


def is_right(task: str, configuration: str, index: int, answer: str) -> bool:
    """Whether `answer` solves entry `index` of a task."""
    entry = _entry(task, configuration, index)
    gold, how = str(entry["answer"]), judge(task, configuration)
    if how == "countdown":
        metadata = entry["metadata"]
        return countdown.solves(answer, metadata["numbers"], metadata["target"] if task == "countdown" else 24)
    valid = entry["metadata"].get("valid_answers") or [gold]
    if any(_plain(answer) == _plain(str(other)) for other in valid):
        return True
    if how == "mathematics":
        return equivalent(gold, answer)
    if how == "text" or gold.lower() in _YES_OR_NO:  # some scorers take any text for True
        left, right = parse(gold), parse(answer)
        return isinstance(left, Number) and left == right
    try:
        return float(_dataset(task, configuration).score_answer(answer=answer, entry=entry)) >= 1.0
    except Exception:  # noqa: BLE001 (the package's scorers raise whatever they like on odd text)
        return False


def _plain(text: str) -> str:
    """Without quotes, with single spaces, none beside brackets and commas; True and true are the same."""
    words = re.sub(r"\s*([\[\](),])\s*", r"\1", " ".join(re.sub(r"[\"'`]", "", text).split()))
    return words.lower() if words.lower() in _YES_OR_NO else words


def reasoning_gym(
    completion: str,
    gym_task: str | None = None,
    gym_config: str = "{}",
    gym_index: int | None = None,
    prefilled: bool = False,
    **_: Any,
) -> Score:
    """1 where the completion's answer solves its row's task, else 0; None for a row that is none of reasoning-gym's."""
    answer = extract.answer_text("<think>" + completion if prefilled else completion)
    if gym_task is None or gym_index is None:
        return Score(value=None, answer=answer)
    return Score(value=float(answer is not None and is_right(gym_task, gym_config, int(gym_index), answer)), answer=answer)
