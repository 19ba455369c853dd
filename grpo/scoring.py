"""Groups → scores: the rewards of the configuration, run in killable workers while the next group is sampled.

    with Scorer(config.rewards, prefilled=config.prompt.prefill_think) as scorer:
        for group, scores in scorer.score(engine.generate(prompts, sampling)):
            ...

Groups come back in the order in which they were given. Truncated completions are scored like all others. Left out: the
functions themselves and the processes (rewards/), advantages (advantages.py).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpo.config import RewardsSection
from grpo.data_types import Completion, Group, Prompt, Score
from rewards.base import Outcome, Sample
from rewards.compose import combine
from rewards.extract import answer_span
from rewards.pool import FunctionSpec, WorkerPool


class Problem(Protocol):
    """What `check` needs of a row; grpo.data.Row and Prompt have it."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One reward on one sample row, whose completion states the gold answer. `fault` is None or says what went wrong."""

    name: str
    value: float | None
    fault: str | None
    question: str
    seconds: float


class Scorer:
    """The rewards of a run. Safe to call from any thread; `close` it, or use it as a context manager.

    Args:
        prefilled: the prompt ends with `<think>`. save_dir: folder for samples that hung or killed a worker.

    Raises:
        ValueError: a reward cannot be loaded.
    """

    def __init__(self, section: RewardsSection, *, prefilled: bool, save_dir: str | Path | None = None) -> None:
        self.section = section
        self.prefilled = prefilled
        self.weights = {spec.name: spec.weight for spec in section.functions}
        self._left_out = 0
        self._lock = threading.Lock()
        self._reported: Counter[str] = Counter()
        self._pool = WorkerPool(
            [FunctionSpec(name=spec.name, arguments=spec.arguments, deadline_s=spec.deadline_s) for spec in section.functions],
            workers=section.workers,
            deadline_s=section.deadline_s,
            memory_mb=section.memory_mb,
            save_dir=save_dir,
            context={"prefilled": prefilled},
        )
        self._wants_ids = any("completion_ids" in parameters for parameters in self._pool.parameters)

    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]:
        """Yield every group with its scores, in order; scoring goes on while the next group is drawn from `groups`."""
        waiting: deque[tuple[Group, Future[list[list[Outcome]]]]] = deque()
        for group in groups:
            waiting.append((group, self._pool.submit([self._sample(group.prompt, completion) for completion in group.completions])))
            while waiting and waiting[0][1].done():
                yield self._scored(*waiting.popleft())
        while waiting:
            yield self._scored(*waiting.popleft())

    def check(self, rows: Iterable[Problem]) -> list[CheckResult]:
        """Call every reward on sample rows, with a well-formed completion that states the gold answer."""
        results = []
        for row in rows:
            completion = f"<think> The answer is known. </think> <answer> {row.answer} </answer>"
            completion = completion.removeprefix("<think>") if self.prefilled else completion
            prompt = getattr(row, "text", row.question)
            columns = {**_plain(row.meta), "question": row.question, "num_tokens": len(completion.split()), "finish_reason": "stop"}
            if self._wants_ids:
                columns["completion_ids"] = []
            start = time.monotonic()
            (outcomes,) = self._pool.submit([Sample(prompt=prompt, completion=completion, answer=row.answer, columns=columns)]).result()
            seconds = time.monotonic() - start
            for name, outcome in zip(self.weights, outcomes):
                fault = None if outcome.fault is None else f"{outcome.fault}: {outcome.detail}".rstrip(": ")
                results.append(CheckResult(name=name, value=outcome.value, fault=fault, question=row.question, seconds=seconds))
        return results

    def answers(self, texts: Sequence[str]) -> list[str | None]:
        """The final answers of completions, for voting (`rewards.voting.cluster`); None where there is none."""
        return [answer_span(self._opened(text)) for text in texts]

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: `rewards/timeouts`, `rewards/failures`, `rewards/left_out` (value None)."""
        now = Counter(self._pool.counters)
        now["left_out"] = self._left_out
        since = {f"rewards/{name}": float(now[name] - self._reported[name]) for name in ("timeouts", "failures", "left_out")}
        self._reported = now
        return since

    def close(self) -> None:
        """Stop the workers."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, text: str) -> str:
        return "<think>" + text if self.prefilled else text

    def _sample(self, prompt: Prompt, completion: Completion) -> Sample:
        columns = {
            **_plain(prompt.meta),
            "question": prompt.question,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        if self._wants_ids:
            columns["completion_ids"] = list(completion.token_ids)
        return Sample(prompt=prompt.text, completion=completion.text, answer=prompt.answer, columns=columns)

    def _scored(self, group: Group, future: Future[list[list[Outcome]]]) -> tuple[Group, tuple[Score, ...]]:
        rows = future.result()
        return group, tuple(self._combine(completion, outcomes) for completion, outcomes in zip(group.completions, rows, strict=True))

    def _combine(self, completion: Completion, outcomes: Sequence[Outcome]) -> Score:
        failure = self.section.failure_value
        parts = {name: outcome.value if outcome.fault is None else failure for name, outcome in zip(self.weights, outcomes, strict=True)}
        answer = next((outcome.answer for outcome in outcomes if outcome.answer is not None), None)
        value = combine(parts, self.weights)
        with self._lock:
            self._left_out += value is None
        return Score(
            value=value,
            parts=parts,
            answer=answer_span(self._opened(completion.text)) if answer is None else answer,
            timed_out=tuple(name for name, outcome in zip(self.weights, outcomes) if outcome.fault in ("timeout", "crash")),
        )


def _plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values; anything else as text. Names that rewards use themselves are left to them."""
    reserved = ("prompt", "prompts", "completion", "completions", "answer")
    return {name: _json(value) for name, value in meta.items() if name not in reserved}


def _json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value)
