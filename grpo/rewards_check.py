"""`nsa-grpo rewards check DATA`: is every gold answer accepted as an answer, do two checkers agree, and what does a user's
reward say of sample rows.

No model and no tokenizer. Leaves out the checkers themselves (the package rewards).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from grpo.config import RewardSpec, RewardsSection
from grpo.data import Row, load_rows
from grpo.data_types import Completion, Group, Prompt

_SECOND_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A completion to be judged: the gold answer stated as an answer, or the row's own text."""

    number: int
    gold: str
    completion: str
    own: bool
    """It states the gold answer itself, so it must be accepted."""


def check_gold(data: str, *, show: int, against: str | None = None, completions: str | None = None, **columns: Any) -> int:
    """Score every gold as the answer of a completion; prints failures, answers that are not understood, and times.

    Args:
        against: a second checker (`math_verify`, or any reward's name), run in the reward workers; its disagreements with
            ours are listed side by side.
        completions: a column with completions (`solution`, `text`) to be judged as well.

    Returns:
        0 if all golds are accepted by our checker, else 1.

    Raises:
        ValueError: no such data, column or checker.
    """
    from rewards.math_equal import equivalent, parse

    console = Console()
    rows = load_rows(data, **columns)
    cases = [
        _Case(number=number, gold=row.answer, completion=answer_completion(row.answer, prefilled=False), own=True)
        for number, row in enumerate(rows, 1)
    ]
    if completions is not None:
        cases += _own_texts(data, rows, completions)
    verdicts: list[bool] = []
    seconds: list[float] = []
    for case in track(cases, description="checking", console=console, disable=not console.is_terminal):
        start = time.perf_counter()
        verdicts.append(equivalent(case.gold, case.completion))
        seconds.append(time.perf_counter() - start)
    failing = [(case.number, case.gold) for case, accepted in zip(cases, verdicts) if case.own and not accepted]
    rejected = {number for number, _ in failing}
    unparsed = [(number, row.answer) for number, row in enumerate(rows, 1) if number not in rejected and parse(row.answer) is None]
    _list(console, "rejected as their own answer", failing, show)
    _list(console, "not understood (only the same text is accepted)", unparsed, show)
    if against is not None:
        _compare(console, cases, verdicts, against, show)
    if completions is not None:
        texts = [accepted for case, accepted in zip(cases, verdicts) if not case.own]
        console.print(
            f"{completions}: {sum(texts)} of {len(texts)} accepted ({sum(texts) / max(1, len(texts)):.2%})", highlight=False, soft_wrap=True
        )
    share = 1 - len(failing) / len(rows)
    console.print(
        f"{data}: {len(rows) - len(failing)} of {len(rows)} golds accepted ({share:.2%}), {len(unparsed)} not understood; "
        f"{len(cases) / max(sum(seconds), 1e-9):.0f} a second, slowest {max(seconds) * 1000:.1f} ms",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failing else 0


def _own_texts(data: str, rows: Sequence[Row], column: str) -> list[_Case]:
    found = []
    for number, row in enumerate(rows, 1):
        text = row.solution if column == "solution" else row.meta.get(column)
        if isinstance(text, str) and text.strip():
            found.append(_Case(number=number, gold=row.answer, completion=text, own=False))
    if not found:
        raise ValueError(f"{data}: no row has a text in column {column}; the first has {', '.join(rows[0].meta) or 'no other columns'}")
    return found


def _compare(console: Console, cases: Sequence[_Case], verdicts: Sequence[bool], name: str, show: int) -> None:
    """Run the second checker and list where the two disagree."""
    from rewards.base import Sample
    from rewards.pool import FunctionSpec, WorkerPool

    start = time.perf_counter()
    with WorkerPool([FunctionSpec(name=name)], deadline_s=_SECOND_DEADLINE_S) as pool:
        loaded = time.perf_counter()
        samples = [Sample(prompt="", completion=case.completion, answer=case.gold) for case in cases]
        with console.status(f"checking with {name}"):
            outcomes = [row[0] for row in pool.submit(samples).result()]
        spent = time.perf_counter() - loaded
    theirs = [outcome.value is not None and outcome.value >= 1 for outcome in outcomes]
    unread = sum(outcome.value is None and outcome.fault is None for outcome in outcomes)
    faults = sum(outcome.fault is not None for outcome in outcomes)
    differing = [(case, ours, other) for case, ours, other in zip(cases, verdicts, theirs) if ours != other]
    if differing:
        table = Table(title=Text(f"where ours and {name} disagree: {len(differing)} of {len(cases)}"), show_lines=False)
        for title in ("problem", "gold", "completion", "ours", name):
            table.add_column(Text(title), overflow="fold")
        for case, ours, other in differing[:show]:
            text = "the gold" if case.own else f"… {case.completion[-120:]}"
            table.add_row(str(case.number), Text(case.gold[:120]), Text(text), "yes" if ours else "no", "yes" if other else "no")
        console.print(table)
        if len(differing) > show:
            console.print(f"  … and {len(differing) - show} more (--show N)", highlight=False, soft_wrap=True)
    golds = sum(accepted for case, accepted in zip(cases, theirs) if case.own)
    console.print(
        f"{name}: {golds} of {sum(case.own for case in cases)} golds accepted, {sum(theirs)} of {len(cases)} in all; {unread} golds it cannot read, "
        f"{faults} calls failed or hung; {len(cases) / max(spent, 1e-9):.0f} a second in {pool.size} workers (loaded in {loaded - start:.1f} s); "
        f"{len(differing)} disagreements",
        highlight=False,
        soft_wrap=True,
    )


def _list(console: Console, what: str, found: Sequence[tuple[int, str]], show: int) -> None:
    if not found:
        return
    console.print(f"{what}: {len(found)}", highlight=False, soft_wrap=True)
    for number, answer in found[:show]:
        console.print(f"  problem {number}: {answer!r}", markup=False, highlight=False, soft_wrap=True)
    if len(found) > show:
        console.print(f"  … and {len(found) - show} more (--show N)", highlight=False, soft_wrap=True)


def check_reward(data: str, reward: str, *, num_rows: int, **columns: Any) -> int:
    """Call one reward on sample rows, with the gold answer and with a wrong one; 1 if a call failed."""
    console = Console()
    rows = load_rows(data, **{**columns, "limit": num_rows})
    samples = score_samples(rows, RewardsSection(functions=(RewardSpec(name=reward),)), prefilled=False)
    for row, (right, wrong) in zip(rows, samples.values[reward], strict=True):
        table = Table(title=Text(row.question[:200]), show_lines=True)
        table.add_column("completion", overflow="fold")
        table.add_column(Text(reward), justify="right")
        table.add_row(Text(answer_completion(row.answer, prefilled=False)), _number(right))
        table.add_row(Text(answer_completion(WRONG, prefilled=False)), _number(wrong))
        console.print(table)
    for fault in samples.faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if samples.faults else 0


WRONG = "no idea"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """`values[reward]` has one (gold answer's, wrong answer's) pair per row; `faults` one line per reward that failed."""

    values: dict[str, list[tuple[float | None, float | None]]]
    faults: tuple[str, ...]


def score_samples(rows: Sequence[Row], section: RewardsSection, *, prefilled: bool) -> SampleScores:
    """Call every reward of a run on two completions of each row, through the run's own Scorer.

    Raises:
        ValueError: a reward that cannot be loaded.
    """
    from grpo.scoring import Scorer

    faults: dict[str, str] = {}
    with Scorer(section, prefilled=prefilled) as scorer:
        for result in scorer.check(rows):
            if result.fault is not None:
                faults.setdefault(result.name, f"reward {result.name}, question {result.question[:60]!r}: {result.fault}")
        groups = [sample_group(row, str(number), prefilled=prefilled) for number, row in enumerate(rows)]
        scores = {group.prompt.prompt_id: scored for group, scored in scorer.score(groups)}
    pairs = [scores[group.prompt.prompt_id] for group in groups]
    values = {spec.name: [(right.parts[spec.name], wrong.parts[spec.name]) for right, wrong in pairs] for spec in section.functions}
    return SampleScores(values=values, faults=tuple(faults.values()))


def sample_group(row: Row, prompt_id: str, *, prefilled: bool) -> Group:
    """A group as the rollout would make it: the gold answer's completion and a wrong one, without tokens."""
    prompt = Prompt(prompt_id=prompt_id, token_ids=(), question=row.question, answer=row.answer, text=row.question, meta=row.meta)
    texts = [answer_completion(answer, prefilled=prefilled) for answer in (row.answer, WRONG)]
    completions = tuple(Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop", policy_version=0) for text in texts)
    return Group(prompt=prompt, completions=completions)


def answer_completion(answer: str, *, prefilled: bool) -> str:
    """A well-formed completion that gives `answer`."""
    return f"{'' if prefilled else ' <think>'} A sample. </think> <answer> {answer} </answer>"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
