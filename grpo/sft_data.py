"""Examples for supervised fine-tuning: read, rendered into think/answer form, tokenised, and grouped into steps.

    read_records / load_rows → SftText (prompt, completion) → SftExample (token ids) → steps → micro-batches

Rows are prompt/completion texts, taken as they are, or problem/solution/answer rows: those get the run's prompt template
and ` <think> solution </think> <answer> answer </answer>`. An end-of-sequence token is put after every completion.
Leaves out the training (grpo/sft.py).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from grpo.config import PromptSection, SftDataSection
from grpo.data import load_rows
from grpo.prompts import encode, render
from grpo.records import read_records
from grpo.seeding import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftText:
    """One example as text. The completion holds whatever stands between the prompt and the end-of-sequence token, a leading space included."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SftExample:
    """One example as token ids; the loss is on `completion_ids`, whose last one is the end-of-sequence token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """How many rows were left out, and why."""

    tags_in_solution: int = 0
    """Solutions that hold a think or answer tag themselves, which would break the form."""
    too_long: int = 0


# ---- text


def think_answer(prompt: str, solution: str, answer: str, *, prefilled: bool) -> str:
    """The completion that solves a problem in think/answer form; with `prefilled` the prompt has opened `<think>` already.

    It starts with a space unless the prompt ends in white space, so that prompt and completion read as one text."""
    text = f"{solution} </think> <answer> {answer} </answer>"
    if not prefilled:
        text = f"<think> {text}"
    return text if not prompt or prompt[-1].isspace() else f" {text}"


def clean_solution(solution: str) -> str:
    """GSM8K's calculator marks (`<<48/2=24>>`) and its `#### answer` line taken out."""
    lines = [line.rstrip() for line in _CALCULATOR.sub("", solution).strip().split("\n")]
    if lines[-1].startswith("####"):
        lines.pop()
    return "\n".join(lines).strip()


def load_texts(data: SftDataSection, prompt: PromptSection, tokenizer: PreTrainedTokenizerBase) -> tuple[list[SftText], Dropped]:
    """Read `data.train` (file, folder or hub name) and render it.

    Returns:
        The texts, and what was left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, missing columns, a row without prompt, completion, solution or answer (with its place).
    """
    first = next(read_records(data.train, split=data.split, limit=1), None)
    if first is None:
        raise ValueError(f"{data.train}: the dataset is empty")
    place, record = first
    if "completion" in record:
        return list(_prompt_completion_rows(data)), Dropped()
    if "solution" not in record and "####" not in str(record.get("answer", "")):
        raise ValueError(
            f"{place}: SFT needs columns prompt and completion, or problem (or question), solution and answer, or GSM8K's answers with a "
            f"'#### answer' line; the row has {', '.join(map(str, record))}"
        )
    return _problem_rows(data, prompt, tokenizer)


def _prompt_completion_rows(data: SftDataSection) -> Iterator[SftText]:
    for place, record in read_records(data.train, split=data.split, limit=data.limit):
        for column in ("prompt", "completion"):
            value = record.get(column)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{place}: column {column} must hold a text, got {'nothing' if value is None else repr(value)[:80]}")
        yield SftText(prompt=record["prompt"], completion=record["completion"])


def _problem_rows(data: SftDataSection, prompt: PromptSection, tokenizer: PreTrainedTokenizerBase) -> tuple[list[SftText], Dropped]:
    texts: list[SftText] = []
    tagged = 0
    for number, row in enumerate(load_rows(data.train, split=data.split, limit=data.limit), 1):
        solution = clean_solution(row.solution or "")
        if not solution:
            raise ValueError(f"{data.train}: problem {number} ({row.question[:60]!r}) has no solution to learn from")
        if _TAG.search(solution) or _TAG.search(row.answer):
            tagged += 1
            continue
        rendered = render(row.question, section=prompt, tokenizer=tokenizer, system=row.system)
        texts.append(SftText(prompt=rendered, completion=think_answer(rendered, solution, row.answer, prefilled=prompt.prefill_think)))
    return texts, Dropped(tags_in_solution=tagged)


# ---- tokens


def tokenize(
    texts: Sequence[SftText], prompt: PromptSection, tokenizer: PreTrainedTokenizerBase, *, eos_id: int, max_tokens: int
) -> tuple[list[SftExample], int]:
    """Token ids of every example, `eos_id` appended; those of more than `max_tokens` tokens are left out.

    Prompt and completion are tokenised apart, as at sampling time: the completion continues the prompt's tokens.

    Returns:
        The examples, and how many were too long.

    Raises:
        ValueError: no examples, or all of them too long.
    """
    if not texts:
        raise ValueError("SFT needs at least one example, got none")
    prompts = encode([text.prompt for text in texts], section=prompt, tokenizer=tokenizer)
    completions: list[list[int]] = tokenizer([text.completion for text in texts], add_special_tokens=False, return_attention_mask=False)["input_ids"]  # type: ignore[assignment]
    examples = [
        SftExample(prompt_ids=tuple(prompt_ids), completion_ids=(*completion_ids, eos_id)) for prompt_ids, completion_ids in zip(prompts, completions)
    ]
    kept = [example for example in examples if example.num_tokens <= max_tokens]
    if not kept:
        shortest = min(example.num_tokens for example in examples)
        raise ValueError(
            f"all {len(examples)} examples are longer than {max_tokens} tokens (the shortest has {shortest}); "
            "raise data.max_tokens, or use a model with a longer context"
        )
    return kept, len(examples) - len(kept)


# ---- steps


def fill(examples: Iterable[SftExample], budget: int) -> Iterator[list[SftExample]]:
    """Split into runs of at most `budget` tokens, in order; an example longer than the budget stands alone."""
    run: list[SftExample] = []
    tokens = 0
    for example in examples:
        if run and tokens + example.num_tokens > budget:
            yield run
            run, tokens = [], 0
        run.append(example)
        tokens += example.num_tokens
    if run:
        yield run


def plan_steps(
    examples: Sequence[SftExample], *, batch_tokens: int, epochs: int, steps: int | None, seed: int, shuffle: bool
) -> list[tuple[int, ...]]:
    """The positions of the examples of every optimizer step. Each epoch has its own order, given by (seed, epoch) alone.

    `steps` gives exactly that many, over as many epochs as they need; None gives `epochs` whole ones."""
    plan: list[tuple[int, ...]] = []
    for epoch in range(epochs) if steps is None else count():
        order = list(range(len(examples)))
        if shuffle:
            random.Random(fold(seed, "sft", epoch)).shuffle(order)  # noqa: S311 (no secret)
        position = 0
        for run in fill((examples[index] for index in order), batch_tokens):
            plan.append(tuple(order[position : position + len(run)]))
            position += len(run)
            if steps is not None and len(plan) == steps:
                return plan
    return plan
