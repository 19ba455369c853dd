"""`nsa-grpo rewards check DATA`: is every gold answer accepted as an answer, and what does a user's reward say of sample rows.

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


def check_gold(data: str, *, show: int, **columns: Any) -> int:
    """Score every gold as the answer of a completion; prints failures, answers that are not understood, and times.

    Returns:
        0 if all are accepted, else 1.
    """
    from rewards.math_equal import equivalent, parse

    console = Console()
    rows = load_rows(data, **columns)
    failing: list[tuple[int, str]] = []
    unparsed: list[tuple[int, str]] = []
    seconds: list[float] = []
    for number, row in enumerate(track(rows, description="checking golds", console=console, disable=not console.is_terminal), 1):
        start = time.perf_counter()
        accepted = equivalent(row.answer, answer_completion(row.answer, prefilled=False))
        seconds.append(time.perf_counter() - start)
        if not accepted:
            failing.append((number, row.answer))
        elif parse(row.answer) is None:
            unparsed.append((number, row.answer))
    total = sum(seconds)
    _list(console, "rejected as their own answer", failing, show)
    _list(console, "not understood (only the same text is accepted)", unparsed, show)
    share = 1 - len(failing) / len(rows)
    console.print(
        f"{data}: {len(rows) - len(failing)} of {len(rows)} golds accepted ({share:.2%}), {len(unparsed)} not understood; "
        f"{len(rows) / max(total, 1e-9):.0f} a second, slowest {max(seconds) * 1000:.1f} ms",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failing else 0


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
