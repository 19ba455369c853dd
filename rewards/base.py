"""What a reward function is: the sample it sees, the three signatures it may have, the outcome it gives.

    TRL    fn(prompts, completions, **columns) -> list[float | None]              called once for a whole group
    verl   fn(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": float, …}
    ours   fn(prompt, completion, answer, **meta) -> float | None | Score

Each may be `async def`. The signature is found by parameter names; arguments a function does not name are only passed to
one that takes **keywords. No torch, no grpo here: workers import this module and start fast.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Style = Literal["trl", "verl", "own"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a function of our signature may return besides a number: `value` None leaves the sample out of its group."""

    value: float | None
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion with its problem. `columns` are the row's other columns (`question`, `num_tokens`, … among them)."""

    prompt: str
    completion: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of one function on one sample.

    `fault` is None, or why there is no value: `timeout`, `crash` (the worker died), `raised`, `value` (NaN, wrong type or
    length). `detail` is a traceback's last line."""

    value: float | None = None
    answer: str | None = None
    fault: str | None = None
    detail: str = ""


class RewardFunction(Protocol):
    """Any of the three signatures."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def last_line(error: BaseException) -> str:
    """The line of a traceback that people read."""
    lines = traceback.format_exception_only(type(error), error)
    return " ".join(lines[-1].split())[:500] if lines else repr(error)


def detect_style(name: str, function: Callable[..., Any]) -> tuple[Style, frozenset[str], bool]:
    """(signature, parameter names, whether it takes **keywords).

    Raises:
        ValueError: none of the three signatures.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name}: its signature cannot be read ({last_line(error)})") from error
    names = frozenset(parameters)
    keywords = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if {"solution_str", "ground_truth"} <= names:
        return "verl", names, keywords
    if "completions" in names:
        return "trl", names, keywords
    if "completion" in names:
        return "own", names, keywords
    raise ValueError(
        f"reward {name}: parameters ({', '.join(parameters)}) fit none of fn(prompts, completions, **columns), "
        "fn(data_source, solution_str, ground_truth, extra_info=None), fn(prompt, completion, answer, **meta)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A loaded function with the keyword arguments of its configuration."""

    name: str
    function: Callable[..., Any]
    style: Style
    parameters: frozenset[str]
    keywords: bool
    arguments: Mapping[str, Any]

    def one(self, sample: Sample) -> Outcome:
        """Call a function of verl's or our signature."""
        columns = dict(sample.columns)
        if self.style == "verl":
            given = {"data_source": str(columns.get("data_source", "")), "solution_str": sample.completion, "ground_truth": sample.answer,
                     "extra_info": columns["extra_info"] if isinstance(columns.get("extra_info"), dict) else columns}  # fmt: skip
        else:
            given = {**columns, "prompt": sample.prompt, "completion": sample.completion, "answer": sample.answer}
        result, failure = self._call(given)
        return failure if failure is not None else _outcome(result)

    def many(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Call a function of TRL's signature once for all samples."""
        shared = set(samples[0].columns).intersection(*(sample.columns for sample in samples))
        given: dict[str, Any] = {name: [sample.columns[name] for sample in samples] for name in shared}
        given["prompts"] = [sample.prompt for sample in samples]
        given["completions"] = [sample.completion for sample in samples]
        given["answer"] = [sample.answer for sample in samples]
        result, failure = self._call(given)
        if failure is not None:
            return [failure] * len(samples)
        try:
            values = list(result)
        except TypeError:
            detail = f"TypeError: expected a list of {len(samples)} numbers, got {type(result).__name__}"
            return [Outcome(fault="value", detail=detail)] * len(samples)
        if len(values) != len(samples):
            return [Outcome(fault="value", detail=f"ValueError: returned {len(values)} values for {len(samples)} completions")] * len(samples)
        return [_outcome(value) for value in values]

    def _call(self, given: dict[str, Any]) -> tuple[Any, Outcome | None]:
        if not self.keywords:
            given = {name: value for name, value in given.items() if name in self.parameters}
        try:
            result = self.function(**{**given, **self.arguments})
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
        except Exception as error:  # noqa: BLE001 (user code; the failure travels as a value)
            return None, Outcome(fault="raised", detail=last_line(error))
        return result, None


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _outcome(result: Any) -> Outcome:
    answer = None
    if isinstance(result, Score):
        result, answer = result.value, result.answer
    elif isinstance(result, Mapping):
        answer = None if result.get("pred") is None else str(result["pred"])
        if "score" not in result:
            return Outcome(fault="value", detail=f"KeyError: the returned dict has no 'score' (keys: {sorted(map(str, result))})")
        result = result["score"]
    if result is None:
        return Outcome(answer=answer)
    try:
        value = float(result)
    except (TypeError, ValueError) as error:
        return Outcome(fault="value", detail=last_line(error))
    if not math.isfinite(value):
        return Outcome(fault="value", detail=f"ValueError: the reward is {value}")
    return Outcome(value=value, answer=answer)
