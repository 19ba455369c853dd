"""`nsa-grpo rewards check DATA`: is every gold answer accepted as an answer, and what does a user's reward say of sample rows.

No model and no tokenizer. Leaves out the checkers themselves (the package rewards).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from grpo.config import RewardSpec, RewardsSection
from grpo.data import Row, load_rows
from grpo.data_types import Completion, Group, Prompt, Score


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
    section = RewardsSection(functions=(RewardSpec(name=reward),))
    scored = score_samples(rows, section, prefilled=False)
    for row, group, scores in scored:
        table = Table(title=Text(row.question[:200]), show_lines=True)
        for column in ("completion", reward, "answer found"):
            table.add_column(column, overflow="fold")
        for completion, score in zip(group.completions, scores, strict=True):
            value = score.parts.get(reward)
            shown = "timed out or died" if reward in score.timed_out else "failed" if value is None else f"{value:g}"
            table.add_row(Text(completion.text), shown, Text(score.answer or ""))
        console.print(table)
    return 1 if faults(scored) else 0


Scored = list[tuple[Row, Group, tuple[Score, ...]]]


def score_samples(rows: Sequence[Row], section: RewardsSection, *, prefilled: bool) -> Scored:
    """Score two completions of every row, the gold answer's and a wrong one's, with the run's own Scorer."""
    from grpo.scoring import Scorer

    groups = [sample_group(row, str(number), prefilled=prefilled) for number, row in enumerate(rows)]
    scorer = Scorer(section, prefilled=prefilled)
    try:
        scores = {group.prompt.prompt_id: (group, scored) for group, scored in scorer.score(groups)}
    finally:
        scorer.close()
    return [(row, *scores[str(number)]) for number, row in enumerate(rows)]


def faults(scored: Scored) -> list[str]:
    """One line per reward that timed out, died or gave no value for some sample."""
    found: dict[str, str] = {}
    for _, group, scores in scored:
        for completion, score in zip(group.completions, scores, strict=True):
            for name, value in score.parts.items():
                if name in score.timed_out:
                    found.setdefault(name, f"reward {name}: timed out or died on {completion.text!r}")
                elif value is None:
                    found.setdefault(name, f"reward {name}: no value for {completion.text!r}")
    return list(found.values())


def sample_group(row: Row, prompt_id: str, *, prefilled: bool) -> Group:
    """A group as the rollout would make it, with texts of ours and no tokens."""
    texts = (answer_completion(row.answer, prefilled=prefilled), answer_completion("no idea", prefilled=prefilled))
    prompt = Prompt(prompt_id=prompt_id, token_ids=(), question=row.question, answer=row.answer, text=row.question, meta=row.meta)
    completions = tuple(Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop", policy_version=0) for text in texts)
    return Group(prompt=prompt, completions=completions)


def answer_completion(answer: str, *, prefilled: bool) -> str:
    """A well-formed completion that gives `answer`."""
    return f"{'' if prefilled else ' <think>'} A sample. </think> <answer> {answer} </answer>"
