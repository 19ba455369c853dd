"""Problems: rows from a file or the Hugging Face hub, prompts made of them, and the endless resumable stream of training prompts.

    read_records (grpo/records.py) → load_rows (question, answer, …) → build_prompts (rendered, tokenised) → PromptStream

Knows verl's and TRL's columns. Leaves out file formats, templates (grpo/prompts.py) and rewards. Every fault of the data
is one error that names file and row.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import PromptSection
from grpo.data_types import Prompt
from grpo.prompts import encode, render
from grpo.records import read_records
from grpo.seeding import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth", "solution")
RESERVED = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids", "answer"})
"""Names that reward functions receive from the trainer itself, so never from `meta`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem. `meta` holds the other columns (and the answer's column under its own name where that is not `answer`)."""

    question: str
    answer: str
    solution: str | None = None
    system: str | None = None
    """The system message, where the row's prompt is a list of messages that has one."""
    meta: dict[str, Any] = field(default_factory=dict)


def load_rows(
    path_or_name: str | Path,
    *,
    split: str = "train",
    question_column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Read problems. Columns may be dotted paths into nested ones (`extra_info.question`); None detects them.

    An answer like GSM8K's ("… #### 72") and a `solution` that is used as the answer column (its last \\boxed{}) give the
    final answer; the whole text becomes `solution`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty dataset, unreadable content, or a row without question or answer (with its number).
    """
    rows: list[Row] = []
    columns: tuple[str, str] | None = None
    for place, record in read_records(path_or_name, split=split, limit=limit):
        if columns is None:
            columns = (
                question_column or _detect(place, record, QUESTION_COLUMNS, "question"),
                answer_column or ("reward_model.ground_truth" if _is_verl(record) else _detect(place, record, ANSWER_COLUMNS, "answer")),
            )
        rows.append(_make_row(place, record, *columns))
    if not rows:
        raise ValueError(f"{path_or_name}: the dataset is empty")
    return rows


def _is_verl(record: dict[str, Any]) -> bool:
    return isinstance(record.get("reward_model"), dict) and "ground_truth" in record["reward_model"]


def _detect(place: str, record: dict[str, Any], names: Sequence[str], what: str) -> str:
    for name in names:
        if name in record:
            return name
    raise ValueError(f"{place}: no {what} column; looked for {', '.join(names)}, the row has {', '.join(map(str, record))} (set data.{what}_column)")


def _lookup(record: dict[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _make_row(place: str, record: dict[str, Any], question_column: str, answer_column: str) -> Row:
    system, question = _question(place, question_column, _lookup(record, question_column))
    answer = _answer(place, answer_column, _lookup(record, answer_column))
    solution = record.get("solution")
    solution = solution if isinstance(solution, str) else None
    head, mark, tail = answer.rpartition("####")
    if mark and tail.strip() and "\n" not in tail.strip():
        solution, answer = solution if solution and answer_column != "solution" else head.strip(), tail.strip().replace(",", "")
    elif answer_column == "solution":
        solution, answer = answer, _last_boxed(answer) or answer
    meta = {str(key): value for key, value in record.items() if key not in RESERVED and key != question_column}
    return Row(question=question, answer=answer, solution=solution, system=system, meta=meta)


def _question(place: str, column: str, value: Any) -> tuple[str | None, str]:
    """(system message, question) of a text or of a list of messages with one user turn."""
    system = None
    if isinstance(value, list):
        turns = [(message.get("role"), message.get("content")) for message in value if isinstance(message, dict)]
        roles = [str(role) for role, _ in turns]
        if len(turns) != len(value) or roles not in (["user"], ["system", "user"]):
            raise ValueError(f"{place}: {column} must be messages [system], user with role and content, got roles {roles}")
        system = turns[0][1] if len(turns) == 2 else None
        value = turns[-1][1]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: no question in column {column} (a text or messages is needed, got {_show(value)})")
    return system if isinstance(system, str) else None, value


def _answer(place: str, column: str, value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        value = format(Decimal(repr(value)), "f").removesuffix(".0")
    elif isinstance(value, int | Decimal):
        value = str(value)
    elif isinstance(value, dict | list) and value and column == "reward_model.ground_truth":
        value = json.dumps(value)  # verl leaves the form of ground_truth to the reward function
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: no answer in column {column} (a text or number is needed, got {_show(value)})")
    return value.strip()


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]


def _last_boxed(text: str) -> str | None:
    """Content of the last complete \\boxed{…} (or \\fbox{…}), braces balanced; None where there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip() or None
    return None


def build_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prompt_section: PromptSection, max_prompt_tokens: int | None = None
) -> tuple[list[Prompt], int]:
    """Render and tokenise; prompts of more than `max_prompt_tokens` tokens are left out. `prompt_id` is the row's position.

    Returns:
        The prompts, and how many were dropped.

    Raises:
        ValueError: an unusable template, or every prompt too long.
    """
    texts = [render(row.question, section=prompt_section, tokenizer=tokenizer, system=row.system) for row in rows]
    prompts: list[Prompt] = []
    shortest = None
    for position, (row, text, ids) in enumerate(zip(rows, texts, encode(texts, section=prompt_section, tokenizer=tokenizer))):
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            continue
        meta = row.meta if row.solution is None else {**row.meta, "solution": row.solution}
        prompts.append(Prompt(prompt_id=str(position), token_ids=tuple(ids), question=row.question, answer=row.answer, text=text, meta=meta))
    if not prompts:
        raise ValueError(
            f"all {len(rows)} prompts are longer than {max_prompt_tokens} tokens (the shortest has {shortest}); "
            "raise data.max_prompt_tokens, lower rollout.max_tokens, or use a model with a longer context"
        )
    return prompts, len(rows) - len(prompts)


class PromptStream:
    """An endless stream of training prompts with an exact, resumable position.

    Each epoch is a new permutation given by (seed, epoch) alone; a draw may cross epochs. From the second epoch on a
    prompt's id carries its epoch ("17#1"), so that ids within a step differ and its samples are drawn anew.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("PromptStream needs at least one prompt, got none")
        self._prompts = list(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(fold(self._seed, "prompt_stream", epoch)).shuffle(order)  # noqa: S311 (no secret)
        return order

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(f"{prompt.prompt_id}\0{prompt.text}\0{prompt.answer}\0".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts (n >= 1)."""
        if n < 1:
            raise ValueError(f"PromptStream.next needs n >= 1, got {n}")
        drawn: list[Prompt] = []
        while len(drawn) < n:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            prompt = self._prompts[self._order[self._position]]
            drawn.append(replace(prompt, prompt_id=f"{prompt.prompt_id}#{self._epoch}") if self._epoch else prompt)
            self._position += 1
        return drawn

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with fraction."""
        return self._epoch + self._position / len(self._prompts)

    def state(self) -> dict[str, Any]:
        """Everything that `load_state` needs, as plain JSON values."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "shuffle": self._shuffle, "data": self._fingerprint()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            ValueError: other prompts, seed or shuffle setting than those of the state.
        """
        for key, mine in (("data", self._fingerprint()), ("seed", self._seed), ("shuffle", self._shuffle)):
            if state[key] != mine:
                what = "the training data (rows, template or length limit)" if key == "data" else key
                raise ValueError(f"cannot resume: {what} changed since the checkpoint ({state[key]} then, {mine} now)")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)
